"""maml_trpo.py: its mathematics against closed forms and plain loops, and two families to train on.

The blocks baseline, advantages, actions and trpo are tested here for all scripts that have them.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from plain import (
    actions_from,
    central_differences,
    divergence,
    double_precision,
    error,
    gradient_behind,
    in_units,
    log_density,
    make_batch,
    of_task,
    ragged_mask,
    unpack,
    valid_steps,
)
from torch.distributions import kl_divergence
from torch.func import functional_call, hessian, jacrev, vjp, vmap
from torch.nn.utils import parameters_to_vector

import maml_trpo as module

double = pytest.fixture(autouse=True)(double_precision)
BOX = gym.spaces.Box(-1, 1, (2,))
KINDS = ["lvc", "logli", "lvc-std"]

# ---------------------------------------------------------------------- the task families of probes


class Probe(gym.Env):
    """The observation says nothing about the task. Episodes have one to three steps, their return
    is the steps' mean.

    Box: a task is +1 or -1, and a step's score the task times the action: 0 without adaptation, at
    best 1. Discrete: a task is one of three actions, and only this action scores 1: 1/3 without
    adaptation, at best 1.
    """

    def __init__(self, discrete: bool, length: int = 0):
        self.discrete = discrete
        self.fixed_length = length
        self.observation_space = gym.spaces.Box(-1, 1, (2,), np.float64)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float64)
        if discrete:
            self.action_space = gym.spaces.Discrete(3)

    def sample_tasks(self, n):
        return np.resize([0, 1, 2] if self.discrete else [1, -1], (n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.fixed_length or self.np_random.integers(1, 4)
        self.steps = 0
        return np.ones(2), {}

    def step(self, action):
        self.steps += 1
        score = float(action == self.task) if self.discrete else self.task * action[0]
        return np.ones(2), score / self.length, self.steps == self.length, False, {}


gym.register("ProbeBox-v0", Probe, max_episode_steps=3, kwargs={"discrete": False})
gym.register("ProbeDiscrete-v0", Probe, max_episode_steps=3, kwargs={"discrete": True})
long = {"discrete": True, "length": 1000}
gym.register("ProbeLong-v0", Probe, max_episode_steps=1000, kwargs=long)

# ----------------------------------------------------------- the same algorithm once more, in loops


def plain_gradient(p, params, batch):
    """∇L of one task, with lvc-std over the standard deviation of A under the policy of params."""
    params = {name: x.detach().requires_grad_() for name, x in params.items()}
    batch = valid_steps(batch)
    dist_params = functional_call(p.policy, params, (batch["obs"],))
    objective = log_density(dist_params, batch["actions"], p.policy.discrete)
    if p.args.inner_loss != "logli":
        objective = (objective - batch["logprobs"]).exp()
    loss = -(objective * batch["advantages"]).mean()
    gradients = torch.autograd.grad(loss, tuple(params.values()))
    variance = (objective * batch["advantages"] ** 2).mean() - loss**2
    std = variance.sqrt().item() if p.args.inner_loss == "lvc-std" else 1
    return {name: g / std for name, g in zip(params, gradients, strict=True)}


def plain_adaptation(p, vector, i, gradients=None):
    """φ of task i and the inner gradients on the way; gradients: take these instead, as constants."""
    meta = unpack(vector, p.meta)
    params = {name: x for name, x in meta.items() if not name.startswith("log_lr.")}
    alpha = dict.fromkeys(params, p.args.inner_lr)
    alpha |= {name[7:]: x.exp() for name, x in meta.items() if name.startswith("log_lr.")}
    used = []
    for k, batch in enumerate(p.inner):
        used.append(gradients[k] if gradients else plain_gradient(p, params, of_task(batch, i)))
        params = {name: x - alpha[name] * used[k][name] for name, x in params.items()}
    return params, used


def plain_losses(p, vector, gradients=None):
    """Surrogate and KL, (2,); gradients: for every task the constants of plain_adaptation."""
    losses = []
    for i in range(p.n):
        params, _ = plain_adaptation(p, vector, i, gradients and gradients[i])
        batch = valid_steps(of_task(p.outer, i))
        dist_params = functional_call(p.policy, params, (batch["obs"],))
        logprobs = log_density(dist_params, batch["actions"], p.policy.discrete)
        ratio = (logprobs - batch["logprobs"]).exp()
        kl = divergence(batch["dist_params"], dist_params, p.policy.discrete)
        losses.append(torch.stack([-(ratio * batch["advantages"]).mean(), kl.mean()]))
    return torch.stack(losses).mean(0).detach()


# ------------------------------------------------------------------------------------ the test data


def make_args(**changes):
    return module.Args(**{"hidden_size": 3, "gamma": 0.9, "gae_lambda": 0.8} | changes)


def standardise(advantages, mask):
    """As standardised_advantages does."""
    centred = (advantages - module.masked_mean(advantages, mask, (1, 2), True)) * mask
    return centred / module.masked_mean(centred**2, mask, (1, 2), True).sqrt()


def make_problem(discrete=False, num_steps=1, learn=False, n=3, sizes=None, **flags):
    """A small policy, its meta-parameters, and batches collected on the way of its adaptation to n
    tasks.
    """
    args = make_args(**{"inner_lr": 0.5} | flags)
    policy = in_units(module.Policy(2, gym.spaces.Discrete(3) if discrete else BOX, args))
    meta = {name: x.detach() + 0.3 * torch.randn_like(x) for name, x in policy.named_parameters()}
    params = {name: x.expand(n, *x.shape) for name, x in meta.items()}
    if learn:
        log_lr = math.log(args.inner_lr)
        meta |= {f"log_lr.{name}": log_lr + 0.3 * torch.randn_like(x) for name, x in meta.items()}
    p = SimpleNamespace(args=args, policy=policy, meta=meta, inner=[], n=n)
    p.vector = parameters_to_vector(meta.values())
    for k in range(num_steps + 1):

        def does(i, obs, params=params):
            return functional_call(policy, of_task(params, i), (obs,))

        batch = make_batch(does, n, discrete=discrete, **sizes or {})
        if args.inner_loss == "lvc-std":  # which relies on it
            batch["advantages"] = standardise(batch["advantages"], batch["mask"])
        if k < num_steps:
            p.inner.append(batch)
            adapted = [plain_adaptation(p, p.vector, i)[0] for i in range(n)]
            params = {name: torch.stack([phi[name] for phi in adapted]) for name in params}
    p.outer = batch
    p.adapted = params
    return p


def map_of(p, inner=None, outer=None, **flags):
    """What main gives to meta_update, of the meta-parameters alone."""
    batches = [*(p.inner if inner is None else inner), outer or p.outer]
    data = {"meta": p.meta, "batches": batches}
    args = replace(p.args, **flags)
    return partial(module.adapted_policies, data=data, policy=p.policy, args=args)


def update(p, dist_of=None, penalty=None, **flags):
    """meta_update on a problem: the new vector, and what it logs."""
    args = replace(p.args, **flags)
    data = {"meta": p.meta, "batches": [*p.inner, p.outer]}
    does = module.adapted_policies
    if dist_of:
        does = lambda vector, data, policy, args: dist_of(vector)  # noqa: E731
    more = penalty and (lambda vector, data, args: penalty(vector))
    return module.meta_update(p.vector, data, does, p.policy, args, more)


def step_of(p, penalty=None, **flags):
    """The full step of meta_update, that of the first try of its line search."""
    vector, logged = update(p, penalty=penalty, **flags)
    return (p.vector - vector) / 0.8 ** (logged["losses/line_search_tries"] - 1)


def gradient_of(p, **flags):
    """∇S of meta_update: one iteration of conjugate gradient goes along it."""

    def step(c):
        return step_of(p, lambda x: c @ x, cg_iters=1, **flags)

    return gradient_behind(step, len(p.vector))


def values_at_start(p):
    """Surrogate and KL before the step: with δ = 0 there is none."""
    vector, logged = update(p, max_kl=0.0)
    assert torch.equal(vector, p.vector)
    return [logged["losses/surrogate"], logged["losses/kl"]]


def natural_step(matrix, gradient, cg_iters=10, max_kl=0.01):
    """The step of length δ that conjugate gradient finds for a matrix in full."""
    x, image = module.conjugate_gradient(lambda v: matrix @ v, gradient, cg_iters)
    return x * (2 * max_kl / (x @ image + 1e-8)).sqrt()


def mean_kl(p, vector):
    """KL between the policies that collected and those of vector, as a function to differentiate."""
    mask = p.outer["mask"]
    weight = mask / (mask.sum((1, 2), keepdim=True) * p.n)
    kl = divergence(p.outer["dist_params"], map_of(p)(vector), p.policy.discrete)
    return (weight * kl).sum()


def damped_hessian(p, damping):
    return hessian(partial(mean_kl, p))(p.vector) + damping * torch.eye(len(p.vector))


# -------------------------------------------------------------------------------- the meta-gradient

VARIANTS = [
    {"inner_loss": kind, "num_steps": num_steps, "learn": learn}
    for kind in KINDS
    for num_steps, learn in ((0, False), (1, False), (1, True), (2, False), (2, True))
]
VARIANTS += [
    {"discrete": True, "inner_loss": "lvc"},
    {"discrete": True, "inner_loss": "logli", "num_steps": 2},
    {"discrete": True, "inner_loss": "lvc-std", "num_steps": 2},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_meta_gradient_goes_through_the_inner_steps(variant):
    """It is that of the surrogate as a function of θ (and the step sizes)."""
    p = make_problem(**variant)
    some = torch.randn(12, len(p.vector))
    numeric = central_differences(lambda x: plain_losses(p, x)[0], p.vector, directions=some)
    assert error(some @ gradient_of(p), numeric) < 1e-6


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.get("num_steps") != 0], ids=str)
def test_the_first_order_meta_gradient_takes_inner_gradients_as_constants(variant):
    """And is a different one."""
    p = make_problem(**variant)
    constants = [plain_adaptation(p, p.vector, i)[1] for i in range(p.n)]
    some = torch.randn(12, len(p.vector))
    numeric = central_differences(
        lambda x: plain_losses(p, x, constants)[0], p.vector, directions=some
    )
    first_order = gradient_of(p, first_order=True)
    assert error(some @ first_order, numeric) < 1e-6
    assert error(first_order, gradient_of(p)) > 0.01


def test_the_first_order_meta_gradient_is_that_at_the_adapted_parameters():
    """The other way to say it: the mean over tasks of the gradient of the surrogate in φ, at φ."""
    p = make_problem(num_steps=2)
    each = [plain_gradient(p, of_task(p.adapted, i), of_task(p.outer, i)) for i in range(p.n)]
    mean = [sum(g[name] for g in each) / p.n for name in p.meta]
    assert error(gradient_of(p, first_order=True), parameters_to_vector(mean)) < 1e-12


def test_inner_losses_have_one_gradient_and_two_hessians():
    """lvc and logli agree on the inner step at the policy that collected, not on ∇S."""
    p = make_problem()
    theta = of_task(p.adapted, 0)
    step_sizes = dict.fromkeys(theta, 0.5)
    lvc, logli = (
        module.inner_step(theta, of_task(p.outer, 0), step_sizes, p.policy, args)
        for args in (p.args, replace(p.args, inner_loss="logli"))
    )
    for name in theta:
        torch.testing.assert_close(lvc[name], logli[name], rtol=1e-12, atol=1e-12)
        assert not torch.equal(lvc[name], theta[name])
    assert error(gradient_of(p, inner_loss="logli"), gradient_of(p)) > 0.01


@pytest.mark.parametrize("std", [0.1, 0.3])
def test_lvc_std_has_the_jacobian_of_the_whole_inner_step(std):
    """Sampling a = μ + s ε, standardising, stepping: on r = -(a - g)² lvc has the wrong sign.

    With d = g - μ and the exact baseline E[r], σ_A² = 2s⁴ + 4s²d² and μ' = μ + 2αd / σ_A. lvc has
    1 - 2α / σ_A, as if σ_A did not depend on μ, and logli 1.
    """
    goal, alpha, n = 0.25, 0.1, 20_000
    name = "net.4.bias"  # with o = 0 that bias is μ
    args = make_args(init_std=std, gamma=0.99, gae_lambda=1.0)
    policy = in_units(module.Policy(1, gym.spaces.Box(-1, 1, (1,)), args))
    eps = torch.special.ndtri((torch.arange(n) + 0.5) / n).view(n, 1, 1)  # a normal law's quantiles

    def episodes(mean):
        """One step each, (E, T) = (n, 1)."""
        actions = mean + std * eps
        batch = {"obs": torch.zeros(n, 1, 1), "actions": actions, "mask": torch.ones(n, 1)}
        batch["rewards"] = -((actions - goal) ** 2).squeeze(-1)
        tasks = {key: x.unsqueeze(0) for key, x in batch.items()}
        batch["advantages"] = module.standardised_advantages(tasks, args)[0]
        dist_params = functional_call(policy, {name: mean.view(1)}, (batch["obs"],))
        return batch | {"logprobs": log_density(dist_params, actions).detach()}

    def adapted(mean, batch, kind):
        params = {name: mean.view(1)}
        flags = replace(args, inner_loss=kind)
        return module.inner_step(params, batch, {name: alpha}, policy, flags)[name].squeeze()

    mean, h = torch.tensor(0.0), 1e-4
    whole = [adapted(mean + x, episodes(mean + x), "lvc") for x in (h, -h)]
    batch = episodes(mean)
    jacobian = {kind: jacrev(adapted)(mean, batch, kind).item() for kind in KINDS}

    sigma = std * math.sqrt(2 * std**2 + 4 * goal**2)
    true = 1 - 4 * alpha * std**4 / sigma**3
    assert true == pytest.approx({0.1: 0.715, 0.3: 0.574}[std], abs=1e-3)
    assert ((whole[0] - whole[1]) / (2 * h)).item() == pytest.approx(true, abs=2e-3)
    expected = {"lvc": 1 - 2 * alpha / sigma, "logli": 1, "lvc-std": true}
    assert jacobian == pytest.approx(expected, abs=5e-3)
    assert jacobian["lvc"] < 0 < 0.5 < jacobian["lvc-std"] < 0.8


@pytest.mark.parametrize("discrete", [False, True])
def test_lvc_std_takes_the_steps_of_lvc_with_another_jacobian(discrete):
    """Both inner steps, as σ_A is 1 wherever a batch was collected. first_order leaves nothing."""
    p = make_problem(discrete, num_steps=2, inner_loss="lvc-std")
    for i in range(p.n):
        collected, other = of_task(unpack(p.vector, p.meta), ...), of_task(p.adapted, i)
        batch = of_task(p.inner[0], i)
        assert module.advantage_std(collected, batch, p.policy).item() == pytest.approx(
            1, abs=1e-12
        )
        assert module.advantage_std(other, batch, p.policy).item() != pytest.approx(1, abs=1e-3)
    with_std, without = map_of(p), map_of(p, inner_loss="lvc")
    assert error(with_std(p.vector), without(p.vector)) < 1e-12
    assert error(jacrev(with_std)(p.vector), jacrev(without)(p.vector)) > 0.01
    with_std = map_of(p, first_order=True)
    without = map_of(p, first_order=True, inner_loss="lvc")
    assert error(jacrev(with_std)(p.vector), jacrev(without)(p.vector)) < 1e-12


def test_lvc_std_where_a_task_has_no_advantages():
    """As without any reward: the task's step is 0, whatever θ, and nothing is divided by 0."""
    p = make_problem(inner_loss="lvc-std")
    p.inner[0]["advantages"][1] = 0
    dist_of, still = map_of(p), map_of(p, inner=[])
    assert error(dist_of(p.vector)[1], still(p.vector)[1]) < 1e-12
    assert error(jacrev(dist_of)(p.vector)[1], jacrev(still)(p.vector)[1]) < 1e-12


def test_without_inner_steps_it_is_trpo():
    """An inner step size of 0 gives the gradient and the step of no adaptation at all."""
    p = make_problem(num_steps=2, inner_lr=0.0)
    gradient = gradient_of(p)
    vector, _ = update(p, cg_damping=0.1)  # with less, conjugate gradient multiplies rounding
    p.inner = []
    assert error(gradient, gradient_of(p)) < 1e-10
    plain, _ = update(p, cg_damping=0.1)
    assert error(vector - p.vector, plain - p.vector) < 1e-6


# ---------------------------------------------------------------------- natural gradient, step size


@pytest.mark.parametrize(
    "variant", [{}, {"num_steps": 2}, {"learn": True}, {"discrete": True}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_product_is_with_the_hessian_of_the_kl(kind, variant):
    """And that is JᵀFJ. The step of two iterations has the gradient and its product in it: here of
    three gradients in random directions, as terms c·vector are added to the loss.
    """
    p = make_problem(n=2, inner_loss=kind, **variant)
    mask, dist_params = p.outer["mask"], p.outer["dist_params"]
    weight = mask / (mask.sum((1, 2), keepdim=True) * p.n)
    jacobian = jacrev(map_of(p))(p.vector)
    if p.policy.discrete:
        probability = dist_params.softmax(-1)
        fisher = torch.diag_embed(probability)
        fisher = fisher - probability[..., :, None] * probability[..., None, :]
    else:
        mean, log_std = dist_params.chunk(2, -1)
        fisher = torch.diag_embed(torch.cat([(-2 * log_std).exp(), torch.full_like(mean, 2)], -1))
    explicit = torch.einsum("net,netip,netij,netjq->pq", weight, jacobian, fisher, jacobian)
    matrix = explicit + 0.01 * torch.eye(len(p.vector))
    assert error(matrix, damped_hessian(p, 0.01)) < 1e-10

    gradient = gradient_of(p)
    for c in torch.randn(3, len(p.vector)):
        step = step_of(p, lambda x, c=c: c @ x, cg_iters=2, cg_damping=0.01)
        assert error(step, natural_step(matrix, gradient + c, 2)) < 1e-10
        assert error(step, natural_step(matrix, gradient + c, 1)) > 0.01


def test_conjugate_gradient():
    """Solves the system, returns its left-hand side, and stops at its limit and its tolerance."""
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
    x, _ = module.conjugate_gradient(product, b, 50)
    assert (a @ x - b).square().sum() < 1e-10  # and not so one iteration earlier
    x, _ = module.conjugate_gradient(product, b, len(calls) - 1)
    assert (a @ x - b).square().sum() > 1e-10
    calls.clear()
    x, image = module.conjugate_gradient(product, b, 3)
    assert len(calls) == 3
    assert error(image, a @ x) < 1e-10  # also far from the solution
    assert error(a @ x, b) > 1e-3
    assert torch.equal(module.conjugate_gradient(product, torch.zeros(12), 3)[0], torch.zeros(12))


def test_the_step_is_the_natural_gradient():
    """With iterations enough, H times the step is a multiple of the gradient; the iterations are
    those asked for.
    """
    p = make_problem()
    matrix, gradient = damped_hessian(p, 0.01), gradient_of(p)
    step = step_of(p, cg_iters=7, cg_damping=0.01)
    assert error(step, natural_step(matrix, gradient, 7)) < 1e-6
    for other in (6, 8):
        assert error(step, natural_step(matrix, gradient, other)) > 1e-3
    step = step_of(p, cg_iters=200, cg_damping=0.01)
    cosine = torch.cosine_similarity(matrix @ step, gradient, dim=0).item()
    assert cosine == pytest.approx(1, abs=1e-7)
    assert torch.cosine_similarity(step, gradient, dim=0) < 0.99


@pytest.mark.parametrize("discrete", [False, True])
def test_meta_update_stays_in_the_trust_region_and_improves(discrete):
    """The full step has ½ sᵀHs = δ; the accepted one lowers the surrogate with a KL within δ, as
    plain loops see it.
    """
    p = make_problem(discrete, num_steps=2)
    matrix, gradient = damped_hessian(p, 1e-5), gradient_of(p)
    old = plain_losses(p, p.vector).tolist()
    assert values_at_start(p) == pytest.approx(old, abs=1e-12)
    for max_kl in (0.001, 0.01, 0.1):
        vector, logged = update(p, max_kl=max_kl)
        step = (p.vector - vector) / 0.8 ** (logged["losses/line_search_tries"] - 1)
        assert 0.5 * step @ matrix @ step == pytest.approx(max_kl, rel=1e-4)
        assert step @ gradient > 0
        new = plain_losses(p, vector).tolist()
        assert [logged["losses/surrogate"], logged["losses/kl"]] == pytest.approx(new, rel=1e-9)
        assert new[0] < old[0]
        assert 0 < new[1] <= max_kl


def test_meta_update_keeps_the_parameters_if_nothing_improves():
    """The very same vector, and the values there."""
    p = make_problem()
    advantages = p.outer["advantages"]
    p.outer["advantages"] = torch.zeros_like(advantages)
    assert torch.equal(update(p)[0], p.vector)
    p.outer["advantages"] = advantages

    # trials that do not do what the gradient promises: the loss rises (if it falls, θ moves), the
    # KL is too large, NaN
    start, weighted = p.outer["dist_params"], p.outer["mask"] * advantages
    uphill = jacrev(lambda x: -(log_density(x, p.outer["actions"]) * weighted).sum())(start)
    large = torch.tensor(10.0)
    old = values_at_start(p)
    for change, kept in (
        (1e-3 * uphill, True),
        (-1e-3 * uphill, False),
        (large, True),
        (math.nan, True),
    ):

        def dist_of(x, change=change):
            return map_of(p)(x) if torch.equal(x, p.vector) else start + change

        vector, logged = update(p, dist_of)
        assert torch.equal(vector, p.vector) == kept
        assert ([logged["losses/surrogate"], logged["losses/kl"]] == old) == kept

    p.outer["advantages"] = torch.full_like(advantages, math.nan)
    with pytest.raises(SystemExit, match="meta-gradient"):
        update(p)


def test_line_search():
    """The first of the shrinking steps that passes both tests, else the very same vector."""
    vector, step = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])

    def search(loss, kl):
        return module.line_search(vector, step, lambda x: (loss(x), kl(x)), (0.0, 0.0), 0.1)

    def distance(x):
        return ((x - vector).norm() / step.norm()).item()

    result, value, tries = search(lambda x: -1.0, lambda x: 0.1)
    assert torch.equal(result, vector - step)
    assert (value, tries) == ((-1.0, 0.1), 1)
    # 0.8^6 is the first within √0.1
    result, value, tries = search(lambda x: -1.0, lambda x: distance(x) ** 2)
    assert torch.allclose(result, vector - 0.8**6 * step)
    assert tries == 7
    assert value[1] <= 0.1
    # 0.8^4 is the first below 0.5
    result, value, tries = search(lambda x: distance(x) - 0.5, lambda x: 0.0)
    assert torch.allclose(result, vector - 0.8**4 * step)
    assert value[0] < 0
    for loss, kl in ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.2), (math.nan, 0.0), (-1.0, math.nan)):
        result, value, tries = search(lambda x, loss=loss: loss, lambda x, kl=kl: kl)
        assert torch.equal(result, vector)
        assert (value, tries) == ((0.0, 0.0), 15)


# --------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("discrete", [False, True])
def test_log_prob_and_kl(discrete):
    """Closed forms; of a Gaussian, sums over the action's dimensions: twice the dimensions, twice
    the value.
    """
    old, new = torch.randn(2, 5, 3 if discrete else 6)
    actions = torch.randint(3, (5,)).double() if discrete else torch.randn(5, 3)
    distribution = partial(module.distribution, discrete=discrete)
    log_prob = distribution(old).log_prob(actions)
    kl = kl_divergence(distribution(old), distribution(new))
    torch.testing.assert_close(log_prob, log_density(old, actions, discrete))
    torch.testing.assert_close(kl, divergence(old, new, discrete))
    assert log_prob.shape == kl.shape == (5,)
    if not discrete:
        old, new = (torch.cat([m, m, s, s], -1) for m, s in (old.chunk(2, -1), new.chunk(2, -1)))
        twice = distribution(old).log_prob(torch.cat([actions, actions], -1))
        torch.testing.assert_close(twice, 2 * log_prob)
        torch.testing.assert_close(kl_divergence(distribution(old), distribution(new)), 2 * kl)


def test_the_initial_policy_has_a_standard_deviation_of_1_and_biases_of_0():
    """The standard deviation cannot fall below 1e-6."""
    space = gym.spaces.Box(-1, 1, (3,))
    policy = in_units(module.Policy(2, space, make_args()))
    mean, log_std = policy(torch.zeros(7, 2)).chunk(2, -1)
    assert torch.equal(mean, torch.zeros(7, 3))
    assert torch.equal(log_std, torch.zeros(7, 3))
    narrow = in_units(module.Policy(2, space, make_args(init_std=0.3)))
    torch.testing.assert_close(narrow(torch.zeros(2))[3:].exp(), torch.full((3,), 0.3))
    params = dict(policy.named_parameters()) | {"log_std": torch.full((3,), -100.0)}
    narrowest = functional_call(policy, params, (torch.zeros(2),))
    torch.testing.assert_close(narrowest[3:].exp(), torch.full((3,), 1e-6))


# -------------------------------------------------------------------------------- tasks in parallel


@pytest.mark.parametrize("kind", KINDS)
def test_inner_steps_of_many_tasks_are_those_of_each(kind):
    """vmap over tasks equals a loop; another task's data changes nothing.

    The tasks' parameters are not those that collected, as in a trial of the line search.
    """
    p = make_problem(inner_loss=kind)
    params = {name: x + 0.1 * torch.randn_like(x) for name, x in p.adapted.items()}
    alpha = {name: 0.1 + torch.rand_like(x) for name, x in p.meta.items()}
    step = vmap(partial(module.inner_step, step_sizes=alpha, policy=p.policy, args=p.args))
    adapted = step(params, p.outer)
    for i in range(p.n):
        theta = of_task(params, i)
        gradient = plain_gradient(p, theta, of_task(p.outer, i))
        for name, x in theta.items():
            torch.testing.assert_close(adapted[name][i], x - alpha[name] * gradient[name])
    p.outer["advantages"][1] *= -3
    again = step(params, p.outer)
    for name in adapted:
        assert torch.equal(adapted[name][[0, 2]], again[name][[0, 2]])
        assert (adapted[name][1] - again[name][1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lvc", "lvc-std"])
@pytest.mark.parametrize("sizes", [{}, {"e": 3, "t": 1000}], ids=str)
def test_adapted_policies_of_many_tasks_are_those_of_each(kind, sizes):
    """So too after two inner steps, with the gradient, and when the tasks (here 3 x 3000 steps) go
    in chunks.
    """
    p = make_problem(num_steps=2, inner_loss=kind, sizes=sizes)
    together, pull = vjp(map_of(p), p.vector)
    cotangent, gradient = torch.randn_like(together), torch.zeros_like(p.vector)
    torch.testing.assert_close(together, p.outer["dist_params"])
    for i in range(p.n):
        one = slice(i, i + 1)
        inner = [of_task(batch, one) for batch in p.inner]
        of_one = map_of(p, inner, of_task(p.outer, one))
        alone, pull_alone = vjp(of_one, p.vector)
        torch.testing.assert_close(alone[0], together[i])
        gradient += pull_alone(cotangent[one])[0]
    assert error(pull(cotangent)[0], gradient) < 1e-10
    p.inner[0]["advantages"][1] *= -3
    changed = (map_of(p)(p.vector) - together).abs().amax((1, 2, 3))
    assert changed[1] > 0.001
    assert changed[[0, 2]].max() < 1e-12


@pytest.mark.parametrize("kind", ["lvc", "lvc-std"])
def test_padding_is_without_influence(kind):
    """Garbage after the episodes' ends changes neither advantages nor inner step nor meta-update."""
    p = make_problem(inner_loss=kind)
    theta, alpha = of_task(p.adapted, 0), dict.fromkeys(p.meta, 0.5)
    batch = p.outer | {"rewards": torch.randn(p.n, 3, 4) * p.outer["mask"]}

    def results():
        advantages = module.standardised_advantages(batch, p.args)
        adapted = module.inner_step(theta, of_task(p.outer, 0), alpha, p.policy, p.args)
        vector, logged = update(p, cg_damping=0.1)
        return advantages, adapted, gradient_of(p), vector - p.vector, logged

    before = results()
    for data in (*p.inner, p.outer):
        for name in ("obs", "advantages"):
            data[name][data["mask"] == 0] = 1e6
        data["logprobs"][data["mask"] == 0] = -1e6
    assert (batch["obs"] == 1e6).any()
    after = results()
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    assert (after[0][batch["mask"] == 0] == 0).all()
    for name, x in after[1].items():
        torch.testing.assert_close(x, before[1][name], rtol=1e-12, atol=1e-12)
    assert error(after[2], before[2]) < 1e-10
    assert error(after[3], before[3]) < 1e-6
    assert after[4] == pytest.approx(before[4], rel=1e-6)


# --------------------------------------------------------------------------------------- advantages


def test_linear_baseline():
    """Ridge regression of every task by itself, on the steps that count."""
    n, e, t = 3, 4, 30
    mask, returns = ragged_mask(n, e, t), torch.randn(n, e, t)
    obs = 4 * torch.randn(n, e, t, 2)  # some beyond ±10
    obs[0, 0, 0] = 1e3
    values = module.linear_baseline(obs, returns, mask)
    for i in range(n):
        valid = mask[i].numpy() == 1
        o = obs[i].numpy()[valid].clip(-10, 10)
        time = np.broadcast_to(np.arange(t) / 100, (e, t))[valid][:, None]
        x = np.hstack([o, o**2, time, time**2, time**3, np.ones_like(time)])
        augmented = np.vstack([x, np.sqrt(1e-5) * np.eye(8)])
        targets = np.append(returns[i].numpy()[valid], np.zeros(8))
        weights = np.linalg.lstsq(augmented, targets, rcond=None)[0]
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


def test_discounted_sum_is_a_loop_from_the_end():
    x, total = torch.randn(2, 3, 7), torch.zeros(2, 3)
    for t in reversed(range(7)):
        total = x[..., t] + 0.9 * total
        torch.testing.assert_close(module.discounted_sum(x, 0.9)[..., t], total)
    torch.testing.assert_close(module.discounted_sum(x, 0), x)
    torch.testing.assert_close(module.discounted_sum(x, 1)[..., 0], x.sum(-1))


@pytest.mark.parametrize("gae_lambda", [0, 0.7, 1])
def test_gae_is_the_double_sum(gae_lambda):
    """λ = 0 is the error of one step, λ = 1 the return to go less the value. Padding is ignored."""
    rewards, values, mask = torch.randn(2, 3, 5), torch.randn(2, 3, 5), ragged_mask(2, 3, 5)
    gamma = 0.9
    garbage = 1e6 * (1 - mask)
    advantages = module.gae(rewards + garbage, values + garbage, mask, gamma, gae_lambda)
    for i, j in np.ndindex(2, 3):
        length = int(mask[i, j].sum())
        r, v = rewards[i, j].tolist(), [*values[i, j].tolist(), 0]
        v[length] = 0
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(5):
            expected = sum((gamma * gae_lambda) ** (s - t) * errors[s] for s in range(t, length))
            assert advantages[i, j, t].item() == pytest.approx(expected, abs=1e-12)
            if gae_lambda == 1 and t < length:
                to_go = sum(gamma ** (s - t) * r[s] for s in range(t, length))
                assert advantages[i, j, t].item() == pytest.approx(to_go - v[t], abs=1e-12)


def test_standardised_advantages():
    """Mean 0 and standard deviation 1 per task, of the estimates against its own baseline."""
    mask, args = ragged_mask(3, 4, 5), make_args()
    rewards = 10 * torch.randn(3, 4, 5) * torch.tensor([0.1, 1, 10])[:, None, None] * mask
    batch = {"obs": torch.randn(3, 4, 5, 2), "rewards": rewards, "mask": mask}
    advantages = module.standardised_advantages(batch, args)
    values = module.linear_baseline(batch["obs"], module.discounted_sum(rewards, 0.9), mask)
    raw = module.gae(rewards, values, mask, 0.9, 0.8)
    for i in range(3):
        valid, x = advantages[i][mask[i] == 1], raw[i][mask[i] == 1]
        assert valid.mean().item() == pytest.approx(0, abs=1e-12)
        assert valid.std(correction=0).item() == pytest.approx(1, abs=1e-6)
        expected = (x - x.mean()) / x.std(correction=0)
        torch.testing.assert_close(valid, expected, rtol=1e-6, atol=1e-6)
    assert (advantages[mask == 0] == 0).all()
    batch["rewards"] = torch.zeros_like(rewards)  # nothing to learn from, and no division by 0
    assert torch.equal(module.standardised_advantages(batch, args), torch.zeros(3, 4, 5))


# --------------------------------------------------------------------------------------- collection


def collector(env_id, n, e, **flags):
    """n random policies for n tasks, and what it takes to collect e episodes with each."""
    envs = module.make_envs(env_id)
    horizon = envs.horizon
    args = make_args(env_id=env_id, horizon=horizon, episodes_per_task=e, **flags)
    policy = in_units(
        module.Policy(envs.single_observation_space.shape[0], envs.single_action_space, args)
    )
    params = {
        name: x.detach() + 0.5 * torch.randn(n, *x.shape) for name, x in policy.named_parameters()
    }
    tasks = envs.sample_tasks(n, np.random.default_rng(0))
    return policy, params, tasks, args


@pytest.mark.parametrize("env_id", ["PointRobot-v0", "ProbeBox-v0", "ProbeDiscrete-v0"])
def test_collect_acts_with_each_tasks_own_policy_and_the_keys_noise(env_id):
    """Log-probabilities, rewards and advantages are those of what was done."""
    policy, params, tasks, args = collector(env_id, n=3, e=4)
    key = ("train", 5, 0)
    batch = module.collect(params, tasks, key, policy, args)
    greedy = module.collect(params, tasks, key, policy, args, deterministic=True)
    generator = module.keyed_generator(args, *key)
    envs = module.make_envs(env_id, 12)
    module.reset_lanes(envs, tasks.repeat(4, axis=0), generator)
    noise = module.draw_noise(envs.single_action_space, (3, 4, args.horizon), generator)
    for data, scale in ((batch, 1), (greedy, 0)):
        length = data["mask"].shape[-1]
        for i in range(3):
            x = of_task(data, i)
            dist_params = functional_call(policy, of_task(params, i), (x["obs"],))
            actions = actions_from(dist_params, scale * noise[i, :, :length], policy.discrete)
            taken = x["mask"] if policy.discrete else x["mask"][..., None]
            torch.testing.assert_close(x["actions"].double(), actions * taken)
            torch.testing.assert_close(x["dist_params"], dist_params)
            expected = log_density(dist_params, x["actions"], policy.discrete)
            torch.testing.assert_close(x["logprobs"], expected)
    if env_id != "PointRobot-v0":
        assert batch["mask"].shape[-1] <= 3
        assert 0 < batch["mask"].mean() < 1
        assert (batch["rewards"][batch["mask"] == 0] == 0).all()
    assert torch.equal(batch["rewards"], batch["dense_rewards"])
    torch.testing.assert_close(batch["advantages"], module.standardised_advantages(batch, args))


def test_the_rewards_of_training_and_of_the_test_are_two():
    """As are the episodes per task."""
    flags = {"train_reward": "dense", "test_reward": "sparse", "eval_episodes": 20}
    policy, params, tasks, args = collector("SparsePointRobot-v0", n=2, e=3, **flags)
    tasks = np.full_like(tasks, 0.2)  # some episodes come near
    batch = module.collect(params, tasks, ("train", 1), policy, args)
    assert batch["rewards"].shape == (2, 3, 20)
    assert torch.equal(batch["rewards"], batch["dense_rewards"])
    test = module.collect(params, tasks, ("eval", 0), policy, args, test=True)
    assert test["rewards"].shape == (2, 20, 20)
    assert torch.equal(test["rewards"], test["sparse_rewards"])
    assert (test["rewards"] > 0).any()
    assert not torch.equal(test["rewards"], test["dense_rewards"])
    torch.testing.assert_close(test["advantages"], module.standardised_advantages(test, args))


@pytest.mark.parametrize("env_id", ["PointRobot-v0", "ProbeBox-v0", "ProbeDiscrete-v0"])
def test_meta_update_starts_where_the_data_was_collected(env_id):
    """From collection to update, everything agrees: the ratios are 1, so that the surrogate is
    -mean A = 0; KL 0.
    """
    policy, params, tasks, args = collector(env_id, n=3, e=4, inner_lr=0.5)
    theta = of_task(params, 0)
    params = {name: x.expand(3, *x.shape) for name, x in theta.items()}
    step_sizes = dict.fromkeys(theta, 0.5)
    adapt = vmap(partial(module.inner_step, step_sizes=step_sizes, policy=policy, args=args))
    inner = []
    for k in range(2):
        inner.append(module.collect(params, tasks, ("train", k), policy, args))
        params = adapt(params, inner[k])
    outer = module.collect(params, tasks, ("train", 2), policy, args)
    p = SimpleNamespace(args=args, policy=policy, meta=theta, inner=inner, outer=outer, n=3)
    p.vector = parameters_to_vector(theta.values())
    torch.testing.assert_close(map_of(p)(p.vector), outer["dist_params"], rtol=1e-12, atol=1e-12)
    outer["advantages"] = outer["advantages"] + torch.tensor([1.0, 2.0, 6.0])[:, None, None]
    # every task counts the same, whatever its number of steps
    assert values_at_start(p) == pytest.approx([-3, 0], abs=1e-9)


def test_discrete_actions_are_draws_from_the_softmax():
    """Frequencies within four standard errors, in every task."""
    policy, params, tasks, args = collector("ProbeLong-v0", n=2, e=4)
    batch = module.collect(params, tasks, ("train", 0), policy, args)
    p = batch["dist_params"].softmax(-1)[:, 0, 0]  # all observations are the same
    assert p.min() > 0.02
    for action in range(3):
        frequency = (batch["actions"] == action).double().mean((1, 2))
        errors = (p * (1 - p) / 4000).sqrt()[:, action]
        assert ((frequency - p[:, action]).abs() < 4 * errors).all()


# ------------------------------------------------------------------------------------ the meta-test


@pytest.mark.parametrize("deterministic", [False, True])
def test_meta_test_is_adaptation_from_the_initial_parameters(deterministic):
    """In groups of tasks, of which the last wraps around; steps after the first are shorter. Mean
    actions are scored and not adapted to.
    """
    flags = {"meta_batch_size": 4, "num_eval_steps": 3, "eval_episodes": 3, "eval_lr_decay": 0.4}
    flags |= {"inner_lr": 0.5, "deterministic_eval": deterministic}
    policy, params, _, args = collector("PointRobot-v0", n=4, e=2, **flags)
    tasks = module.make_envs("PointRobot-v0").sample_tasks(5, np.random.default_rng(1))
    theta = of_task(params, 0)
    scores, episodes = module.evaluate(theta, tasks, policy, args)

    p = SimpleNamespace(policy=policy, args=args)
    expected = np.zeros((4, 5))
    for first, rows in ((0, [0, 1, 2, 3]), (4, [4, 0, 1, 2])):
        phi = [theta] * 4
        for k in range(4):
            params = {name: torch.stack([x[name] for x in phi]) for name in theta}
            play = partial(module.collect, params, tasks[rows], ("eval", first, k), policy, args)
            batch = play(test=True)
            played = play(test=True, deterministic=True) if deterministic else batch
            expected[k, rows[: 5 - first]] = played["rewards"].sum(-1).mean(1)[: 5 - first]
            if first == 0:
                assert torch.allclose(episodes[f"obs_{k}"], batch["obs"])
            alpha = 0.5 if k == 0 else 0.2
            for i in range(4):
                g = plain_gradient(p, phi[i], of_task(batch, i))
                phi[i] = {name: x - alpha * g[name] for name, x in phi[i].items()}
    np.testing.assert_allclose(scores["return"], expected)
    assert set(scores) == {"return"} | ({"sampled_return"} if deterministic else set())


# ------------------------------------------------------------------------------------------- probes


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own and in single precision; returns
    its metrics.
    """
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    settings = {"meta_batch_size": 12, "episodes_per_task": 20, "hidden_size": 8, "max_kl": 0.05}
    settings |= {"num_test_tasks": 30, "total_timesteps": 20_000, "num_threads": 1}
    settings |= {"eval_every": 1000}
    return lambda **changes: module.main(module.Args(**(settings | changes)))


CONTINUOUS = {"env_id": "ProbeBox-v0", "inner_lr": 0.08}
DISCRETE = {"env_id": "ProbeDiscrete-v0", "inner_lr": 0.15}
TWO_STEPS = {"num_inner_steps": 2, "total_timesteps": 30_000, "inner_lr": 0.06}


@pytest.mark.parametrize(
    "settings",
    [
        CONTINUOUS,
        CONTINUOUS | TWO_STEPS,
        DISCRETE,
        DISCRETE | {"learn_inner_lr": True, "first_order": True},
    ],
    ids=str,
)
def test_probe_is_learned(probe, settings):
    """Of 1 at most, training comes from below 0.7 to above 0.8 after adaptation, and stays blind
    before.
    """
    blind = 0 if settings["env_id"] == "ProbeBox-v0" else 1 / 3
    num_steps = settings.get("num_inner_steps", 1)
    tag = f"eval/return_after_{20 * num_steps}_episodes"
    trained = probe(num_eval_steps=num_steps, **settings)
    assert 0.8 < trained[tag] <= 1
    assert trained["eval/return_after_0_episodes"] == pytest.approx(blind, abs=0.15)
    assert probe(num_eval_steps=num_steps, **settings | {"total_timesteps": 1})[tag] < 0.7


@pytest.mark.parametrize(("settings", "blind"), [(CONTINUOUS, 0), (DISCRETE, 1 / 3)], ids=str)
def test_probe_is_not_learned_without_adaptation(probe, settings, blind):
    """No policy that does the same in all tasks does better than blind."""
    scores = probe(num_eval_steps=1, **settings | {"inner_lr": 1e-9})
    assert scores["eval/return_after_20_episodes"] == pytest.approx(blind, abs=0.15)
