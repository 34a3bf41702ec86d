"""mmaml.py: its mathematics against plain loops and finite differences, and a family to train on."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from plain import (
    actions_from,
    divergence,
    double_precision,
    in_units,
    log_density,
    of_task,
    ragged_mask,
    valid_steps,
)
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector

import mmaml as module

double = pytest.fixture(autouse=True)(double_precision)

# ------------------------------------------------------------------------ the task family of probes


class Modes(gym.Env):
    """The observation says nothing about the task, ±1, whose mode is 0 or 1. Episodes have one to
    three steps, their return is the steps' mean of task times action: 0 without adaptation, at
    best 1.
    """

    num_modes = 2
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float64)

    def sample_tasks(self, n):
        mode = np.arange(n) % 2
        return np.column_stack([1 - 2 * mode, mode])

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = self.np_random.integers(1, 4), 0
        return np.ones(2), {}

    def step(self, action):
        self.steps += 1
        return np.ones(2), self.task * action[0] / self.length, self.steps == self.length, False, {}


class OneMode(Modes):
    num_modes = 1  # but tasks of two


class Choices(Modes):
    """A task is one of three actions, each a mode of its own; it alone scores, 1/3 by chance."""

    num_modes = 3
    action_space = gym.spaces.Discrete(3)

    def sample_tasks(self, n):
        return np.column_stack([np.arange(n) % 3, np.arange(n) % 3])

    def step(self, action):
        self.steps += 1
        score = float(action == self.task) / self.length
        return np.ones(2), score, self.steps == self.length, False, {}


gym.register("ProbeModes-v0", Modes, max_episode_steps=3)
gym.register("ProbeChoices-v0", Choices, max_episode_steps=3)
gym.register("ProbeOneMode-v0", OneMode, max_episode_steps=3)

# ----------------------------------------------------------- the same algorithm once more, in loops


def plain_policy(params, gammas, betas, obs, action_scale):
    """h = tanh((W x + b) (1 + γ) + β) in both layers, mean and log std in units of action_scale; of
    a policy without log std the logits.
    """
    x = obs
    for layer in range(2):
        weight, bias = params[f"hidden.{layer}.weight"], params[f"hidden.{layer}.bias"]
        x = torch.tanh((x @ weight.T + bias) * (1 + gammas[layer]) + betas[layer])
    mean = x @ params["mean.weight"].T + params["mean.bias"]
    if "log_std" not in params:
        return mean
    log_std = (math.log(action_scale) + params["log_std"]).expand_as(mean)
    return torch.cat([action_scale * mean, log_std], -1)


def plain_gru(params, inputs):
    """The last state of a GRU, gate by gate; inputs (T, X)."""
    h = inputs.new_zeros(params["gru.weight_hh_l0"].shape[1])
    for x in inputs:
        i = params["gru.weight_ih_l0"] @ x + params["gru.bias_ih_l0"]
        j = params["gru.weight_hh_l0"] @ h + params["gru.bias_hh_l0"]
        (ir, iz, i_n), (jr, jz, jn) = i.chunk(3), j.chunk(3)
        r, z = torch.sigmoid(ir + jr), torch.sigmoid(iz + jz)
        h = (1 - z) * torch.tanh(i_n + r * jn) + z * h
    return h


def plain_inputs(steps):
    """What the encoder is told of steps (B, ...): o, a or its one-hot of three, r."""
    actions = steps["actions"]
    if actions.ndim == 1:
        actions = torch.stack([actions == choice for choice in range(3)], 1)
    return torch.cat([steps["obs"], actions, steps["rewards"][:, None]], 1)


def plain_encoder(params, encoder, batch):
    """The embedding of one task, batch (E, T, ...): episode by episode, each up to its end."""

    def layers(name, x):
        x = torch.relu(params[f"{name}.0.weight"] @ x + params[f"{name}.0.bias"])
        return params[f"{name}.2.weight"] @ x + params[f"{name}.2.bias"]

    embeddings = []
    for e in range(len(batch["mask"])):
        episode = valid_steps(of_task(batch, e))
        inputs = plain_inputs(episode)
        unit = [x**0.5 if x > 1e-6 else 1.0 for x in encoder.variance.tolist()]
        state = plain_gru(params, (inputs - encoder.mean) / torch.tensor(unit))
        embeddings.append(layers("of_episode", state))
    embedding = layers("of_task", sum(embeddings) / len(embeddings))
    centred = embedding - embedding.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() / len(centred) ** 0.5


def sub(params, prefix):
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def plain_modulation(p, params, batch, mode):
    """γ and β of one task, each (2, H)."""
    nothing = torch.zeros(2, p.args.hidden_size)
    if p.args.no_modulation:
        return nothing, nothing
    embedding = torch.eye(3)[mode]
    if not p.args.oracle_mode:
        embedding = plain_encoder(sub(params, "encoder."), p.agent.encoder, batch)
    out = params["head.weight"] @ embedding[: params["head.weight"].shape[1]] + params["head.bias"]
    if p.args.modulation == "scale":
        return out.view(2, -1), nothing
    return out.view(2, 2, -1).unbind(1)


def plain_task(p, params, i):
    """What happens to task i: τ, the θ of every phase, what they do, clipped surrogate, mean KL."""
    theta = sub(params, "policy.")
    discrete = "log_std" not in theta
    tau = plain_modulation(p, params, of_task(p.batches[0], i), int(p.tasks[i, -1]))
    thetas, found, kls = [theta], [], []
    for k, batch in enumerate(p.batches):
        batch = valid_steps(of_task(batch, i))
        leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}
        gammas, betas = (x.detach() for x in tau)
        if k == 0 and not p.args.oracle_mode:
            gammas, betas = torch.zeros_like(gammas), torch.zeros_like(betas)
        does = plain_policy(leaves, gammas, betas, batch["obs"], p.args.action_scale)
        old = log_density(batch["dist_params"], batch["actions"], discrete)
        ratio = (log_density(does, batch["actions"], discrete) - old).exp()
        gain = ratio * batch["advantages"]
        found.append(does.detach())
        if k == len(p.batches) - 1:
            clipped = ratio.clamp(1 - p.args.clip_coef, 1 + p.args.clip_coef)
            surrogate = -torch.minimum(gain, clipped * batch["advantages"]).mean()
            clipfrac, kl = (ratio != clipped).double().mean(), sum(kls) / max(1, len(kls))
            return tau, thetas, found, surrogate.detach(), kl, clipfrac
        kls.append(divergence(batch["dist_params"], does.detach(), discrete).mean())
        gradient = torch.autograd.grad(-gain.mean(), tuple(leaves.values()))
        steps = zip(theta.items(), gradient, strict=True)
        theta = {name: x - p.args.inner_lr * g for (name, x), g in steps}
        thetas.append(theta)


def plain_loss(p, vector, kl_weight=None):
    """The meta-loss as a function of all meta-parameters (P,), a number."""
    names, shapes = zip(*((name, x.shape) for name, x in p.agent.named_parameters()), strict=True)
    pieces = vector.split([math.prod(shape) for shape in shapes])
    params = {name: x.view(shape) for name, x, shape in zip(names, pieces, shapes, strict=True)}
    parts = [plain_task(p, params, i)[3:5] for i in range(len(p.tasks))]
    weight = p.args.kl_weight if kl_weight is None else kl_weight
    return sum(surrogate + weight * kl for surrogate, kl in parts).item() / len(p.tasks)


# ------------------------------------------------------------------------------------ the test data


def make_batch(n=3, e=3, t=4):
    """Random episodes, with zeros after their ends; dist_params and logprobs are still to come."""
    mask = ragged_mask(n, e, t)
    batch = {name: torch.randn(n, e, t, 2) * mask[..., None] for name in ("obs", "actions")}
    batch |= {name: torch.randn(n, e, t) * mask for name in ("rewards", "advantages")}
    return batch | {"mask": mask}


BOX = gym.spaces.Box(-1, 1, (2,))
KINDS = {"mmaml": {}, "promp": {"no_modulation": True}, "oracle": {"oracle_mode": True}}


def make_args(kind="mmaml", **changes):
    flags = {"hidden_size": 3, "encoder_size": 5, "init_std": 1.0, "inner_lr": 0.5}
    return module.Args(**flags | {"kl_weight": 0.5} | KINDS[kind] | changes)


def make_agent(args, discrete=False):
    """A small agent for two modes with nothing at 0, its inputs' units included."""
    agent = in_units(module.Agent(2, gym.spaces.Discrete(3) if discrete else BOX, 2, args))
    for x in agent.parameters():
        x.data += 0.4 * torch.randn_like(x)
    if agent.encoder:
        size = len(agent.encoder.mean)
        agent.encoder.mean, agent.encoder.variance = torch.randn(size), 0.5 + torch.rand(size)
    return agent


def make_problem(kind="mmaml", num_steps=2, n=3, move=0.02, discrete=False, **changes):
    """An agent, and the batches that it collects in n tasks; then all its parameters move a bit."""
    args = make_args(kind, **changes)
    tasks = np.column_stack([np.zeros(n), np.arange(n) % 2])
    p = SimpleNamespace(args=args, agent=make_agent(args, discrete), tasks=tasks, batches=[])
    params = dict(p.agent.named_parameters())
    for k in range(num_steps + 1):  # what policies of phase k do follows from the batches before
        batch = make_batch(n) | {"dist_params": torch.zeros(n, 3, 4, 3 if discrete else 4)}
        if discrete:
            batch["actions"] = torch.zeros(n, 3, 4, dtype=torch.long)
        p.batches.append(batch)
        for i in range(n):
            found = plain_task(p, params, i)[2]
            batch["dist_params"][i][batch["mask"][i] == 1] = found[k]
        noise = torch.randn(n, 3, 4, 3 if discrete else 2)
        actions = actions_from(batch["dist_params"], noise, discrete)
        taken = batch["mask"].long() if discrete else batch["mask"][..., None]
        batch["actions"] = actions * taken
        batch["logprobs"] = log_density(batch["dist_params"], batch["actions"], discrete)
    for x in p.agent.parameters():
        x.data += move * torch.randn_like(x)
    return p


def terms(p, cut=lambda tau: tau):
    """The meta-loss and its parts (4,), means over the tasks; cut: what becomes of τ before it."""
    losses = vmap(partial(module.promp_loss, agent=p.agent, args=p.args), in_dims=(None, 0, 0))
    tau, _ = p.agent.modulation(p.tasks, p.batches[0])
    theta = dict(p.agent.policy.named_parameters())
    return torch.stack([x.mean() for x in losses(theta, cut(tau), p.batches)])


def adam(p):
    groups = [{"params": [*p.agent.parameters()], "lr": 0.02, "max_lr": 0.03}]
    return module.adam(groups, 0.02, p.args)


VARIANTS = [{"kind": kind, "num_steps": k} for kind in KINDS for k in (1, 2)]
VARIANTS += [{"modulation": "scale"}, {"num_steps": 3}, {"kind": "oracle", "modulation": "scale"}]
VARIANTS += [{"kind": kind, "discrete": True, "move": 0.15} for kind in KINDS]

# ---------------------------------------------------------------------------------------- meta-loss


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_meta_loss_and_its_gradient(variant):
    """Against the loops, away from the policies that collected: ratios are clipped, the KL is not 0.

    The gradient: finite differences in random directions of each parameter, through embedding and
    inner steps.
    """
    p = make_problem(**variant)
    values = terms(p)
    vector = parameters_to_vector(p.agent.parameters()).detach()
    assert values[0].item() == pytest.approx(plain_loss(p, vector), abs=1e-12)
    assert values[1].item() == pytest.approx(plain_loss(p, vector, kl_weight=0), abs=1e-12)
    kl = (values[0] - values[1]).item() / p.args.kl_weight
    assert values[2].item() == pytest.approx(kl) and values[2] > 1e-4
    params = dict(p.agent.named_parameters())
    clipped = [plain_task(p, params, i)[5].item() for i in range(len(p.tasks))]
    assert values[3].item() == pytest.approx(np.mean(clipped)) and 0 < values[3] < 1
    values[0].backward()
    start, size = 0, 1e-6
    for name, x in p.agent.named_parameters():
        step = torch.zeros_like(vector)
        step[start : start + x.numel()] = torch.randn(x.numel())
        start += x.numel()
        difference = plain_loss(p, vector + size * step) - plain_loss(p, vector - size * step)
        exact = (x.grad.flatten() @ step[step != 0]).item()
        assert exact == pytest.approx(difference / (2 * size), rel=1e-5, abs=1e-8), name
        assert x.grad.abs().max() > 1e-6, name


def test_the_gradient_passes_through_the_embedding():
    """Cut off from it, the network would have none."""
    p = make_problem()
    terms(p, cut=torch.detach)[0].backward()
    assert p.agent.head.weight.grad is None and p.agent.encoder.gru.weight_ih_l0.grad is None
    terms(p)[0].backward()
    assert p.agent.head.weight.grad.norm() > 0 and p.agent.encoder.gru.weight_ih_l0.grad.norm() > 0


def test_the_gradient_passes_through_the_inner_steps(monkeypatch):
    """With constant inner gradients it would be another one."""
    p = make_problem()
    terms(p)[0].backward()
    whole = {name: x.grad.clone() for name, x in p.agent.named_parameters()}
    p.agent.zero_grad()
    inner_step = module.inner_step

    def constant_step(theta, tau, batch, policy, args):
        stepped, dist_params = inner_step(theta, tau, batch, policy, args)
        return {name: x + (stepped[name] - x).detach() for name, x in theta.items()}, dist_params

    monkeypatch.setattr(module, "inner_step", constant_step)
    terms(p)[0].backward()
    for name in ("policy.mean.weight", "head.weight", "encoder.gru.weight_ih_l0"):
        other = p.agent.get_parameter(name).grad
        assert (other - whole[name]).norm() > 0.01 * whole[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_promp_update_is_adam_on_the_meta_loss(kind):
    """Each epoch from the current parameters, embedding included; logged are means over epochs."""
    p, twin = make_problem(kind), make_problem(kind)
    twin.agent.load_state_dict(p.agent.state_dict())
    twin.batches = p.batches
    optimizer, other = adam(p), torch.optim.Adam(twin.agent.parameters(), 0.02)
    args = replace(p.args, update_epochs=3, target_clipfrac=0.3)
    logged = module.promp_update(p.agent, optimizer, p.batches, p.tasks, args)
    expected = []
    for _ in range(3):
        other.zero_grad()
        values = terms(twin)
        values[0].backward()
        other.step()
        expected.append(values.detach())
    for (name, x), y in zip(p.agent.named_parameters(), twin.agent.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    names = ["loss", "pg_loss", "inner_kl", "clipfrac", "learning_rate"]
    assert list(logged) == [f"losses/{name}" for name in names]
    assert list(logged.values())[:4] == pytest.approx((sum(expected) / 3).tolist())
    assert (expected[0] - expected[2]).abs()[:2].min() > 1e-6

    # the step size after it, one that grows and one that shrinks
    (group,) = optimizer.param_groups
    lr = 0.02 * math.exp(0.3 - logged["losses/clipfrac"])
    assert group["lr"].item() == pytest.approx(lr) == logged["losses/learning_rate"]
    for target in (1, 0):
        before = group["lr"].item()
        args = replace(p.args, update_epochs=1, target_clipfrac=target)
        logged = module.promp_update(p.agent, optimizer, p.batches, p.tasks, args)
        lr = min(0.03, before * math.exp(target - logged["losses/clipfrac"]))
        assert group["lr"].item() == pytest.approx(lr) != before

    p.batches[-1]["advantages"] = p.batches[-1]["advantages"] * math.nan
    with pytest.raises(SystemExit, match=r"^error: the meta-gradient is not finite"):
        module.promp_update(p.agent, optimizer, p.batches, p.tasks, args)


def test_without_modulation_it_is_promp():
    """A head of zeros leaves policy, inner steps, loss and gradient in θ as they are without one."""
    p, promp = make_problem("mmaml", move=0), make_problem("promp")
    for x in p.agent.head.parameters():
        x.data.zero_()
    promp.agent.policy, promp.batches = p.agent.policy, p.batches
    results = []
    for q in (p, promp):
        q.agent.zero_grad()
        values = terms(q)
        values[0].backward()
        results.append((values.detach(), [x.grad.clone() for x in q.agent.policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert max(x.abs().max() for x in results[0][1]) > 0.01
    assert len(list(promp.agent.parameters())) == 7  # of the policy


# --------------------------------------------------------------------------- policy and inner steps


def make_policy(obs_size=2, action_size=2, **changes):
    return in_units(
        module.Policy(obs_size, gym.spaces.Box(-1, 1, (action_size,)), make_args(**changes))
    )


def test_modulation_of_the_policy():
    """The formula in both hidden layers, biases included; not in the output layer and the log std."""
    policy, tau, obs = make_policy(), torch.randn(2, 2, 3), torch.randn(7, 2)
    for x in policy.parameters():
        x.data += 0.3 * torch.randn_like(x)
    params, nothing = dict(policy.named_parameters()), torch.zeros(2, 3)
    modulated = plain_policy(params, tau[:, 0], tau[:, 1], obs, 0.3)
    torch.testing.assert_close(policy(obs, tau), modulated)
    plain = policy(obs, torch.zeros_like(tau))
    torch.testing.assert_close(plain, plain_policy(params, nothing, nothing, obs, 0.3))
    assert (policy(obs, tau)[:, 2:] == plain[:, 2:]).all()
    for layer, part, unit in np.ndindex(2, 2, 3):
        one = torch.zeros_like(tau)
        one[layer, part, unit] = 0.5
        assert (policy(obs, one)[:, :2] - plain[:, :2]).abs().min() > 1e-6


def test_initial_policy():
    """Biases of 0, a standard deviation of action_scale x init_std, at least 1e-6 of the scale."""
    policy = make_policy(2, 3, hidden_size=4, action_scale=0.2, init_std=0.5)
    tau = torch.zeros(2, 2, 4)
    mean, log_std = policy(torch.zeros(7, 2), tau).chunk(2, -1)
    assert torch.equal(mean, torch.zeros(7, 3))
    torch.testing.assert_close(log_std.exp(), torch.full((7, 3), 0.1))
    params = dict(policy.named_parameters()) | {"log_std": torch.full((3,), -100.0)}
    narrow = functional_call(policy, params, (torch.zeros(2), tau))[3:].exp()
    torch.testing.assert_close(narrow, torch.full((3,), 0.2e-6))


def test_log_prob_and_kl():
    """Closed forms, sums over the action's dimensions."""
    old, new, actions = torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 3)
    logprobs = module.distribution(old).log_prob(actions)
    torch.testing.assert_close(logprobs, log_density(old, actions))
    kl = torch.distributions.kl_divergence(module.distribution(old), module.distribution(new))
    torch.testing.assert_close(kl, divergence(old, new))


def test_inner_steps_of_many_tasks_are_those_of_each():
    """vmap over tasks, θ and τ of their own, equals a loop; another task's data changes nothing."""
    p = make_problem()
    policy, batch = p.agent.policy, {name: x.clone() for name, x in p.batches[1].items()}
    thetas = {name: x + 0.3 * torch.randn(3, *x.shape) for name, x in policy.named_parameters()}
    tau = torch.randn(3, 2, 2, 3)
    adapted = module.inner_steps(thetas, tau, batch, policy, p.args)
    for i in range(3):
        leaves = {name: x[i].detach().requires_grad_() for name, x in thetas.items()}
        own = of_task(batch, i)
        does = plain_policy(leaves, tau[i, :, 0], tau[i, :, 1], own["obs"], 0.3)
        dist_params = module.inner_step(of_task(thetas, i), tau[i], own, policy, p.args)[1]
        torch.testing.assert_close(dist_params, does)
        valid = own["mask"] == 1
        ratio = (log_density(does, own["actions"]) - own["logprobs"])[valid].exp()
        loss = -(ratio * own["advantages"][valid]).mean()
        gradient = torch.autograd.grad(loss, tuple(leaves.values()))
        for (name, x), g in zip(leaves.items(), gradient, strict=True):
            torch.testing.assert_close(adapted[name][i], x - 0.5 * g)
    batch["advantages"][1] *= -3
    again = module.inner_steps(thetas, tau, batch, policy, p.args)
    for name in adapted:
        assert torch.equal(adapted[name][[0, 2]], again[name][[0, 2]])
        assert not torch.equal(adapted[name][1], again[name][1])


def test_padding_is_without_influence():
    """Garbage after the episodes' ends changes neither embedding nor meta-loss nor its gradient."""
    p, results = make_problem(), []
    for garbage in (0, 1e3):
        for batch in p.batches:
            ended = batch["mask"] == 0
            for name in ("obs", "actions", "rewards", "advantages", "logprobs"):
                batch[name][ended] = garbage
        p.agent.zero_grad()
        values = terms(p)
        values[0].backward()
        results.append([values.detach(), *(x.grad.clone() for x in p.agent.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


def test_tasks_in_chunks(monkeypatch):
    """3 tasks of 3000 steps go two at a time, with the same result."""
    p, sizes, original = make_problem(), [], module.vmap
    steps = {name: x.repeat_interleave(250, 2) for name, x in p.batches[0].items()}
    p.batches = [steps, *p.batches[1:]]
    expected = terms(p).tolist()

    def spy(f, **settings):
        sizes.append(settings["chunk_size"])
        return original(f, **settings)

    monkeypatch.setattr(module, "vmap", spy)
    args = replace(p.args, update_epochs=1)
    logged = module.promp_update(p.agent, adam(p), p.batches, p.tasks, args)
    assert sizes == [2] and list(logged.values())[:4] == pytest.approx(expected)


# ------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize("discrete", [False, True])
def test_embedding(discrete):
    """Against the loop over episodes and steps, whatever is in the padding; each task by itself."""
    agent, batch = make_agent(make_args(), discrete), make_batch()
    if discrete:
        batch["actions"] = torch.randint(3, batch["mask"].shape)
    embedding = agent.encoder(batch)
    params = sub(dict(agent.named_parameters()), "encoder.")
    for i in range(3):
        plain = plain_encoder(params, agent.encoder, of_task(batch, i))
        torch.testing.assert_close(embedding[i], plain)
    for changed in ("rewards", "actions"):
        other = {name: x.clone() for name, x in batch.items()}
        other[changed][1, 0, 0] += 1 if other[changed][1, 0, 0].max() < 2 else -1
        again = agent.encoder(other)
        assert torch.equal(again[[0, 2]], embedding[[0, 2]])
        assert not torch.allclose(again[1], embedding[1])


def test_embedding_reads_every_step_in_order_and_episodes_in_none():
    agent, batch = make_agent(make_args(encoder_size=6)), make_batch()
    read = ("obs", "actions", "rewards")
    batch = {name: x.clone().requires_grad_(name in read) for name, x in batch.items()}
    embedding = agent.encoder(batch)
    shuffled = agent.encoder({name: x[:, [2, 0, 1]] for name, x in batch.items()})
    torch.testing.assert_close(shuffled, embedding)
    swapped = {name: torch.cat([x[:, :, [1, 0]], x[:, :, 2:]], 2) for name, x in batch.items()}
    whole = batch["mask"][:, :1, 1] == 1  # the first episode has more than one step
    assert whole.all() and not torch.allclose(agent.encoder(swapped)[0], embedding[0])
    embedding.square().sum().backward()
    for name in read:
        gradient = batch[name].grad.abs()
        assert (gradient[batch["mask"] == 1] > 0).all() and (
            gradient[batch["mask"] == 0] == 0
        ).all()


def test_extreme_inputs_are_clipped():
    """To ten standard deviations."""
    agent, batch, embeddings = make_agent(make_args()), make_batch(), []
    for x in (9, 11, 13):
        batch["rewards"][0, 0, 0] = agent.encoder.mean[4] + x * agent.encoder.variance[4].sqrt()
        embeddings.append(agent.encoder(batch))
    assert torch.equal(embeddings[1], embeddings[2])
    assert not torch.equal(embeddings[0], embeddings[1])
    agent.encoder.variance[2] = 0  # a number that never varies is left as it is
    assert agent.encoder(batch).isfinite().all()


def test_running_mean_and_variance():
    """Those of all steps, whatever the episodes' lengths, of few batches; of many, the latest's."""
    encoder, batches = module.Encoder(5, 3), [make_batch(n=2 + k, t=3 + k) for k in range(4)]
    rows = []
    for k, batch in enumerate(batches):
        batch["rewards"] = (batch["rewards"] * 3 + k) * batch["mask"]
        encoder.observe(batch)
        inputs = torch.cat([batch["obs"], batch["actions"], batch["rewards"][..., None]], -1)
        rows.append(inputs[batch["mask"] == 1])
        seen = torch.cat(rows)
        torch.testing.assert_close(encoder.mean, seen.mean(0))
        torch.testing.assert_close(encoder.variance, seen.var(0, correction=0))
    for _ in range(200):
        encoder.observe(batches[0])
    torch.testing.assert_close(encoder.mean, rows[0].mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encoder.variance, rows[0].var(0, correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("modulation", ["film", "scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_modulation_of_tasks(kind, modulation):
    """From the episodes, from the mode, or none; before any episode only a known mode has one."""
    args = make_args(kind, modulation=modulation)
    p = SimpleNamespace(args=args, agent=make_agent(args))
    batch, tasks = make_batch(), np.column_stack([np.zeros(3), [1, 0, 1]])
    tau, embeddings = p.agent.modulation(tasks, batch)
    params = dict(p.agent.named_parameters())
    for i in range(3):
        gammas, betas = plain_modulation(p, params, of_task(batch, i), int(tasks[i, -1]))
        torch.testing.assert_close(tau[i], torch.stack([gammas, betas], 1))
    before, _ = p.agent.modulation(tasks)
    assert torch.equal(before, tau) == (kind != "mmaml")
    assert (before == 0).all() == (kind != "oracle")
    assert (tau[:, :, 0] == 0).all() == (kind == "promp")
    assert (tau[:, :, 1] == 0).all() == (kind == "promp" or modulation == "scale")
    assert (embeddings is None) == (kind == "promp")


# -------------------------------------------------------------------- from collection to the update


SMALL = {"meta_batch_size": 3, "episodes_per_task": 3, "horizon": 4, "num_test_tasks": 5}
VARIATIONS = [{}, {"num_inner_steps": 3}, {"modulation": "scale"}]
VARIATIONS += [{"kind": "promp"}, {"kind": "oracle"}]


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("env_id", ["MultimodalNavigation2-v0", "ProbeModes-v0", "ProbeChoices-v0"])
def test_every_phase_is_collected_as_the_loops_say(env_id, changes):
    """The first by θ and, unless a mode is known, no τ; phase k by θ after k steps of its task, and
    one τ. So all ratios are 1 in the first epoch: no loss but -mean A = 0, no KL, nothing clipped.
    """
    args = make_args(**SMALL | {"env_id": env_id} | changes)
    envs, train_tasks, _ = module.make_tasks(args)
    (obs_size,), action_space = envs.single_observation_space.shape, envs.single_action_space
    tasks = module.meta_batch(envs, train_tasks, args, 1)
    p = SimpleNamespace(args=args, tasks=tasks)
    p.agent = in_units(module.Agent(obs_size, action_space, envs.num_modes, args))
    discrete = p.agent.policy.discrete
    assert discrete == (env_id == "ProbeChoices-v0")
    keys = [("train", 1, k) for k in range(args.num_inner_steps + 1)]
    p.batches, used, embeddings = module.adapt(p.agent, tasks, keys, args)
    params = dict(p.agent.named_parameters())
    assert len(p.batches) == len(used) == 1 + changes.get("num_inner_steps", 2)
    for i in range(len(tasks)):
        tau, thetas, found, *_ = plain_task(p, params, i)
        for k, batch in enumerate(p.batches):
            own = valid_steps(of_task(batch, i))
            torch.testing.assert_close(own["dist_params"], found[k])
            logprobs = log_density(found[k], own["actions"], discrete)
            torch.testing.assert_close(own["logprobs"], logprobs)
            for name, x in used[k][0].items():
                torch.testing.assert_close(x[i], thetas[k][name])
        assert (tau[0] == 0).all() == (changes.get("kind") == "promp")
        assert (tau[1] == 0).all() == (changes.get("kind") == "promp" or "modulation" in changes)
        assert not torch.allclose(thetas[0]["mean.weight"], thetas[1]["mean.weight"])
    values = terms(p)
    assert values.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-9)
    weights = torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    p.batches[-1]["advantages"] = p.batches[-1]["advantages"] + weights
    assert terms(p)[1].item() == pytest.approx(-3)  # a task counts as one, whatever its steps
    if p.agent.encoder:  # which has been told the units of these inputs before it was asked
        first = p.batches[0]
        rows = plain_inputs(valid_steps(first))
        torch.testing.assert_close(p.agent.encoder.mean, rows.mean(0))
        torch.testing.assert_close(embeddings, p.agent.modulation(tasks, first)[1])
        before = p.agent.encoder.count.clone()
        module.adapt(p.agent, tasks, keys, args, test=True)
        assert torch.equal(p.agent.encoder.count, before)  # the meta-test changes nothing


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("env_id", ["ProbeModes-v0", "ProbeChoices-v0"])
def test_collect(env_id, test):
    """The actions are those of the task's own policy and modulation, with the key's noise."""
    args = make_args(env_id=env_id, episodes_per_task=4, eval_episodes=2, horizon=3)
    args = replace(args, hidden_size=4, action_scale=0.5, gamma=0.9, gae_lambda=0.8)
    n, e = 3, 2 if test else 4
    envs = module.make_envs(env_id, n * e)
    policy = in_units(module.Policy(2, envs.single_action_space, args))
    discrete = policy.discrete
    theta = {name: x.detach() for name, x in policy.named_parameters()}
    theta = {name: x + 0.5 * torch.randn(n, *x.shape) for name, x in theta.items()}
    tau, tasks = torch.randn(n, 2, 2, 4), np.array([[1, 0], [-1, 1], [1, 0]])
    generator = module.keyed_generator(args, "train", 5)
    module.reset_lanes(envs, tasks.repeat(e, axis=0), generator)
    noise = module.draw_noise(envs.single_action_space, (n, e, 3), generator)
    for mean_actions in (False, True):
        key = ("train", 5)
        batch = module.collect((theta, tau), tasks, key, policy, args, test, mean_actions)
        assert batch["mask"].shape == (n, e, 3)
        for i in range(n):
            x = of_task(batch, i)
            does = plain_policy(of_task(theta, i), tau[i, :, 0], tau[i, :, 1], x["obs"], 0.5)
            actions = actions_from(does, noise[i] * (not mean_actions), discrete)
            taken = x["mask"].long() if discrete else x["mask"][..., None]
            torch.testing.assert_close(x["actions"], actions * taken)
            torch.testing.assert_close(x["dist_params"], does)
            torch.testing.assert_close(x["logprobs"], log_density(does, x["actions"], discrete))
        assert 0 < batch["mask"].mean() < 1
        advantages = module.standardised_advantages(batch, args)
        torch.testing.assert_close(batch["advantages"], advantages)


def test_sparse_rewards_are_what_is_collected():
    """Encoder, baseline and advantages read them; those of training and those of the test."""
    args = make_args(env_id="SparsePointRobot-v0", episodes_per_task=2, eval_episodes=2, horizon=9)
    args = replace(args, action_scale=1.0, train_reward="sparse")
    policy, tasks, tau = (
        in_units(module.Policy(2, BOX, args)),
        np.zeros((2, 2)),
        torch.zeros(2, 2, 2, 3),
    )
    theta = {name: x.detach().expand(2, *x.shape) for name, x in policy.named_parameters()}
    for test in (False, True):
        if test:
            args = replace(args, train_reward="dense", test_reward="sparse")
        key, other = ("train", 1), replace(args, train_reward="dense", test_reward="dense")
        batch = module.collect((theta, tau), tasks, key, policy, args, test)
        dense = module.collect((theta, tau), tasks, key, policy, other, test)
        assert torch.equal(batch["rewards"], dense["sparse_rewards"])
        assert (batch["rewards"] > 0).any() and (batch["rewards"] != dense["rewards"]).any()
        assert not torch.allclose(batch["advantages"], dense["advantages"])


@pytest.mark.parametrize("kind", KINDS)
def test_main_is_these_functions_in_turn(train, kind):
    """Its first two iterations, and the step sizes of θ and of the network."""
    train(**KINDS[kind], total_timesteps=1000, num_inner_steps=2, update_epochs=2)
    (path,) = Path("runs").glob("*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    args = module.Args(**saved["args"])
    torch.manual_seed(args.seed)
    agent = module.Agent(2, Modes.action_space, 2, args)
    parts = [(agent if kind != "mmaml" else agent.policy, 1e-2)]
    if kind == "mmaml":
        parts.append((torch.nn.ModuleList([agent.encoder, agent.head]), 5e-4))
    groups = [{"params": [*part.parameters()], "lr": lr, "max_lr": lr} for part, lr in parts]
    optimizer = module.adam(groups, 1e-2, args)
    envs, train_tasks, _ = module.make_tasks(args)
    for iteration in (1, 2):
        tasks = module.meta_batch(envs, train_tasks, args, iteration)
        keys = [("train", iteration, k) for k in range(3)]
        batches, _, _ = module.adapt(agent, tasks, keys, args)
        if iteration == 1:
            agent.policy.units.measure(batches[0]["obs"], batches[0]["mask"])
    module.promp_update(agent, optimizer, batches, tasks, args)
    for name, x in agent.state_dict().items():
        assert torch.equal(saved["agent"][name], x), name
    groups = optimizer.state_dict()["param_groups"]
    assert saved["optimizer"]["param_groups"] == groups
    by_size = {group["max_lr"]: len(group["params"]) for group in groups}
    others = len(list(agent.parameters())) - 7  # θ: weights and biases of three layers, and log std
    expected = {"mmaml": {1e-2: 7, 5e-4: others}, "promp": {1e-2: 7}, "oracle": {1e-2: 9}}
    assert by_size == expected[kind] and (others > 2) == (kind == "mmaml")


# ---------------------------------------------------------------------------------------- meta-test


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_test(kind, deterministic):
    """Phase by phase as in training, with the embedding of the first episodes throughout, group by
    group of tasks, the last of which wraps around.
    """
    args = make_args(kind, env_id="ProbeModes-v0", meta_batch_size=4, horizon=3, seed=3)
    args = replace(args, eval_episodes=3, deterministic_eval=deterministic)
    agent = in_units(module.Agent(2, Modes.action_space, 2, args))
    for x in agent.parameters():
        x.data += 0.4 * torch.randn_like(x)
    tasks = np.column_stack([1 - 2 * (np.arange(7) % 2), np.arange(7) % 2])
    scores, episodes = module.evaluate(agent, tasks, 2, args)
    found, returns, means = [], np.zeros((3, 8)), np.zeros((3, 8))
    for first in (0, 4):
        group = tasks[[0, 1, 2, 3] if first == 0 else [4, 5, 6, 0]]
        theta = {name: x.expand(4, *x.shape) for name, x in agent.policy.named_parameters()}
        tau, _ = agent.modulation(group)
        for k in range(3):
            key = ("eval", first, k)
            batch = module.collect((theta, tau), group, key, agent.policy, args, test=True)
            extra = module.collect((theta, tau), group, key, agent.policy, args, True, True)
            returns[k, first : first + 4] = batch["rewards"].sum(-1).mean(1)
            means[k, first : first + 4] = extra["rewards"].sum(-1).mean(1)
            theta = module.inner_steps(theta, tau, batch, agent.policy, args)
            if k == 0:
                tau, embeddings = agent.modulation(group, batch)
                found.append(embeddings)
            if first == 0:
                assert torch.equal(episodes[f"obs_{k}"], batch["obs"])
    np.testing.assert_allclose(scores["return"], (means if deterministic else returns)[:, :7])
    if deterministic:
        np.testing.assert_allclose(scores["sampled_return"], returns[:, :7])
        assert not np.allclose(means, returns)
    modes = {"return_mode_0", "return_mode_1"} | ({"mode_accuracy"} if kind == "mmaml" else set())
    plain = {"return"} | ({"sampled_return"} if deterministic else set())
    assert scores.keys() == plain | modes
    assert module.evaluate(agent, tasks, 0, args)[0].keys() == plain
    assert ("embedding" in episodes) == (kind == "mmaml")
    if kind == "mmaml":
        expected = torch.cat(found)[:7].detach().T
        torch.testing.assert_close(episodes["embedding"], expected)


def test_report_of_modes(capsys):
    """Returns of each mode, and the share of tasks whose nearest neighbour is of their mode, itself
    left out.
    """
    tasks = np.array([[0, 0.0], [1, 0], [0, 1], [1, 1], [2, 1]])
    rows = [[0, 0.1, 0.3, 5, 5.2], [0, 0, 0, 1, 1]]  # the third is nearest to the second
    returns, embedding = np.array([[1.0, 2, 3, 4, 5], [2, 4, 6, 8, 10]]), torch.tensor(rows)
    scores = {"return": returns} | module.mode_scores(returns, embedding, tasks, 2)
    metrics = module.report(scores, tasks, make_args(eval_episodes=10), {})
    assert metrics["eval/mode_accuracy"] == pytest.approx(0.8)
    assert metrics["eval/return_after_10_episodes"] == pytest.approx(6)
    assert metrics["eval/return_mode_0_after_10_episodes"] == pytest.approx(3)
    assert metrics["eval/return_mode_1_after_0_episodes"] == pytest.approx(4)
    output = capsys.readouterr().out
    assert "return_mode_1 on 3 held-out tasks, mean:" in output
    assert "mode_accuracy: 0.800 ± 0.555" in output
    names = {"return_mode_0", "return_mode_1"}
    assert module.mode_scores(returns, None, tasks, 2).keys() == names
    assert module.mode_scores(returns, None, tasks, 3).keys() == names  # no task has the third
    assert module.mode_scores(returns[:, :1], embedding[:, :1], tasks[:1], 2).keys() == {
        "return_mode_0"
    }
    assert np.isnan(scores["return_mode_0"][:, 2:]).all()


@pytest.fixture
def train(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own; returns its metrics."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    probe = {"env_id": "ProbeModes-v0", "meta_batch_size": 12, "episodes_per_task": 10}
    probe |= {"hidden_size": 16, "encoder_size": 16, "action_scale": 1.0, "learning_rate": 0.01}
    probe |= {"num_test_tasks": 30, "num_inner_steps": 1, "num_eval_steps": 1, "eval_every": 1000}
    probe |= {"total_timesteps": 12_000, "num_threads": 1}
    return lambda **changes: module.main(module.Args(**probe | changes))


def test_what_evaluate_writes(train, tmp_path):
    """The numbers of the table by task, and what a figure of the embeddings needs."""
    trained = train(total_timesteps=1)
    (folder,) = (tmp_path / "runs").iterdir()
    metrics = module.main(module.parse(module.Args, ["--evaluate", str(folder)]))
    assert metrics == {tag: x for tag, x in trained.items() if tag.startswith("eval/")}
    with np.load(folder / "evaluation.npz") as file:
        saved = dict(file)
    assert saved["tasks"].shape == (30, 2) and saved["embedding"].shape == (16, 30)
    np.testing.assert_allclose(np.linalg.norm(saved["embedding"], axis=0), 1, rtol=1e-2)
    modes = saved["tasks"][:, 1]
    for mode in (0, 1):
        returns = saved[f"return_mode_{mode}"]
        assert (np.isnan(returns[0]) == (modes != mode)).all()
        of_mode = saved["return"][:, modes == mode]
        np.testing.assert_array_equal(returns[:, modes == mode], of_mode)
    gaps = np.linalg.norm(saved["embedding"][:, :, None] - saved["embedding"][:, None], axis=0)
    np.fill_diagonal(gaps, np.inf)
    assert (saved["mode_accuracy"] == (modes[gaps.argmin(1)] == modes)).all()
    argv = ["--evaluate", str(folder), "--eval-episodes", "3"]
    few = module.main(module.parse(module.Args, argv))
    assert {"eval/return_after_3_episodes", "eval/mode_accuracy"} <= few.keys()
    none = module.main(module.parse(module.Args, [*argv, "--num-eval-steps", "0"]))
    assert "eval/mode_accuracy" in none  # it embeds all the same
    assert "eval/return_after_3_episodes" not in none


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (KINDS["promp"] | KINDS["oracle"], "--no-modulation and --oracle-mode exclude each other"),
        (
            KINDS["oracle"] | {"env_id": "PointRobot-v0"},
            "--oracle-mode: PointRobot-v0 is no family with modes",
        ),
    ],
)
def test_what_cannot_be(train, tmp_path, flags, line):
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        train(**flags)
    assert not (tmp_path / "runs").exists()


def test_modes_out_of_range(train, tmp_path, monkeypatch):
    line = "ProbeOneMode-v0: the last number of a task must be its mode, 0 to 0"
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        train(oracle_mode=True, env_id="ProbeOneMode-v0")
    sample = OneMode.sample_tasks
    monkeypatch.setattr(
        OneMode, "sample_test_tasks", lambda env, n: 0 * sample(env, n), raising=False
    )
    module.make_envs.cache_clear()
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        train(oracle_mode=True, env_id="ProbeOneMode-v0", num_train_tasks=4)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------- probes

WITHOUT_STEPS = {"inner_lr": 1e-9}


@pytest.mark.parametrize(
    ("settings", "before"),
    [
        ({}, 0),
        ({"modulation": "scale"}, 0),
        ({"no_modulation": True}, 0),
        (WITHOUT_STEPS, 0),
        (WITHOUT_STEPS | {"oracle_mode": True}, 1),
    ],
    ids=str,
)
def test_probe_is_learned(train, settings, before):
    """Of 1 at most: by gradient steps, by modulation alone, at once if the mode is known."""
    scores = train(**{"inner_lr": 0.3} | settings)
    assert 0.8 < scores["eval/return_after_10_episodes"] <= 1
    assert scores["eval/return_after_0_episodes"] == pytest.approx(before, abs=0.2)
    if settings == WITHOUT_STEPS:
        assert scores["eval/mode_accuracy"] > 0.9


BY_STEPS = {"no_modulation": True, "inner_lr": 1.0}
BY_MODULATION = WITHOUT_STEPS | {"modulation_learning_rate": 3e-3, "total_timesteps": 20_000}


@pytest.mark.parametrize("settings", [BY_STEPS, BY_MODULATION], ids=str)
def test_choices_are_learned(train, settings):
    """Of Discrete actions: by gradient steps alone, and by modulation alone."""
    scores = train(env_id="ProbeChoices-v0", num_test_tasks=15, **settings)
    assert scores["eval/return_after_0_episodes"] == pytest.approx(1 / 3, abs=0.15)
    assert 0.8 < scores["eval/return_after_10_episodes"] <= 1


def test_probe_is_not_learned_without_adaptation(train):
    """Neither steps nor modulation: no policy that does the same in all tasks does better than 0."""
    scores = train(no_modulation=True, **WITHOUT_STEPS)
    assert scores["eval/return_after_10_episodes"] == pytest.approx(0, abs=0.15)
