"""mmaml.py: its mathematics against plain loops and finite differences, and task families that train in seconds."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import functional_call, vmap
from torch.nn.utils import parameters_to_vector

import mmaml as module

# -------------------------------------------------------------------------------------------- the task family of probes


class Modes(gym.Env):
    """The observation says nothing about the task, ±1, whose mode is 0 or 1. Episodes have one to three steps, their
    return is the steps' mean of task times action: 0 without adaptation, at best 1.
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


gym.register("ProbeModes-v0", Modes, max_episode_steps=3)

# ------------------------------------------------------------------------------- the same algorithm once more, in loops


def log_density(dist, actions):
    """log π(a|o), written out."""
    mean, log_std = dist.chunk(2, -1)
    return (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence(old, new):
    """KL(old || new), written out."""
    (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
    variances = (2 * log_std).exp() + (mean - new_mean) ** 2
    return (new_log_std - log_std + variances / (2 * (2 * new_log_std).exp()) - 0.5).sum(-1)


def of_task(batch, i):
    return {name: x[i] for name, x in batch.items()}


def valid_steps(batch):
    """The steps that count, without the padding: (steps, ...)."""
    return {name: x[batch["mask"] == 1] for name, x in batch.items()}


def plain_policy(params, gammas, betas, obs, action_scale):
    """h = tanh((W x + b) (1 + γ) + β) in both layers, then mean and log std in units of action_scale."""
    x = obs
    for layer in range(2):
        weight, bias = params[f"hidden.{layer}.weight"], params[f"hidden.{layer}.bias"]
        x = torch.tanh((x @ weight.T + bias) * (1 + gammas[layer]) + betas[layer])
    mean = x @ params["mean.weight"].T + params["mean.bias"]
    return torch.cat([action_scale * mean, (math.log(action_scale) + params["log_std"]).expand_as(mean)], -1)


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


def plain_encoder(params, encoder, batch):
    """The embedding of one task, batch (E, T, ...): episode by episode, each up to its end."""

    def layers(name, x):
        x = torch.relu(params[f"{name}.0.weight"] @ x + params[f"{name}.0.bias"])
        return params[f"{name}.2.weight"] @ x + params[f"{name}.2.bias"]

    embeddings = []
    for e in range(len(batch["mask"])):
        episode = valid_steps(of_task(batch, e))
        inputs = torch.cat([episode["obs"], episode["actions"], episode["rewards"][:, None]], 1)
        unit = [x**0.5 if x > 1e-6 else 1.0 for x in encoder.variance.tolist()]
        embeddings.append(layers("of_episode", plain_gru(params, (inputs - encoder.mean) / torch.tensor(unit))))
    embedding = layers("of_task", sum(embeddings) / len(embeddings))
    centred = embedding - embedding.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt()


def sub(params, prefix):
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def plain_modulation(agent, params, batch, mode):
    """γ and β of one task, each (2, H)."""
    shape = 2, agent.hidden_size
    if agent.encoder is None and not agent.num_modes:
        return torch.zeros(shape), torch.zeros(shape)
    if agent.encoder is None:
        embedding = torch.eye(agent.num_modes)[mode] * agent.num_modes**0.5
    else:
        embedding = plain_encoder(sub(params, "encoder."), agent.encoder, batch)
    embedding = embedding / len(embedding) ** 0.5
    out = (params["head.weight"] @ embedding + params["head.bias"]).view(2, agent.parts, agent.hidden_size)
    return out[:, 0], out[:, 1] if agent.parts == 2 else torch.zeros(shape)


def plain_task(p, params, i):
    """What happens to task i: its τ, the θ of every phase, what they do, and its clipped surrogate and mean KL."""
    agent, theta = p.agent, sub(params, "policy.")
    tau = plain_modulation(agent, params, of_task(p.batches[0], i), int(p.tasks[i, -1]))
    thetas, dists, kls = [theta], [], []
    for k, batch in enumerate(p.batches):
        batch = valid_steps(of_task(batch, i))
        leaves = {name: x.detach().requires_grad_() for name, x in theta.items()}
        used = tau if k or p.known else (torch.zeros_like(tau[0]), torch.zeros_like(tau[1]))
        dist = plain_policy(leaves, *(x.detach() for x in used), batch["obs"], agent.policy.action_scale)
        ratio = (log_density(dist, batch["actions"]) - log_density(batch["dist"], batch["actions"])).exp()
        dists.append(dist.detach())
        if k == len(p.batches) - 1:
            clipped = ratio.clamp(1 - p.clip, 1 + p.clip)
            surrogate = -torch.minimum(ratio * batch["advantages"], clipped * batch["advantages"]).mean()
            clipfrac, kl = (ratio != clipped).double().mean(), sum(kls) / max(1, len(kls))
            return tau, thetas, dists, surrogate.detach(), kl, clipfrac
        kls.append(divergence(batch["dist"], dist.detach()).mean())
        loss = -(ratio * batch["advantages"]).mean()
        gradient = torch.autograd.grad(loss, tuple(leaves.values()))
        theta = {name: x - p.lr * g for (name, x), g in zip(theta.items(), gradient, strict=True)}
        thetas.append(theta)


def plain_loss(p, vector, kl_weight=None):
    """The meta-loss as a function of all meta-parameters (P,), a number."""
    names, shapes = zip(*((name, x.shape) for name, x in p.agent.named_parameters()), strict=True)
    pieces = vector.split([math.prod(shape) for shape in shapes])
    params = {name: x.view(shape) for name, x, shape in zip(names, pieces, shapes, strict=True)}
    parts = [plain_task(p, params, i)[3:5] for i in range(p.n)]
    weight = p.kl_weight if kl_weight is None else kl_weight
    return sum(surrogate + weight * kl for surrogate, kl in parts).item() / p.n


# -------------------------------------------------------------------------------------------------------- the test data


@pytest.fixture(autouse=True)
def settings():
    """Double precision and fixed draws; leaves nothing set."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch.use_deterministic_algorithms(False)


def ragged_mask(n, e, t):
    """Episodes of 1 to t steps, the first of every task the longest."""
    lengths = 1 + torch.arange(n * e).view(n, e) % t
    lengths[:, 0] = t
    return (torch.arange(t) < lengths[..., None]).double()


def make_batch(n=3, e=3, t=4):
    """Random episodes, with zeros after their ends as those of rollout; dist and logprobs are still to come."""
    mask = ragged_mask(n, e, t)
    batch = {"obs": torch.randn(n, e, t, 2) * mask[..., None], "actions": torch.randn(n, e, t, 2) * mask[..., None]}
    return batch | {"rewards": torch.randn(n, e, t) * mask, "advantages": torch.randn(n, e, t) * mask, "mask": mask}


def make_agent(kind="mmaml", film=True, hidden_size=3, encoder_size=5):
    """A small agent with nothing at 0, its inputs' units included."""
    policy = module.Policy(2, 2, hidden_size, 0.3)
    encoder = module.Encoder(5, encoder_size) if kind == "mmaml" else None
    agent = module.Agent(policy, encoder, 2 if kind == "oracle" else 0, film)
    for p in agent.parameters():
        p.data += 0.4 * torch.randn_like(p)
    if encoder:
        encoder.mean, encoder.variance = torch.randn(5), 0.5 + torch.rand(5)
    return agent


def make_problem(kind="mmaml", num_steps=2, film=True, n=3, move=0.02, clip=0.1, kl_weight=0.5, lr=0.5):
    """An agent, and the batches that it collects in n tasks; after that, all its parameters move a bit."""
    agent = make_agent(kind, film)
    tasks = np.column_stack([np.zeros(n), np.arange(n) % 2])
    p = SimpleNamespace(agent=agent, tasks=tasks, n=n, clip=clip, kl_weight=kl_weight, lr=lr, batches=[])
    p.known = kind != "mmaml"
    params = dict(agent.named_parameters())
    for k in range(num_steps + 1):  # what the policies of phase k do is known from the batches before
        batch = make_batch(n)
        p.batches.append(batch | {"dist": torch.zeros(n, 3, 4, 4)})
        for i in range(n):
            dists = plain_task(p, params, i)[2]
            p.batches[k]["dist"][i][batch["mask"][i] == 1] = dists[k]
        mean, log_std = p.batches[k]["dist"].chunk(2, -1)
        p.batches[k]["actions"] = (mean + log_std.exp() * torch.randn_like(mean)) * batch["mask"][..., None]
        p.batches[k]["logprobs"] = log_density(p.batches[k]["dist"], p.batches[k]["actions"])
    for x in agent.parameters():
        x.data += move * torch.randn_like(x)
    p.loss = partial(module.promp_loss, lr=lr, clip_coef=clip, kl_weight=kl_weight, policy=agent.policy)
    return p


def terms(p):
    """The meta-loss and its parts (4,), means over the tasks."""
    losses = vmap(partial(p.loss, modulate_first=p.known), in_dims=(None, 0, 0))
    tau, _ = p.agent.modulation(p.tasks, p.batches[0])
    return torch.stack([x.mean() for x in losses(dict(p.agent.policy.named_parameters()), tau, p.batches)])


def adam(p):
    return torch.optim.Adam([{"params": p.agent.parameters(), "lr": 0.02, "max_lr": 0.03}])


VARIANTS = [{"kind": kind, "num_steps": k} for kind in ("mmaml", "promp", "oracle") for k in (1, 2)]
VARIANTS += [{"film": False}, {"num_steps": 3}, {"kind": "oracle", "film": False}]

# ------------------------------------------------------------------------------------------------------------ meta-loss


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_meta_loss_and_its_gradient(variant):
    """Against the loops, away from the policies that collected, so that ratios are clipped and the KL is not 0.

    The gradient: finite differences in random directions of each parameter, through embedding and inner steps.
    """
    p = make_problem(**variant)
    values = terms(p)
    vector = parameters_to_vector(p.agent.parameters()).detach()
    assert values[0].item() == pytest.approx(plain_loss(p, vector), abs=1e-12)
    assert values[1].item() == pytest.approx(plain_loss(p, vector, kl_weight=0), abs=1e-12)
    assert values[2].item() == pytest.approx((values[0] - values[1]).item() / p.kl_weight) and values[2] > 1e-4
    clipped = [plain_task(p, dict(p.agent.named_parameters()), i)[5].item() for i in range(p.n)]
    assert values[3].item() == pytest.approx(np.mean(clipped)) and 0 < values[3] < 1
    values[0].backward()
    start, size = 0, 1e-6
    for name, x in p.agent.named_parameters():
        direction = torch.zeros_like(vector)
        direction[start : start + x.numel()] = torch.randn(x.numel())
        start += x.numel()
        numeric = (plain_loss(p, vector + size * direction) - plain_loss(p, vector - size * direction)) / (2 * size)
        exact = (x.grad.flatten() @ direction[direction != 0]).item()
        assert exact == pytest.approx(numeric, rel=1e-5, abs=1e-8), name
        assert x.grad.abs().max() > 1e-6, name


@pytest.mark.parametrize("where", ["embedding", "inner steps"])
def test_the_gradient_passes_through(where, monkeypatch):
    """Cut off from the embedding, or with constant inner gradients, it would be another one."""
    p = make_problem()
    terms(p)[0].backward()
    whole = {name: x.grad.clone() for name, x in p.agent.named_parameters()}
    p.agent.zero_grad()
    if where == "embedding":
        modulation = p.agent.modulation
        monkeypatch.setattr(p.agent, "modulation", lambda *args: [x.detach() for x in modulation(*args)])
    else:
        monkeypatch.setattr(
            module,
            "grad",
            lambda f, has_aux: (
                lambda x: (lambda gradient, aux: ({name: g.detach() for name, g in gradient.items()}, aux))(
                    *torch.func.grad(f, has_aux=True)(x)
                )
            ),
        )
    terms(p)[0].backward()
    assert (p.agent.head.weight.grad is None) == (where == "embedding")
    if where == "inner steps":
        for name in ("policy.mean.weight", "head.weight", "encoder.gru.weight_ih_l0"):
            other = p.agent.get_parameter(name).grad
            assert (other - whole[name]).norm() > 0.01 * whole[name].norm(), name


@pytest.mark.parametrize("kind", ["mmaml", "promp", "oracle"])
def test_promp_update_is_adam_on_the_meta_loss(kind):
    """Each epoch from the current parameters, embedding included; what is logged is the mean over the epochs."""
    p, twin = make_problem(kind), make_problem(kind)
    twin.agent.load_state_dict(p.agent.state_dict())
    twin.batches = p.batches
    optimizers = [adam(q) for q in (p, twin)]
    logged = module.promp_update(p.agent, optimizers[0], p.batches, p.tasks, 3, 0.3, p.loss)
    expected = []
    for _ in range(3):
        optimizers[1].zero_grad()
        values = terms(twin)
        values[0].backward()
        optimizers[1].step()
        expected.append(values.detach())
    for (name, x), y in zip(p.agent.named_parameters(), twin.agent.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    names = ("losses/loss", "losses/pg_loss", "losses/inner_kl", "losses/clipfrac", "losses/learning_rate")
    assert list(logged) == list(names) and list(logged.values())[:4] == pytest.approx((sum(expected) / 3).tolist())
    assert (expected[0] - expected[2]).abs()[:2].min() > 1e-6

    # the step size after it, one that grows and one that shrinks
    step_size = 0.02 * math.exp(0.3 - logged["losses/clipfrac"])
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(step_size) == logged["losses/learning_rate"]
    for target in (1, 0):
        before = optimizers[0].param_groups[0]["lr"]
        clipfrac = module.promp_update(p.agent, optimizers[0], p.batches, p.tasks, 1, target, p.loss)["losses/clipfrac"]
        step_size = min(0.03, before * math.exp(target - clipfrac))
        assert optimizers[0].param_groups[0]["lr"] == pytest.approx(step_size) != before

    p.batches[-1]["advantages"] = p.batches[-1]["advantages"] * math.nan
    with pytest.raises(SystemExit, match=r"^error: the meta-gradient is not finite"):
        module.promp_update(p.agent, optimizers[0], p.batches, p.tasks, 1, 0.1, p.loss)


def test_without_modulation_it_is_promp():
    """A head of zeros leaves policy, inner steps, loss and the gradient in θ as they are without one."""
    p = make_problem("mmaml", move=0)
    for x in p.agent.head.parameters():
        x.data.zero_()
    promp = SimpleNamespace(**vars(p) | {"agent": module.Agent(p.agent.policy, None, 0, True), "known": True})
    results = []
    for q in (p, promp):
        q.agent.zero_grad()
        values = terms(q)
        values[0].backward()
        results.append((values.detach(), [x.grad.clone() for x in q.agent.policy.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
    assert max(x.abs().max() for x in results[0][1]) > 0.01
    assert len(list(promp.agent.parameters())) == 7  # of the policy


# ---------------------------------------------------------------------------------------------- policy and inner steps


def test_modulation_of_the_policy():
    """The formula in both hidden layers, biases included; not in the output layer and the standard deviation."""
    policy, tau, obs = module.Policy(2, 2, 3, 0.3), torch.randn(2, 2, 3), torch.randn(7, 2)
    for p in policy.parameters():
        p.data += 0.3 * torch.randn_like(p)
    params = dict(policy.named_parameters())
    torch.testing.assert_close(policy(obs, tau), plain_policy(params, tau[:, 0], tau[:, 1], obs, 0.3))
    plain = policy(obs, torch.zeros_like(tau))
    torch.testing.assert_close(plain, plain_policy(params, torch.zeros(2, 3), torch.zeros(2, 3), obs, 0.3))
    assert (policy(obs, tau)[:, 2:] == plain[:, 2:]).all()
    for layer, part, unit in np.ndindex(2, 2, 3):
        one = torch.zeros_like(tau)
        one[layer, part, unit] = 0.5
        assert (policy(obs, one)[:, :2] - plain[:, :2]).abs().min() > 1e-6


def test_initial_policy():
    """Biases of 0, a standard deviation of action_scale x init_std that cannot fall below 1e-6 of the scale."""
    policy, tau = module.Policy(2, 3, 4, action_scale=0.2, init_std=0.5), torch.zeros(2, 2, 4)
    mean, log_std = policy(torch.zeros(7, 2), tau).chunk(2, -1)
    assert torch.equal(mean, torch.zeros(7, 3))
    torch.testing.assert_close(log_std.exp(), torch.full((7, 3), 0.1))
    params = dict(policy.named_parameters()) | {"log_std": torch.full((3,), -100.0)}
    narrow = functional_call(policy, params, (torch.zeros(2), tau))[3:].exp()
    torch.testing.assert_close(narrow, torch.full((3,), 0.2e-6))


def test_log_prob_and_kl():
    """Closed forms, sums over the action's dimensions."""
    old, new, actions = torch.randn(5, 6), torch.randn(5, 6), torch.randn(5, 3)
    torch.testing.assert_close(module.Policy.distribution(old).log_prob(actions), log_density(old, actions))
    kl = torch.distributions.kl_divergence(module.Policy.distribution(old), module.Policy.distribution(new))
    torch.testing.assert_close(kl, divergence(old, new))


def test_inner_steps_of_many_tasks_are_those_of_each():
    """vmap over tasks with parameters and τ of their own equals a loop; another task's data changes nothing."""
    p = make_problem()
    policy, batch = p.agent.policy, {name: x.clone() for name, x in p.batches[1].items()}
    params = {name: x + 0.3 * torch.randn(3, *x.shape) for name, x in policy.named_parameters()}
    tau, step = torch.randn(3, 2, 2, 3), vmap(partial(module.inner_step, lr=0.5, policy=policy))
    adapted, dist = step(params, tau, batch)
    for i in range(3):
        leaves = {name: x[i].detach().requires_grad_() for name, x in params.items()}
        own = of_task(batch, i)
        does = plain_policy(leaves, tau[i, :, 0], tau[i, :, 1], own["obs"], 0.3)
        torch.testing.assert_close(dist[i], does)
        valid = own["mask"] == 1
        ratio = (log_density(does, own["actions"]) - own["logprobs"])[valid].exp()
        gradient = torch.autograd.grad(-(ratio * own["advantages"][valid]).mean(), tuple(leaves.values()))
        for (name, x), g in zip(leaves.items(), gradient, strict=True):
            torch.testing.assert_close(adapted[name][i], x - 0.5 * g)
    batch["advantages"][1] *= -3
    again, _ = step(params, tau, batch)
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
    logged = module.promp_update(p.agent, adam(p), p.batches, p.tasks, 1, 0.1, p.loss)
    assert sizes == [2] and list(logged.values())[:4] == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------------------- encoder


def test_embedding():
    """Against the loop over episodes and steps, whatever is in the padding; each task by itself."""
    agent, batch = make_agent(), make_batch()
    embedding = agent.encoder(batch)
    params = sub(dict(agent.named_parameters()), "encoder.")
    for i in range(3):
        torch.testing.assert_close(embedding[i], plain_encoder(params, agent.encoder, of_task(batch, i)))
    batch["rewards"][1, 0, 0] += 1
    again = agent.encoder(batch)
    assert torch.equal(again[[0, 2]], embedding[[0, 2]]) and not torch.allclose(again[1], embedding[1])


def test_embedding_reads_every_step_in_order_and_episodes_in_none():
    agent, batch = make_agent(encoder_size=6), make_batch()
    batch = {name: x.clone().requires_grad_(name in ("obs", "actions", "rewards")) for name, x in batch.items()}
    embedding = agent.encoder(batch)
    shuffled = agent.encoder({name: x[:, [2, 0, 1]] for name, x in batch.items()})
    torch.testing.assert_close(shuffled, embedding)
    swapped = {name: torch.cat([x[:, :, [1, 0]], x[:, :, 2:]], 2) for name, x in batch.items()}
    whole = batch["mask"][:, :1, 1] == 1  # the first episode has more than one step
    assert whole.all() and not torch.allclose(agent.encoder(swapped)[0], embedding[0])
    embedding.square().sum().backward()
    for name in ("obs", "actions", "rewards"):
        gradient = batch[name].grad.abs() if batch[name].ndim == 3 else batch[name].grad.abs().amin(-1)
        assert (gradient[batch["mask"] == 1] > 0).all() and (gradient[batch["mask"] == 0] == 0).all()


def test_extreme_inputs_are_clipped():
    """To ten standard deviations."""
    agent, batch, embeddings = make_agent(), make_batch(), []
    for x in (9, 11, 13):
        batch["rewards"][0, 0, 0] = agent.encoder.mean[4] + x * agent.encoder.variance[4].sqrt()
        embeddings.append(agent.encoder(batch))
    assert torch.equal(embeddings[1], embeddings[2]) and not torch.equal(embeddings[0], embeddings[1])
    agent.encoder.variance[2] = 0  # a number that never varies is left as it is
    assert agent.encoder(batch).isfinite().all()


def test_running_mean_and_variance():
    """Those of all steps, of whatever length the episodes are, as long as there are few batches; then of the latest."""
    encoder, batches = module.Encoder(5, 3), [make_batch(n=2 + k, t=3 + k) for k in range(4)]
    rows = []
    for k, batch in enumerate(batches):
        batch["rewards"] = (batch["rewards"] * 3 + k) * batch["mask"]
        encoder.observe(batch)
        rows.append(torch.cat([batch["obs"], batch["actions"], batch["rewards"][..., None]], -1)[batch["mask"] == 1])
        seen = torch.cat(rows)
        torch.testing.assert_close(encoder.mean, seen.mean(0))
        torch.testing.assert_close(encoder.variance, seen.var(0, correction=0))
    for _ in range(200):
        encoder.observe(batches[0])
    torch.testing.assert_close(encoder.mean, rows[0].mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encoder.variance, rows[0].var(0, correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("film", [True, False])
@pytest.mark.parametrize("kind", ["mmaml", "promp", "oracle"])
def test_modulation_of_tasks(kind, film):
    """From the episodes, from the mode, or none; before any episode only a known mode has one."""
    agent, batch = make_agent(kind, film), make_batch()
    tasks = np.column_stack([np.zeros(3), [1, 0, 1]])
    tau, embedding = agent.modulation(tasks, batch)
    params = dict(agent.named_parameters())
    for i in range(3):
        gammas, betas = plain_modulation(agent, params, of_task(batch, i), int(tasks[i, -1]))
        torch.testing.assert_close(tau[i], torch.stack([gammas, betas], 1))
    before, _ = agent.modulation(tasks)
    assert torch.equal(before, tau) == (kind != "mmaml") and (before == 0).all() == (kind != "oracle")
    assert (tau[:, :, 0] == 0).all() == (kind == "promp") and (tau[:, :, 1] == 0).all() == (kind == "promp" or not film)
    assert (embedding is None) == (kind == "promp")


# -------------------------------------------------------------------------------------- from collection to the update


def run_to_the_first_update(monkeypatch, tmp_path, **changes):
    """main up to its first update; returns what that is given, as a problem, and the run's settings."""
    monkeypatch.chdir(tmp_path)
    settings = {"meta_batch_size": 3, "episodes_per_task": 3, "horizon": 4, "num_test_tasks": 5, "num_threads": 1}
    settings |= {"hidden_size": 3, "encoder_size": 3, "clip_coef": 0.2, "kl_weight": 0.5, "inner_lr": 0.5}
    settings |= {"update_epochs": 7, "target_clipfrac": 0.4}
    args = module.Args(**settings | changes)

    def stop(agent, optimizer, batches, tasks, epochs, target_clipfrac, loss):
        p = SimpleNamespace(agent=agent, batches=batches, tasks=tasks, n=len(tasks), loss=loss, lr=0.5, clip=0.2)
        p.groups = optimizer.param_groups
        assert (epochs, target_clipfrac, loss.keywords["clip_coef"], loss.keywords["kl_weight"]) == (7, 0.4, 0.2, 0.5)
        raise KeyboardInterrupt(p)

    monkeypatch.setattr(module, "promp_update", stop)
    with pytest.raises(KeyboardInterrupt) as end:
        module.main(args)
    p = end.value.args[0]
    p.known, p.kl_weight = p.agent.encoder is None, 0.5
    return p


KINDS = [{}, {"num_inner_steps": 3}, {"modulation": "scale"}, {"no_modulation": True}, {"oracle_mode": True}]


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("env_id", ["MultimodalNavigation2-v0", "ProbeModes-v0"])
def test_every_phase_is_collected_as_the_loops_say(monkeypatch, tmp_path, env_id, changes):
    """The first by θ and, unless a mode is known, no τ; phase k by θ after k steps of its task, and one τ.

    So all ratios are 1 in the first epoch: no loss but -mean A = 0, no KL, nothing clipped.
    """
    p = run_to_the_first_update(monkeypatch, tmp_path, env_id=env_id, **changes)
    params = dict(p.agent.named_parameters())
    assert len(p.batches) == 1 + changes.get("num_inner_steps", 2)
    for i in range(p.n):
        tau, thetas, dists, *_ = plain_task(p, params, i)
        for k, batch in enumerate(p.batches):
            own = valid_steps(of_task(batch, i))
            torch.testing.assert_close(own["dist"], dists[k])
            torch.testing.assert_close(own["logprobs"], log_density(dists[k], own["actions"]))
        assert (tau[0] == 0).all() == ("no_modulation" in changes)
        assert (tau[1] == 0).all() == ("no_modulation" in changes or "modulation" in changes)
        assert not torch.allclose(thetas[0]["mean.weight"], thetas[1]["mean.weight"])
    values = terms(p)
    assert values.tolist() == pytest.approx([0, 0, 0, 0], abs=1e-9)
    p.batches[-1]["advantages"] = p.batches[-1]["advantages"] + torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    assert terms(p)[1].item() == pytest.approx(-3)  # every task counts the same, whatever its number of steps
    by_size = {group["max_lr"]: len(group["params"]) for group in p.groups}
    if p.agent.encoder:
        assert by_size == {1e-3: 7, 5e-4: len(list(p.agent.parameters())) - 7}  # θ, and what modulates it
    else:
        assert by_size == {1e-3: 7 + 2 * ("oracle_mode" in changes)}
    if p.agent.encoder:  # which has been told the units of this iteration's inputs before it was asked
        rows = torch.cat([p.batches[0]["obs"], p.batches[0]["actions"], p.batches[0]["rewards"][..., None]], -1)
        torch.testing.assert_close(p.agent.encoder.mean, rows[p.batches[0]["mask"] == 1].mean(0))


def test_collect():
    """The actions are those of the task's own policy and modulation, with the rng's noise."""
    envs = module.make_envs("ProbeModes-v0", 12)
    policy, n = module.Policy(2, 1, 4, 0.5), 3
    params = {name: p.detach() + 0.5 * torch.randn(n, *p.shape) for name, p in policy.named_parameters()}
    tau, tasks = torch.randn(n, 2, 2, 4), envs.sample_tasks(n, np.random.default_rng(0))
    settings = {"envs": envs, "policy": policy, "horizon": 3, "gamma": 0.9, "gae_lambda": 0.8, "reward": "dense"}
    noise = np.random.default_rng(5).normal(size=(12, 3, 1))
    noise = torch.as_tensor(noise).unflatten(0, (3, 4))
    for deterministic in (False, True):
        rng = np.random.default_rng(5)
        batch = module.collect(params, tau, tasks, rng, deterministic=deterministic, **settings)
        for i in range(n):
            x = of_task(batch, i)
            dist = plain_policy(of_task(params, i), tau[i, :, 0], tau[i, :, 1], x["obs"], 0.5)
            mean, log_std = dist.chunk(2, -1)
            actions = (mean + log_std.exp() * noise[i] * (not deterministic)) * x["mask"][..., None]
            torch.testing.assert_close(x["actions"], actions)
            torch.testing.assert_close(x["dist"], dist)
            torch.testing.assert_close(x["logprobs"], log_density(dist, x["actions"]))
        assert 0 < batch["mask"].mean() < 1
        torch.testing.assert_close(batch["advantages"], module.standardised_advantages(batch, 0.9, 0.8))


def test_sparse_rewards_are_what_is_collected():
    """Encoder, baseline and advantages read them."""
    envs = module.make_envs("SparsePointRobot-v0", 4)
    policy, tasks = module.Policy(2, 2, 4, 1.0), np.zeros((2, 2))
    params = {name: p.detach().expand(2, *p.shape) for name, p in policy.named_parameters()}
    tau = torch.zeros(2, 2, 2, 4)
    settings = {"envs": envs, "policy": policy, "horizon": 9, "gamma": 0.9, "gae_lambda": 0.8}
    batch = module.collect(params, tau, tasks, np.random.default_rng(0), reward="sparse", **settings)
    dense = module.collect(params, tau, tasks, np.random.default_rng(0), reward="dense", **settings)
    assert torch.equal(batch["rewards"], dense["sparse_reward"]) and (batch["rewards"] > 0).any()
    assert (batch["rewards"] != dense["rewards"]).any() and not torch.allclose(batch["advantages"], dense["advantages"])


# ------------------------------------------------------------------------------------------------------------ meta-test


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["mmaml", "promp", "oracle"])
def test_meta_test(kind, deterministic):
    """Phase by phase as in training, with the embedding of the first episodes throughout, group by group of tasks."""
    agent, calls = make_agent(kind), []
    agent.policy = module.Policy(2, 2, 3, 0.3)
    tasks = np.column_stack([np.arange(7.0), np.arange(7) % 2])

    def collect(params, tau, tasks, rng, deterministic=False):
        batch = make_batch(len(tasks))
        batch |= {"dist": torch.randn(len(tasks), 3, 4, 4), "logprobs": torch.zeros(len(tasks), 3, 4)}
        calls.append(
            SimpleNamespace(params=params, tau=tau, tasks=tasks, batch=batch, rng=rng.random(), d=deterministic)
        )
        return batch

    adapt = partial(module.inner_step, lr=0.5, policy=agent.policy)
    scores = module.evaluate(agent, tasks, collect, adapt, 4, 2, seed=3, deterministic=deterministic)
    sampled, scored = ([c for c in calls if c.d == d] for d in (False, deterministic))
    assert len(calls) == 6 * (1 + deterministic)
    embeddings, returns = [], np.zeros((3, 8))
    for group in range(2):
        first, *later = sampled[3 * group : 3 * group + 3]
        assert first.tasks.tolist() == tasks[np.arange(4 * group, 4 * group + 4) % 7].tolist()
        tau, embedding = agent.modulation(first.tasks, first.batch)
        assert torch.equal(first.tau, torch.zeros_like(tau) if kind == "mmaml" else tau)
        params, _ = vmap(adapt)(first.params, first.tau, first.batch)
        for call in later:
            assert torch.equal(call.tau, tau)
            for name, x in params.items():
                torch.testing.assert_close(call.params[name], x)
            params, _ = vmap(adapt)(params, tau, call.batch)
        for name, x in agent.policy.named_parameters():
            assert torch.equal(first.params[name], x.expand(4, *x.shape))
        embeddings.append(embedding)
        for k in range(3):
            c = scored[3 * group + k]
            returns[k, 4 * group : 4 * group + 4] = c.batch["rewards"].sum(-1).mean(1)
            assert sampled[3 * group + k].rng == module.keyed_rng(3, "eval", 4 * group, k).random()
    np.testing.assert_allclose(scores["return"], returns[:, :7])
    assert ("embedding" in scores) == (kind == "mmaml")
    if kind == "mmaml":
        np.testing.assert_allclose(scores["embedding"], torch.cat(embeddings)[:7].detach().T)


def test_report_of_modes(capsys):
    """Returns of each mode, and the share of tasks whose nearest neighbour is of their mode, itself left out."""
    tasks = np.array([[0, 0.0], [1, 0], [0, 1], [1, 1], [2, 1]])
    embedding = np.array([[0, 0.1, 0.3, 5, 5.2], [0, 0, 0, 1, 1]])  # the third is nearest to the second
    scores = {"return": np.array([[1.0, 2, 3, 4, 5], [2, 4, 6, 8, 10]]), "embedding": embedding}
    metrics = module.mode_report(scores, tasks, 2, 10, printed=True)
    assert metrics["eval/mode_accuracy"] == pytest.approx(0.8)
    assert metrics["eval/return_after_10_episodes"] == pytest.approx(6)
    assert metrics["eval/return_mode_0_after_10_episodes"] == pytest.approx(3)
    assert metrics["eval/return_mode_1_after_0_episodes"] == pytest.approx(4)
    output = capsys.readouterr().out
    assert "return_mode_1 on 3 held-out tasks, mean:" in output and "mode_accuracy: 0.800 ± 0.555" in output
    assert "embedding" in scores  # still there for the figure
    assert "eval/mode_accuracy" not in module.mode_report({"return": scores["return"]}, tasks, 2, 10)
    without = module.mode_report(scores, tasks, 0, 10)
    assert without.keys() == {"eval/return_after_0_episodes", "eval/return_after_10_episodes"}
    few = module.mode_report(scores, tasks, 3, 10)  # a mode that no task has
    assert not [tag for tag in few if "mode_2" in tag] and capsys.readouterr().out == ""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own and in single precision; returns its metrics."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    settings = {"env_id": "ProbeModes-v0", "meta_batch_size": 12, "episodes_per_task": 10, "hidden_size": 16}
    settings |= {
        "encoder_size": 16,
        "num_test_tasks": 30,
        "num_inner_steps": 1,
        "num_eval_steps": 1,
        "action_scale": 1.0,
    }
    settings |= {"total_timesteps": 12_000, "num_threads": 1, "eval_every": 1000, "learning_rate": 0.01}
    return lambda **changes: module.main(module.Args(**(settings | changes)))


def test_the_figure(train, tmp_path, monkeypatch, capsys):
    """--evaluate draws the embeddings, their principal components as the library's, and says so if it cannot."""
    train(total_timesteps=1)
    (folder,) = (tmp_path / "runs").iterdir()
    drawn = []
    axes = pytest.importorskip("matplotlib.axes").Axes
    scatter = axes.scatter
    monkeypatch.setattr(axes, "scatter", lambda self, *xy, **how: drawn.append((xy, how)) or scatter(self, *xy, **how))
    module.main(module.parse(module.Args, ["--evaluate", str(folder)]))
    assert (folder / "embedding.png").stat().st_size > 5000 and "embedding.png" in capsys.readouterr().out
    embedding = np.random.default_rng(0).normal(size=(3, 40)) * np.array([[1], [5], [2]])
    module.embedding_figure(folder / "other.png", embedding, np.arange(40))
    (x, y), how = drawn[-1]
    covariance = np.cov(embedding)
    assert [np.var(x, ddof=1), np.var(y, ddof=1)] == pytest.approx(np.linalg.eigvalsh(covariance)[:0:-1])
    assert [np.mean(x), np.mean(y), np.cov(x, y)[0, 1]] == pytest.approx([0, 0, 0], abs=1e-9)
    assert list(how["c"]) == list(range(40))

    (folder / "embedding.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    module.main(module.parse(module.Args, ["--evaluate", str(folder)]))
    assert "no embedding.png: that needs matplotlib" in capsys.readouterr().out
    assert not (folder / "embedding.png").exists()
    argv = ["--evaluate", str(folder), "--eval-episodes", "3"]
    assert {"eval/return_after_3_episodes", "eval/mode_accuracy"} <= module.main(module.parse(module.Args, argv)).keys()
    scores = module.main(module.parse(module.Args, [*argv, "--num-eval-steps", "0"]))
    assert "eval/mode_accuracy" in scores and "eval/return_after_3_episodes" not in scores  # it embeds all the same


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"no_modulation": True, "oracle_mode": True}, "--no-modulation and --oracle-mode exclude each other"),
        ({"oracle_mode": True, "env_id": "PointRobot-v0"}, "--oracle-mode: PointRobot-v0 is no family with modes"),
        ({"env_id": "user_tasks:Discrete-v0"}, "user_tasks:Discrete-v0 has Discrete actions; mmaml.py needs Box"),
    ],
)
def test_what_cannot_be(train, tmp_path, flags, line):
    with pytest.raises(SystemExit, match=f"^error: {line}"):
        train(**flags)
    assert not (tmp_path / "runs").exists()


def test_modes_out_of_range(train, monkeypatch, tmp_path):
    monkeypatch.setattr(Modes, "num_modes", 1)
    with pytest.raises(SystemExit, match=r"^error: ProbeModes-v0: the last number of a task must be its mode, 0 to 0"):
        train(oracle_mode=True)
    assert not (tmp_path / "runs").exists()


# --------------------------------------------------------------------------------------------------------------- probes

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
    """Of 1 at most: by gradient steps, by modulation alone, and from the first episode if the mode is known."""
    scores = train(**{"inner_lr": 0.3} | settings)
    assert 0.8 < scores["eval/return_after_10_episodes"] <= 1
    assert scores["eval/return_after_0_episodes"] == pytest.approx(before, abs=0.2)
    if settings == WITHOUT_STEPS:
        assert scores["eval/mode_accuracy"] > 0.9


def test_probe_is_not_learned_without_adaptation(train):
    """Neither steps nor modulation: no policy that does the same in all tasks does better than 0."""
    scores = train(no_modulation=True, **WITHOUT_STEPS)
    assert scores["eval/return_after_10_episodes"] == pytest.approx(0, abs=0.15)
