"""mmaml.py: its mathematics against plain loops and finite differences, and task families that train in seconds."""

import math
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
        embeddings.append(layers("of_episode", plain_gru(params, (inputs - encoder.mean) / encoder.variance.sqrt())))
    return layers("of_task", sum(embeddings) / len(embeddings))


def sub(params, prefix):
    return {name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}


def plain_modulation(agent, params, batch, mode):
    """γ and β of one task, each (2, H)."""
    shape = 2, agent.hidden_size
    if agent.encoder is None and not agent.num_modes:
        return torch.zeros(shape), torch.zeros(shape)
    if agent.encoder is None:
        embedding = torch.eye(agent.num_modes)[mode]
    else:
        embedding = plain_encoder(sub(params, "encoder."), agent.encoder, batch)
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


def make_agent(kind="mmaml", film=True, hidden_size=3, encoder_size=3):
    """A small agent with nothing at 0, its inputs' units included."""
    policy = module.Policy(2, 2, hidden_size, 0.3)
    encoder = module.Encoder(5, encoder_size) if kind == "mmaml" else None
    num_modes = 2 if kind == "oracle" else 0
    agent = module.Agent(policy, encoder, encoder_size if encoder else num_modes, num_modes, film)
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
    assert values[2].item() == pytest.approx((values[0] - values[1]).item() / p.kl_weight) and values[2] > 1e-3
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
    optimizers = [torch.optim.Adam(q.agent.parameters(), lr=0.02) for q in (p, twin)]
    logged = module.promp_update(p.agent, optimizers[0], p.batches, p.tasks, 3, p.loss)
    expected = []
    for _ in range(3):
        optimizers[1].zero_grad()
        values = terms(twin)
        values[0].backward()
        optimizers[1].step()
        expected.append(values.detach())
    for (name, x), y in zip(p.agent.named_parameters(), twin.agent.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    names = ("losses/loss", "losses/pg_loss", "losses/inner_kl", "losses/clipfrac")
    assert list(logged) == list(names) and list(logged.values()) == pytest.approx((sum(expected) / 3).tolist())
    assert (expected[0] - expected[2]).abs()[:2].min() > 1e-6

    p.batches[-1]["advantages"] = p.batches[-1]["advantages"] * math.nan
    with pytest.raises(SystemExit, match=r"^error: the meta-gradient is not finite"):
        module.promp_update(p.agent, optimizers[0], p.batches, p.tasks, 1, p.loss)


def test_without_modulation_it_is_promp():
    """A head of zeros leaves policy, inner steps, loss and the gradient in θ as they are without one."""
    p = make_problem("mmaml", move=0)
    for x in p.agent.head.parameters():
        x.data.zero_()
    promp = SimpleNamespace(**vars(p) | {"agent": module.Agent(p.agent.policy, None, 0, 0, True), "known": True})
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
    tau, step = torch.randn(3, 2, 2, 3), vmap(partial(module.adapt, lr=0.5, policy=policy))
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
    optimizer = torch.optim.Adam(p.agent.parameters(), lr=0.01)
    logged = module.promp_update(p.agent, optimizer, p.batches, p.tasks, 1, p.loss)
    assert sizes == [2] and list(logged.values()) == pytest.approx(expected)


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
    agent, batch = make_agent(), make_batch()
    batch["rewards"][0, 0, 0] = 1e5
    clipped = agent.encoder(batch)
    batch["rewards"][0, 0, 0] = 1e7
    assert torch.equal(agent.encoder(batch), clipped)
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
