"""maml_trpo.py: its mathematics against closed forms and plain loops, and two task families that train in seconds."""

import math
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian, jacrev, vjp, vmap
from torch.nn.utils import parameters_to_vector

import maml_trpo as module

# ------------------------------------------------------------------------------------------ the task families of probes


class Probe(gym.Env):
    """The observation says nothing about the task. Episodes have one to three steps, their return is the steps' mean.

    Box: a task is +1 or -1, and a step's score the task times the action: 0 without adaptation, at best 1.
    Discrete: a task is one of three actions, and only this action scores 1: 1/3 without adaptation, at best 1.
    """

    def __init__(self, discrete: bool, length: int = 0):
        self.discrete, self.fixed_length = discrete, length
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (1,), np.float64)

    def sample_tasks(self, n):
        return np.resize([0, 1, 2] if self.discrete else [1, -1], (n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = self.fixed_length or self.np_random.integers(1, 4), 0
        return np.ones(2), {}

    def step(self, action):
        self.steps += 1
        score = float(action == self.task) if self.discrete else self.task * action[0]
        return np.ones(2), score / self.length, self.steps == self.length, False, {}


gym.register("ProbeBox-v0", Probe, max_episode_steps=3, kwargs={"discrete": False})
gym.register("ProbeDiscrete-v0", Probe, max_episode_steps=3, kwargs={"discrete": True})
gym.register("ProbeLong-v0", Probe, max_episode_steps=1000, kwargs={"discrete": True, "length": 1000})

# ------------------------------------------------------------------------------- the same algorithm once more, in loops


def log_density(policy, dist, actions):
    """log π(a|o), written out."""
    if policy.discrete:
        return dist.log_softmax(-1).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
    mean, log_std = dist.chunk(2, -1)
    return (-0.5 * ((actions - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def divergence(policy, old, new):
    """KL(old || new), written out."""
    if policy.discrete:
        return (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1)
    (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
    variances = (2 * log_std).exp() + (mean - new_mean) ** 2
    return (new_log_std - log_std + variances / (2 * (2 * new_log_std).exp()) - 0.5).sum(-1)


def of_task(batch, i):
    return {name: x[i] for name, x in batch.items()}


def valid_steps(batch):
    """The steps that count, without the padding: (steps, ...)."""
    return {name: x[batch["mask"] == 1] for name, x in batch.items()}


def plain_gradient(policy, params, batch, kind):
    """∇L of one task, with lvc-std over the standard deviation of A under the policy of params."""
    params, batch = {name: p.detach().requires_grad_() for name, p in params.items()}, valid_steps(batch)
    objective = log_density(policy, functional_call(policy, params, (batch["obs"],)), batch["actions"])
    if kind != "logli":
        objective = (objective - batch["logprobs"]).exp()
    loss = -(objective * batch["advantages"]).mean()
    gradients = torch.autograd.grad(loss, tuple(params.values()))
    variance = (objective * batch["advantages"] ** 2).mean() - loss**2
    std = variance.sqrt().item() if kind == "lvc-std" else 1
    return {name: g / std for name, g in zip(params, gradients, strict=True)}


def plain_adaptation(problem, vector, i, gradients=None):
    """φ of task i and the inner gradients on the way; gradients: take these instead, as constants."""
    p, used = problem, []
    meta = dict(zip(p.meta, vector.split([x.numel() for x in p.meta.values()]), strict=True))
    meta = {name: x.view(p.meta[name].shape) for name, x in meta.items()}
    params = {name: x for name, x in meta.items() if not name.startswith("log_lr.")}
    lr = {name: meta[f"log_lr.{name}"].exp() if p.learn else p.lr for name in params}
    for k, batch in enumerate(p.inner):
        used.append(gradients[k] if gradients else plain_gradient(p.policy, params, of_task(batch, i), p.kind))
        params = {name: x - lr[name] * used[k][name] for name, x in params.items()}
    return params, used


def plain_losses(problem, vector, gradients=None):
    """Surrogate and KL, (2,); gradients: for every task the constants of plain_adaptation."""
    p, losses = problem, []
    for i in range(p.n):
        params, _ = plain_adaptation(p, vector, i, gradients and gradients[i])
        batch = valid_steps(of_task(p.outer, i))
        dist = functional_call(p.policy, params, (batch["obs"],))
        ratio = (log_density(p.policy, dist, batch["actions"]) - batch["logprobs"]).exp()
        kl = divergence(p.policy, batch["dist"], dist)
        losses.append(torch.stack([-(ratio * batch["advantages"]).mean(), kl.mean()]))
    return torch.stack(losses).mean(0).detach()


def central_differences(f, x, size=1e-6):
    return torch.stack([(f(x + size * e) - f(x - size * e)) / (2 * size) for e in torch.eye(len(x))])


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


def make_batch(policy, params, n, e=3, t=4):
    """Episodes of random observations, with zeros after their ends as those of rollout, and random advantages."""
    mask = ragged_mask(n, e, t)
    obs = torch.randn(n, e, t, 2) * mask[..., None]
    dist = torch.stack([functional_call(policy, of_task(params, i), (obs[i],)) for i in range(n)])
    if policy.discrete:
        actions = torch.distributions.Categorical(logits=dist).sample() * mask
    else:
        mean, log_std = dist.chunk(2, -1)
        actions = (mean + log_std.exp() * torch.randn_like(mean)) * mask[..., None]
    batch = {"obs": obs, "actions": actions, "mask": mask, "dist": dist, "advantages": torch.randn(n, e, t) * mask}
    return {name: x.detach() for name, x in batch.items()} | {"logprobs": log_density(policy, dist, actions).detach()}


def standardise(advantages, mask):
    """As standardised_advantages does."""
    centred = (advantages - module.masked_mean(advantages, mask, (1, 2), True)) * mask
    return centred / module.masked_mean(centred**2, mask, (1, 2), True).sqrt()


def make_problem(discrete=False, num_steps=1, kind="lvc", first_order=False, learn=False, lr=0.5, n=3, **sizes):
    """A small policy, its meta-parameters, and batches collected on the way of its adaptation to n tasks."""
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,))
    policy = module.Policy(2, space, 4)
    meta = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in policy.named_parameters()}
    params = {name: p.expand(n, *p.shape) for name, p in meta.items()}
    if learn:
        meta |= {f"log_lr.{name}": math.log(lr) + 0.3 * torch.randn_like(p) for name, p in meta.items()}
    problem = SimpleNamespace(policy=policy, meta=meta, inner=[], kind=kind, learn=learn, lr=lr, n=n)
    problem.vector = parameters_to_vector(meta.values())
    for k in range(num_steps + 1):
        batch = make_batch(policy, params, n, **sizes)
        if kind == "lvc-std":  # which relies on it
            batch["advantages"] = standardise(batch["advantages"], batch["mask"])
        if k < num_steps:
            problem.inner.append(batch)
            adapted = [plain_adaptation(problem, problem.vector, i)[0] for i in range(n)]
            params = {name: torch.stack([phi[name] for phi in adapted]).detach() for name in params}
    problem.outer, problem.adapted = batch, params
    problem.dist_of = partial(
        module.adapted_distributions, like=meta, inner_batches=problem.inner, obs=problem.outer["obs"], inner_lr=lr,
        policy=policy, kind=kind, first_order=first_order,
    )  # fmt: skip
    return problem


@pytest.fixture
def update(monkeypatch):
    """meta_update on a problem; returns the new vector, what was logged, and what is inside the function."""
    solve, search = module.conjugate_gradient, module.line_search

    def run(problem, max_kl=0.01, cg_iters=10, cg_damping=1e-5):
        seen = SimpleNamespace()

        def conjugate_gradient(product, b, iters):
            seen.product, seen.gradient, seen.iters = product, b, iters
            return solve(product, b, iters)

        def line_search(vector, step, loss_and_kl, old, max_kl):
            seen.step, seen.old = step, old
            return search(vector, step, loss_and_kl, old, max_kl)

        monkeypatch.setattr(module, "conjugate_gradient", conjugate_gradient)
        monkeypatch.setattr(module, "line_search", line_search)
        arguments = (problem.vector, problem.dist_of, problem.outer, problem.policy, max_kl, cg_iters, cg_damping)
        seen.vector, seen.logged = module.meta_update(*arguments)
        return seen

    return run


def error(x, y):
    """Relative error of x."""
    return ((x - y).norm() / y.norm()).item()


# ---------------------------------------------------------------------------------------------------- the meta-gradient

VARIANTS = [
    {"kind": kind, "num_steps": num_steps, "learn": learn}
    for kind in ("lvc", "logli", "lvc-std")
    for num_steps, learn in ((0, False), (1, False), (1, True), (2, False), (2, True))
] + [{"discrete": True, "kind": "lvc"}, {"discrete": True, "kind": "logli", "num_steps": 2}]
VARIANTS += [{"discrete": True, "kind": "lvc-std", "num_steps": 2}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_meta_gradient(update, variant):
    """The gradient is that of the surrogate as a function of θ (and the step sizes), through the inner steps."""
    problem = make_problem(**variant)
    numeric = central_differences(lambda x: plain_losses(problem, x)[0], problem.vector)
    assert error(update(problem).gradient, numeric) < 1e-6


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("num_steps") != 0], ids=str)
def test_first_order_meta_gradient(update, variant):
    """With first_order, the inner gradients are constants, and the meta-gradient is a different one."""
    problem = make_problem(first_order=True, **variant)
    constants = [plain_adaptation(problem, problem.vector, i)[1] for i in range(problem.n)]
    numeric = central_differences(lambda x: plain_losses(problem, x, constants)[0], problem.vector)
    first_order = update(problem).gradient
    assert error(first_order, numeric) < 1e-6
    problem.dist_of.keywords["first_order"] = False
    assert error(first_order, update(problem).gradient) > 0.01


def test_first_order_is_the_gradient_at_the_adapted_parameters(update):
    """The other way to say it: the mean over tasks of the gradient of the surrogate in φ, at φ."""
    problem = make_problem(num_steps=2, first_order=True)
    gradients = []
    for i in range(problem.n):
        outer = of_task(problem.outer, i)
        gradients.append(plain_gradient(problem.policy, of_task(problem.adapted, i), outer, "lvc"))
    mean = [sum(g[name] for g in gradients) / problem.n for name in problem.meta]
    assert error(update(problem).gradient, parameters_to_vector(mean)) < 1e-12


def test_inner_losses_have_one_gradient_and_two_hessians(update):
    """lvc and logli agree on the inner step at the sampling parameters, but not on the meta-gradient."""
    problem = make_problem(kind="lvc")
    theta, batch, lr = of_task(problem.adapted, 0), of_task(problem.outer, 0), dict.fromkeys(problem.meta, 0.5)
    steps = [module.inner_step(theta, batch, lr, problem.policy, kind) for kind in ("lvc", "logli")]
    for name in theta:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(steps[0][name], theta[name])
    gradient = update(problem).gradient
    problem.dist_of.keywords["kind"] = "logli"
    assert error(update(problem).gradient, gradient) > 0.01


@pytest.mark.parametrize("std", [0.1, 0.3])
def test_lvc_std_has_the_jacobian_of_the_whole_inner_step(std):
    """Sampling a = μ + s ε, standardising, stepping: on r = -(a - g)² lvc has the wrong sign.

    With d = g - μ and the exact baseline E[r], σ_A² = 2s⁴ + 4s²d² and μ' = μ + 2αd / σ_A. lvc has
    1 - 2α / σ_A, as if σ_A did not depend on μ, and logli 1.
    """
    goal, lr, n, name = 0.25, 0.1, 20_000, "net.4.bias"  # with o = 0 that bias is μ
    policy = module.Policy(1, gym.spaces.Box(-1, 1, (1,)), 4, std)
    eps = torch.special.ndtri((torch.arange(n) + 0.5) / n).view(n, 1, 1)  # a normal law's quantiles

    def episodes(mean):
        """One step each, (E, T) = (n, 1)."""
        actions, params = mean + std * eps, {name: mean.view(1)}
        batch = {"obs": torch.zeros(n, 1, 1), "actions": actions, "mask": torch.ones(n, 1)}
        batch["rewards"] = -((actions - goal) ** 2).squeeze(-1)
        tasks = {key: x.unsqueeze(0) for key, x in batch.items()}
        dist = functional_call(policy, params, (batch["obs"],))
        batch["advantages"] = module.standardised_advantages(tasks, 0.99, 1.0)[0]
        return batch | {"logprobs": log_density(policy, dist, actions).detach()}

    def adapted(mean, batch, kind):
        params = {name: mean.view(1)}
        return module.inner_step(params, batch, {name: lr}, policy, kind)[name].squeeze()

    mean, h = torch.tensor(0.0), 1e-4
    whole = [adapted(mean + x, episodes(mean + x), "lvc") for x in (h, -h)]
    kinds = ("lvc", "logli", "lvc-std")
    jacobian = {kind: jacrev(adapted)(mean, episodes(mean), kind).item() for kind in kinds}

    sigma = std * math.sqrt(2 * std**2 + 4 * goal**2)
    true = 1 - 4 * lr * std**4 / sigma**3
    assert true == pytest.approx({0.1: 0.715, 0.3: 0.574}[std], abs=1e-3)
    assert ((whole[0] - whole[1]) / (2 * h)).item() == pytest.approx(true, abs=2e-3)
    expected = {"lvc": 1 - 2 * lr / sigma, "logli": 1, "lvc-std": true}
    assert jacobian == pytest.approx(expected, abs=5e-3)
    assert jacobian["lvc"] < 0 < 0.5 < jacobian["lvc-std"] < 0.8


@pytest.mark.parametrize("discrete", [False, True])
def test_lvc_std_takes_the_steps_of_lvc_with_another_jacobian(discrete):
    """Both inner steps, as σ_A is 1 wherever a batch was collected. first_order leaves nothing."""
    problem = make_problem(discrete, num_steps=2, kind="lvc-std")
    both = problem.dist_of, partial(problem.dist_of, kind="lvc")
    assert error(*(f(problem.vector) for f in both)) < 1e-12
    assert error(*(jacrev(f)(problem.vector) for f in both)) > 0.01
    first_order = (partial(f, first_order=True) for f in both)
    assert error(*(jacrev(f)(problem.vector) for f in first_order)) < 1e-12


def test_lvc_std_where_a_task_has_no_advantages():
    """As without any reward: the task's step is 0, whatever θ, and nothing is divided by 0."""
    problem = make_problem(kind="lvc-std")
    problem.inner[0]["advantages"][1] = 0
    both = problem.dist_of, partial(problem.dist_of, inner_batches=[])
    assert error(*(f(problem.vector)[1] for f in both)) < 1e-12
    assert error(*(jacrev(f)(problem.vector)[1] for f in both)) < 1e-12


def test_without_inner_steps_it_is_trpo(update):
    """An inner step size of 0 gives the gradient and the step of no adaptation at all."""
    problem = make_problem(num_steps=2, lr=0.0)
    adapted = update(problem, cg_damping=0.1)  # with little damping, conjugate gradient multiplies rounding errors
    problem.dist_of.keywords["inner_batches"] = []
    plain = update(problem, cg_damping=0.1)
    assert error(adapted.gradient, plain.gradient) < 1e-10
    assert error(adapted.vector - problem.vector, plain.vector - problem.vector) < 1e-6


# ------------------------------------------------------------------------------------------ natural gradient, step size


@pytest.mark.parametrize("variant", [{}, {"num_steps": 2}, {"learn": True}, {"discrete": True}], ids=str)
@pytest.mark.parametrize("kind", ["lvc", "logli", "lvc-std"])
def test_fisher_product(update, kind, variant):
    """The product is with JᵀFJ + damping, and JᵀFJ is the Hessian of the KL."""
    problem = make_problem(n=2, kind=kind, **variant)
    policy, outer, dist_of = problem.policy, problem.outer, problem.dist_of
    product, damping = update(problem, cg_damping=0.01).product, 0.01 * torch.eye(len(problem.vector))
    matrix = torch.stack([product(e) for e in torch.eye(len(problem.vector))])

    weight = outer["mask"] / (outer["mask"].sum((1, 2), keepdim=True) * problem.n)
    dist, jacobian = outer["dist"], jacrev(dist_of)(problem.vector)
    if policy.discrete:
        p = dist.softmax(-1)
        fisher = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    else:
        mean, log_std = dist.chunk(2, -1)
        fisher = torch.diag_embed(torch.cat([(-2 * log_std).exp(), torch.full_like(mean, 2)], -1))
    explicit = torch.einsum("net,netip,netij,netjq->pq", weight, jacobian, fisher, jacobian)
    assert error(matrix, explicit + damping) < 1e-10

    def mean_kl(vector):
        return (weight * divergence(policy, dist, dist_of(vector))).sum()

    assert error(matrix, hessian(mean_kl)(problem.vector) + damping) < 1e-10
    assert error(matrix, matrix.T) < 1e-12
    assert torch.linalg.eigvalsh(matrix - damping).min() > -1e-10


def test_conjugate_gradient():
    """Solves the system, returns its left-hand side, and stops at its limit and at its tolerance."""
    a = torch.randn(12, 12)
    a, b = a @ a.T + torch.eye(12), torch.randn(12)
    calls = []

    def product(x):
        calls.append(x)
        return a @ x

    x, image = module.conjugate_gradient(product, b, 50, tolerance=1e-24)
    assert error(x, torch.linalg.solve(a, b)) < 1e-10
    assert len(calls) < 50
    assert error(image, a @ x) < 1e-10
    calls.clear()
    x, image = module.conjugate_gradient(product, b, 3)
    assert len(calls) == 3
    assert error(image, a @ x) < 1e-10  # also far from the solution
    assert error(a @ x, b) > 1e-3
    assert torch.equal(module.conjugate_gradient(product, torch.zeros(12), 3)[0], torch.zeros(12))


def test_step_is_the_natural_gradient(update):
    """With iterations enough, H times the step is a multiple of the gradient; the iterations are those asked for."""
    problem = make_problem()
    assert update(problem, cg_iters=7).iters == 7
    seen = update(problem, cg_iters=200, cg_damping=0.01)
    cosine = torch.cosine_similarity(seen.product(seen.step), seen.gradient, dim=0).item()
    assert cosine == pytest.approx(1, abs=1e-7)
    assert torch.cosine_similarity(seen.step, seen.gradient, dim=0) < 0.99


@pytest.mark.parametrize("discrete", [False, True])
def test_meta_update_stays_in_the_trust_region_and_improves(update, discrete):
    """The full step has ½ sᵀHs = δ; the accepted one lowers the surrogate with a KL within δ, as plain loops see it."""
    problem = make_problem(discrete, num_steps=2)
    for max_kl in (0.001, 0.01, 0.1):
        seen = update(problem, max_kl=max_kl)
        step = seen.step
        assert 0.5 * step @ seen.product(step) == pytest.approx(max_kl, rel=1e-4)
        assert step @ seen.gradient > 0
        old, new = plain_losses(problem, problem.vector).tolist(), plain_losses(problem, seen.vector).tolist()
        assert seen.old == pytest.approx(old, abs=1e-12)
        assert [seen.logged["losses/surrogate"], seen.logged["losses/kl"]] == pytest.approx(new, rel=1e-9)
        assert new[0] < old[0]
        assert 0 < new[1] <= max_kl
        tries = seen.logged["losses/line_search_tries"]
        assert error(seen.vector, problem.vector - 0.8 ** (tries - 1) * step) < 1e-12


def test_meta_update_keeps_the_parameters_if_nothing_improves(update):
    """The very same vector, and the values there."""
    problem = make_problem()
    dist_of, advantages = problem.dist_of, problem.outer["advantages"]
    problem.outer["advantages"] = torch.zeros_like(advantages)
    assert torch.equal(update(problem).vector, problem.vector)
    problem.outer["advantages"] = advantages

    # trials that do not do what the gradient promises: the loss rises (if it falls, θ moves), the KL is too large, NaN
    start, weighted = problem.outer["dist"], problem.outer["mask"] * advantages
    uphill = jacrev(lambda dist: -(log_density(problem.policy, dist, problem.outer["actions"]) * weighted).sum())(start)
    for change, kept in ((1e-3 * uphill, True), (-1e-3 * uphill, False), (torch.tensor(10.0), True), (math.nan, True)):
        problem.dist_of = lambda x, change=change: dist_of(x) if torch.equal(x, problem.vector) else start + change
        seen = update(problem)
        assert torch.equal(seen.vector, problem.vector) == kept
        assert ([seen.logged["losses/surrogate"], seen.logged["losses/kl"]] == seen.old) == kept

    problem.outer["advantages"] = torch.full_like(advantages, math.nan)
    with pytest.raises(SystemExit, match="meta-gradient"):
        update(problem)


def test_line_search():
    """The first of the shrinking steps that passes both tests, and otherwise the very same vector."""
    vector, step = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])

    def search(loss, kl):
        return module.line_search(vector, step, lambda x: (loss(x), kl(x)), (0.0, 0.0), 0.1)

    def distance(x):
        return ((x - vector).norm() / step.norm()).item()

    result, value, tries = search(lambda x: -1.0, lambda x: 0.1)
    assert torch.equal(result, vector - step)
    assert (value, tries) == ((-1.0, 0.1), 1)
    result, value, tries = search(lambda x: -1.0, lambda x: distance(x) ** 2)  # 0.8^6 is the first within √0.1
    assert torch.allclose(result, vector - 0.8**6 * step)
    assert tries == 7
    assert value[1] <= 0.1
    result, value, tries = search(lambda x: distance(x) - 0.5, lambda x: 0.0)  # 0.8^4 is the first below 0.5
    assert torch.allclose(result, vector - 0.8**4 * step)
    assert value[0] < 0
    for loss, kl in ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.2), (math.nan, 0.0), (-1.0, math.nan)):
        result, value, _ = search(lambda x, loss=loss: loss, lambda x, kl=kl: kl)
        assert torch.equal(result, vector)
        assert value == (0.0, 0.0)


# ----------------------------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("discrete", [False, True])
def test_log_prob_and_kl(discrete):
    """Closed forms; of a Gaussian, sums over the action's dimensions: twice the dimensions, twice the value."""
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (3,))
    policy = module.Policy(2, space, 4)
    old, new = torch.randn(2, 5, 3 if discrete else 6)
    actions = torch.randint(3, (5,)).double() if discrete else torch.randn(5, 3)
    log_prob = policy.distribution(old).log_prob(actions)
    kl = torch.distributions.kl_divergence(policy.distribution(old), policy.distribution(new))
    torch.testing.assert_close(log_prob, log_density(policy, old, actions))
    torch.testing.assert_close(kl, divergence(policy, old, new))
    assert log_prob.shape == kl.shape == (5,)
    if not discrete:
        twice_old, twice_new = (torch.cat([m, m, s, s], -1) for m, s in (old.chunk(2, -1), new.chunk(2, -1)))
        old, new = policy.distribution(twice_old), policy.distribution(twice_new)
        torch.testing.assert_close(old.log_prob(torch.cat([actions, actions], -1)), 2 * log_prob)
        torch.testing.assert_close(torch.distributions.kl_divergence(old, new), 2 * kl)


def test_initial_policy():
    """A standard deviation of 1 and biases of 0; the standard deviation cannot fall below 1e-6."""
    policy = module.Policy(2, gym.spaces.Box(-1, 1, (3,)), 4)
    mean, log_std = policy(torch.zeros(7, 2)).chunk(2, -1)
    assert torch.equal(mean, torch.zeros(7, 3))
    assert torch.equal(log_std, torch.zeros(7, 3))
    narrow = module.Policy(2, gym.spaces.Box(-1, 1, (3,)), 4, init_std=0.3)
    torch.testing.assert_close(narrow(torch.zeros(2))[3:].exp(), torch.full((3,), 0.3))
    params = dict(policy.named_parameters()) | {"log_std": torch.full((3,), -100.0)}
    torch.testing.assert_close(functional_call(policy, params, (torch.zeros(2),))[3:].exp(), torch.full((3,), 1e-6))


# ---------------------------------------------------------------------------------------------------- tasks in parallel


@pytest.mark.parametrize("kind", ["lvc", "logli", "lvc-std"])
def test_inner_steps_of_many_tasks_are_those_of_each(kind):
    """vmap over tasks equals a loop; another task's data changes nothing.

    The tasks' parameters are not those that collected, as in a trial of the line search.
    """
    problem = make_problem(kind=kind)
    params = {name: p + 0.1 * torch.randn_like(p) for name, p in problem.adapted.items()}
    lr = {name: 0.1 + torch.rand_like(p) for name, p in problem.meta.items()}
    step = vmap(partial(module.inner_step, lr=lr, policy=problem.policy, kind=kind))
    batch = {name: x.clone() for name, x in problem.outer.items()}
    adapted = step(params, batch)
    for i in range(problem.n):
        theta = of_task(params, i)
        gradient = plain_gradient(problem.policy, theta, of_task(batch, i), kind)
        for name, p in theta.items():
            torch.testing.assert_close(adapted[name][i], p - lr[name] * gradient[name])
    batch["advantages"][1] *= -3
    again = step(params, batch)
    for name in adapted:
        assert torch.equal(adapted[name][[0, 2]], again[name][[0, 2]])
        assert (adapted[name][1] - again[name][1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lvc", "lvc-std"])
@pytest.mark.parametrize("sizes", [{}, {"e": 3, "t": 1000}], ids=str)
def test_adapted_distributions_of_many_tasks_are_those_of_each(kind, sizes):
    """So too after two inner steps, with the gradient, and when the tasks (here 3 x 3000 steps) go in chunks."""
    problem = make_problem(num_steps=2, kind=kind, **sizes)
    dist, pull = vjp(problem.dist_of, problem.vector)
    cotangent, gradient = torch.randn_like(dist), torch.zeros_like(problem.vector)
    torch.testing.assert_close(dist, problem.outer["dist"])
    for i in range(problem.n):
        inner = [of_task(batch, slice(i, i + 1)) for batch in problem.inner]
        alone = partial(problem.dist_of, inner_batches=inner, obs=problem.outer["obs"][i : i + 1])
        dist_i, pull_i = vjp(alone, problem.vector)
        torch.testing.assert_close(dist_i[0], dist[i])
        gradient += pull_i(cotangent[i : i + 1])[0]
    assert error(pull(cotangent)[0], gradient) < 1e-10
    problem.inner[0]["advantages"][1] *= -3
    changed = (problem.dist_of(problem.vector) - dist).abs().amax((1, 2, 3))
    assert changed[1] > 0.001
    assert changed[[0, 2]].max() < 1e-12


@pytest.mark.parametrize("kind", ["lvc", "lvc-std"])
def test_padding_is_without_influence(update, kind):
    """Garbage after the episodes' ends changes neither advantages nor inner step nor meta-update."""
    problem = make_problem(kind=kind)
    before = update(problem, cg_damping=0.1)
    batch = problem.outer | {"rewards": torch.randn(problem.n, 3, 4) * problem.outer["mask"]}
    advantages = module.standardised_advantages(batch, 0.9, 0.8)
    lr = dict.fromkeys(problem.meta, 0.5)
    step = partial(module.inner_step, batch=of_task(batch, 0), lr=lr, policy=problem.policy, kind=kind)
    theta = of_task(problem.adapted, 0)
    adapted = step(theta)

    for data in (*problem.inner, problem.outer):
        for name in ("obs", "advantages"):
            data[name][data["mask"] == 0] = 1e6
        data["logprobs"][data["mask"] == 0] = -1e6
    again = module.standardised_advantages(batch, 0.9, 0.8)
    torch.testing.assert_close(again, advantages, rtol=1e-12, atol=1e-12)
    assert (again[batch["mask"] == 0] == 0).all()
    assert (batch["obs"] == 1e6).any()
    for name, p in step(theta).items():
        torch.testing.assert_close(p, adapted[name], rtol=1e-12, atol=1e-12)
    after = update(problem, cg_damping=0.1)
    assert error(after.gradient, before.gradient) < 1e-10
    assert error(after.vector - problem.vector, before.vector - problem.vector) < 1e-6
    assert after.logged == pytest.approx(before.logged, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- advantages


def test_linear_baseline():
    """Ridge regression of every task by itself, on the steps that count."""
    n, e, t = 3, 4, 30
    mask, returns = ragged_mask(n, e, t), torch.randn(n, e, t)
    obs = 4 * torch.randn(n, e, t, 2)  # some beyond ±10
    obs[0, 0, 0] = 1e3
    values = module.linear_baseline(obs, returns, mask)
    for i in range(n):
        valid = mask[i].numpy() == 1
        o, time = obs[i].numpy()[valid].clip(-10, 10), np.broadcast_to(np.arange(t) / 100, (e, t))[valid][:, None]
        x = np.hstack([o, o**2, time, time**2, time**3, np.ones_like(time)])
        augmented = np.vstack([x, np.sqrt(1e-5) * np.eye(8)])
        weights = np.linalg.lstsq(augmented, np.append(returns[i].numpy()[valid], np.zeros(8)), rcond=None)[0]
        np.testing.assert_allclose(values[i].numpy()[valid], x @ weights, atol=1e-7)
    returns[1], obs[1] = 5, 3
    again = module.linear_baseline(obs, returns, mask)
    assert torch.equal(again[[0, 2]], values[[0, 2]])
    assert not torch.allclose(again[1], values[1])


def test_linear_baseline_fits_what_is_linear_in_time():
    """Returns that fall linearly to 0, other ones in every task, leave no residual."""
    t = torch.arange(100.0)
    returns = torch.tensor([1.0, -3.0])[:, None, None] * (100 - t).expand(2, 3, 100)
    values = module.linear_baseline(torch.randn(2, 3, 100, 2), returns, torch.ones(2, 3, 100))
    assert (values - returns).abs().max() < 0.01


def test_discounted_sum():
    """Against a loop."""
    x, total = torch.randn(2, 3, 7), torch.zeros(2, 3)
    for t in reversed(range(7)):
        total = x[..., t] + 0.9 * total
        torch.testing.assert_close(module.discounted_sum(x, 0.9)[..., t], total)
    torch.testing.assert_close(module.discounted_sum(x, 0), x)
    torch.testing.assert_close(module.discounted_sum(x, 1)[..., 0], x.sum(-1))


@pytest.mark.parametrize("gae_lambda", [0, 0.7, 1])
def test_gae(gae_lambda):
    """The double sum; λ = 0 is the error of one step, λ = 1 the return to go less the value. Padding is ignored."""
    rewards, values, mask, gamma = torch.randn(2, 3, 5), torch.randn(2, 3, 5), ragged_mask(2, 3, 5), 0.9
    garbage = 1e6 * (1 - mask)
    advantages = module.gae(rewards + garbage, values + garbage, mask, gamma, gae_lambda)
    for i, j in np.ndindex(2, 3):
        r, v, length = rewards[i, j].tolist(), [*values[i, j].tolist(), 0], int(mask[i, j].sum())
        v[length] = 0
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(5):
            expected = sum((gamma * gae_lambda) ** (s - t) * errors[s] for s in range(t, length))
            assert advantages[i, j, t].item() == pytest.approx(expected, abs=1e-12)
            if gae_lambda == 1 and t < length:
                to_go = sum(gamma ** (s - t) * r[s] for s in range(t, length))
                assert advantages[i, j, t].item() == pytest.approx(to_go - v[t], abs=1e-12)


def test_standardised_advantages():
    """Mean 0 and standard deviation 1 per task, of the estimates against the task's own baseline."""
    mask = ragged_mask(3, 4, 5)
    rewards = 10 * torch.randn(3, 4, 5) * torch.tensor([0.1, 1, 10])[:, None, None] * mask
    batch = {"obs": torch.randn(3, 4, 5, 2), "rewards": rewards, "mask": mask}
    advantages = module.standardised_advantages(batch, 0.9, 0.8)
    values = module.linear_baseline(batch["obs"], module.discounted_sum(rewards, 0.9), mask)
    raw = module.gae(rewards, values, mask, 0.9, 0.8)
    for i in range(3):
        valid, x = advantages[i][mask[i] == 1], raw[i][mask[i] == 1]
        assert valid.mean().item() == pytest.approx(0, abs=1e-12)
        assert valid.std(correction=0).item() == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(valid, (x - x.mean()) / x.std(correction=0), rtol=1e-6, atol=1e-6)
    assert (advantages[mask == 0] == 0).all()
    batch["rewards"] = torch.zeros_like(rewards)  # nothing to learn from, and no division by 0
    assert torch.equal(module.standardised_advantages(batch, 0.9, 0.8), torch.zeros(3, 4, 5))


# ----------------------------------------------------------------------------------------------------------- collection


def collector(env_id, n, e, seed=0):
    """collect with n random policies, in n tasks with e episodes each; returns it, the policy and its parameters."""
    envs = module.make_envs(env_id, n * e)
    policy = module.Policy(envs.single_observation_space.shape[0], envs.single_action_space, 4)
    params = {name: p.detach() + 0.5 * torch.randn(n, *p.shape) for name, p in policy.named_parameters()}
    tasks = envs.sample_tasks(n, np.random.default_rng(seed))
    settings = {"envs": envs, "policy": policy, "horizon": envs.horizon, "gamma": 0.9, "gae_lambda": 0.8}
    return partial(module.collect, tasks=tasks, reward="dense", **settings), policy, params


@pytest.mark.parametrize("env_id", ["PointRobot-v0", "ProbeBox-v0", "ProbeDiscrete-v0"])
def test_collect(env_id):
    """The actions are those of task i's own policy and the rng's noise, and the log-probabilities theirs."""
    collect, policy, params = collector(env_id, n=3, e=4)
    batch = collect(params, rng=np.random.default_rng(5))
    greedy = collect(params, rng=np.random.default_rng(5), deterministic=True)
    length, rng = batch["mask"].shape[-1], np.random.default_rng(5)
    draw = rng.gumbel if policy.discrete else rng.normal
    noise = torch.as_tensor(draw(size=(12, collect.keywords["horizon"], policy.out_size))).unflatten(0, (3, 4))
    for data, scale in ((batch, 1), (greedy, 0)):
        for i in range(3):
            x = of_task(data, i)
            dist, mask = functional_call(policy, of_task(params, i), (x["obs"],)), x["mask"]
            z = scale * noise[i, :, : dist.shape[1]]
            if policy.discrete:
                actions = (dist + z).argmax(-1) * mask
            else:
                mean, log_std = dist.chunk(2, -1)
                actions = (mean + log_std.exp() * z) * mask[..., None]
            torch.testing.assert_close(x["actions"].double(), actions)
            torch.testing.assert_close(x["dist"], dist)
            torch.testing.assert_close(x["logprobs"], log_density(policy, dist, x["actions"]))
    if env_id != "PointRobot-v0":
        assert length <= 3
        assert 0 < batch["mask"].mean() < 1
        assert (batch["rewards"][batch["mask"] == 0] == 0).all()
    torch.testing.assert_close(batch["advantages"], module.standardised_advantages(batch, 0.9, 0.8))


@pytest.mark.parametrize("env_id", ["PointRobot-v0", "ProbeBox-v0", "ProbeDiscrete-v0"])
def test_meta_update_starts_where_the_data_was_collected(update, env_id):
    """From collection to update, everything agrees: the ratios are 1, so that the surrogate is -mean A = 0; KL 0."""
    collect, policy, params = collector(env_id, n=3, e=4)
    theta = of_task(params, 0)
    params = {name: p.expand(3, *p.shape) for name, p in theta.items()}
    adapt = vmap(partial(module.inner_step, lr=dict.fromkeys(theta, 0.5), policy=policy, kind="lvc"))
    inner = []
    for k in range(2):
        inner.append(collect(params, rng=np.random.default_rng(k)))
        params = adapt(params, inner[k])
    outer = collect(params, rng=np.random.default_rng(2))
    arguments = {"inner_batches": inner, "obs": outer["obs"], "inner_lr": 0.5, "policy": policy, "kind": "lvc"}
    dist_of = partial(module.adapted_distributions, like=theta, **arguments)
    vector = parameters_to_vector(theta.values())
    torch.testing.assert_close(dist_of(vector), outer["dist"], rtol=1e-12, atol=1e-12)
    outer["advantages"] = outer["advantages"] + torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    seen = update(SimpleNamespace(vector=vector, dist_of=dist_of, outer=outer, policy=policy))
    assert seen.old == pytest.approx([-3, 0], abs=1e-9)  # every task counts the same, whatever its number of steps


def test_discrete_actions_are_draws_from_the_softmax():
    """Frequencies within four standard errors, in every task."""
    collect, _, params = collector("ProbeLong-v0", n=2, e=4)
    batch = collect(params, rng=np.random.default_rng(0))
    p = batch["dist"].softmax(-1)[:, 0, 0]  # all observations are the same
    assert p.min() > 0.02
    for action in range(3):
        frequency = (batch["actions"] == action).double().mean((1, 2))
        assert ((frequency - p[:, action]).abs() < 4 * (p * (1 - p) / 4000).sqrt()[:, action]).all()


# --------------------------------------------------------------------------------------------------------------- probes


@pytest.fixture
def train(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own and in single precision; returns its metrics."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    settings = {"meta_batch_size": 12, "episodes_per_task": 20, "hidden_size": 8, "num_test_tasks": 30, "max_kl": 0.02}
    settings |= {"total_timesteps": 30_000, "num_threads": 1, "eval_every": 1000}
    return lambda **changes: module.main(module.Args(**(settings | changes)))


BOX, DISCRETE = {"env_id": "ProbeBox-v0", "inner_lr": 0.08}, {"env_id": "ProbeDiscrete-v0", "inner_lr": 0.15}


@pytest.mark.parametrize(
    "settings",
    [
        BOX,
        BOX | {"num_inner_steps": 2, "total_timesteps": 45_000, "inner_lr": 0.06, "max_kl": 0.03},
        DISCRETE,
        DISCRETE | {"learn_inner_lr": True, "first_order": True},
    ],
    ids=str,
)
def test_probe_is_learned(train, settings):
    """Of 1 at most, training comes from below 0.7 to above 0.8 after adaptation, and stays blind before."""
    blind, num_steps = 0 if settings["env_id"] == "ProbeBox-v0" else 1 / 3, settings.get("num_inner_steps", 1)
    tag = f"eval/return_after_{20 * num_steps}_episodes"
    trained = train(num_eval_steps=num_steps, **settings)
    assert 0.8 < trained[tag] <= 1
    assert trained["eval/return_after_0_episodes"] == pytest.approx(blind, abs=0.15)
    assert train(num_eval_steps=num_steps, **settings | {"total_timesteps": 1})[tag] < 0.7


@pytest.mark.parametrize(("settings", "blind"), [(BOX, 0), (DISCRETE, 1 / 3)], ids=str)
def test_probe_is_not_learned_without_adaptation(train, settings, blind):
    """No policy that does the same in all tasks does better than blind."""
    scores = train(num_eval_steps=1, **settings | {"inner_lr": 1e-9})
    assert scores["eval/return_after_20_episodes"] == pytest.approx(blind, abs=0.15)
