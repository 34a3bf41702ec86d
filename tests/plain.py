"""Slow, obvious forms that the tests compare with, and the small data that they do it on.

A batch is the dict that collect returns, (N, E, T, ...) by name; of_task takes the N away.
"""

import math

import torch


def double_precision():
    """To make a fixture of: double precision and fixed draws; leaves nothing set."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch.use_deterministic_algorithms(False)


def in_units(agent):
    """A new policy, or an agent with one, to which observations are of mean 0 and deviation 1 as they are."""
    getattr(agent, "policy", agent).units.std.fill_(1)
    return agent


# ------------------------------------------------------------------------------------------ batches


def of_task(batch, i):
    return {name: x[i] for name, x in batch.items()}


def valid_steps(batch):
    """The steps of one task, or of one episode, that count, without the padding: (steps, ...).

    What a batch has once per episode is left out.
    """
    mask = batch["mask"]
    shape = mask.shape
    return {name: x[mask == 1] for name, x in batch.items() if x.shape[: len(shape)] == shape}


def ragged_mask(n, e, t):
    """Episodes of 1 to t steps, the first of every task the longest."""
    lengths = 1 + torch.arange(n * e).view(n, e) % t
    lengths[:, 0] = t
    return (torch.arange(t) < lengths[..., None]).double()


def make_batch(does, n, e=3, t=4, discrete=False):
    """Episodes of random observations, with zeros after their ends as those of rollout, and random
    advantages.

    does: i, obs (E, T, 2) -> dist_params (E, T, D) of task i.
    """
    mask = ragged_mask(n, e, t)
    obs = torch.randn(n, e, t, 2) * mask[..., None]
    dist_params = torch.stack([does(i, obs[i]) for i in range(n)]).detach()
    if discrete:
        actions = torch.distributions.Categorical(logits=dist_params).sample() * mask
    else:
        noise = torch.randn_like(dist_params.chunk(2, -1)[0])
        actions = actions_from(dist_params, noise) * mask[..., None]
    return {
        "obs": obs,
        "actions": actions,
        "mask": mask,
        "dist_params": dist_params,
        "logprobs": log_density(dist_params, actions, discrete),
        "advantages": torch.randn(n, e, t) * mask,
    }


# ---------------------------------------------------------------------------- action distributions


def actions_from(dist_params, noise, discrete=False):
    """Normal noise to actions, or Gumbel noise to the index of one."""
    if discrete:
        return (dist_params + noise).argmax(-1)
    mean, log_std = dist_params.chunk(2, -1)
    return mean + log_std.exp() * noise


def log_density(dist_params, actions, discrete=False):
    """log π(a|o), written out."""
    if discrete:
        return dist_params.log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    mean, log_std = dist_params.chunk(2, -1)
    distance = ((actions - mean) / log_std.exp()) ** 2
    return (-0.5 * distance - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence(old, new, discrete=False):
    """KL(old || new), written out."""
    if discrete:
        return (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1)
    (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
    variances = (2 * log_std).exp() + (mean - new_mean) ** 2
    return (new_log_std - log_std + variances / (2 * (2 * new_log_std).exp()) - 0.5).sum(-1)


# ---------------------------------------------------------------------------------------- calculus


def unpack(vector, like):
    """The vector's entries under the names and shapes of like."""
    pieces = vector.split([x.numel() for x in like.values()])
    return {
        name: piece.view(x.shape) for (name, x), piece in zip(like.items(), pieces, strict=True)
    }


def error(x, y):
    """Relative error of x."""
    return ((x - y).norm() / y.norm()).item()


def central_differences(f, x, size=1e-6, directions=None):
    """Gradient (P,) of a function of x (P,), or its derivatives (R,) along directions (R, P)."""
    steps = size * (torch.eye(len(x)) if directions is None else directions)
    return torch.stack([(f(x + step) - f(x - step)) / (2 * size) for step in steps])


def gradient_behind(step, size):
    """The gradient g (P,) of a loss, from steps that are made along it and forget its length.

    step: c (P,) -> the step down a loss that has c·vector added to it. g + c = λ step(c) for two c
    gives g and both λ.
    """
    c, other = torch.randn(2, size)
    ahead, sideways = step(c), step(other)
    scales = torch.linalg.lstsq(torch.stack([ahead, -sideways], 1), (c - other)[:, None]).solution
    assert (scales > 0).all()
    return scales[0] * ahead - c
