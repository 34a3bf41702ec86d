"""maesn.py: its mathematics against closed forms and plain loops, its meta-test, and a family learned in seconds."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_maml_trpo import central_differences, divergence, error, log_density, of_task, ragged_mask
from torch.distributions import Normal
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.utils import parameters_to_vector

import maesn as module
import maml_trpo

Z, ROWS = 2, np.array([3, 0, 3])  # of a table of five; one of them twice
LR = {"mu": 0.7, "log_sigma": 0.3}


@pytest.fixture(autouse=True)
def settings():
    """Double precision and fixed draws; leaves nothing set."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------- the same algorithm once more, in loops


def valid_steps(batch):
    """What a batch of one task has for every step, without the padding: (steps, ...)."""
    return {name: x[batch["mask"] == 1] for name, x in batch.items() if x.shape[:2] == batch["mask"].shape}


def plain_step(problem, phi, theta, batch, lr):
    """The step of one task: the latent's closed form, and autograd for weights."""
    new, sigma, advantages = dict(phi), phi["log_sigma"].exp(), batch["episode_advantages"]
    score = {"mu": 0, "log_sigma": 0}
    for z, a in zip(batch["z"], advantages, strict=True):
        score["mu"] = score["mu"] + (z - phi["mu"]) / sigma**2 * a / len(advantages)
        score["log_sigma"] = score["log_sigma"] + ((z - phi["mu"]) ** 2 / sigma**2 - 1) * a / len(advantages)
    for name in score.keys() & lr.keys():
        new[name] = phi[name] + lr[name] * score[name]
    if weights := {name: phi[name].detach().requires_grad_() for name in theta.keys() & phi.keys()}:
        z = batch["z"].unsqueeze(1).expand(*batch["mask"].shape, -1)
        data = valid_steps(batch | {"z": z})
        dist = functional_call(problem.policy, weights, (data["obs"], data["z"]))
        ratio = (log_density(problem.policy, dist, data["actions"]) - data["logprobs"]).exp()
        grads = torch.autograd.grad((ratio * data["advantages"]).mean(), list(weights.values()))
        new |= {name: phi[name] + lr[name] * g for name, g in zip(weights, grads, strict=True)}
    return new


def plain_phi(problem, vector, i):
    """φ of task i after adaptation, and θ."""
    meta = dict(zip(problem.meta, vector.split([p.numel() for p in problem.meta.values()]), strict=True))
    meta = {name: p.view(problem.meta[name].shape) for name, p in meta.items()}
    theta = {name: p for name, p in meta.items() if name.startswith("net") or name == "log_std"}
    lr = {name[7:]: p.exp() for name, p in meta.items() if name.startswith("log_lr.")}
    phi = {name: meta[name][ROWS[i]] for name in ("mu", "log_sigma")}
    phi |= {name: p for name, p in theta.items() if name in lr}
    for batch in problem.inner:
        phi = plain_step(problem, phi, theta, of_task(batch, i), lr)
    return phi, theta


def plain_dist(policy, phi, theta, obs, eps):
    """What task i does, episode by episode and step by step: the ε of an episode makes one z for all of its steps."""
    weights = {name: phi.get(name, p) for name, p in theta.items()}
    z = [phi["mu"] + phi["log_sigma"].exp() * e for e in eps]
    steps = [[functional_call(policy, weights, (o, z_e)) for o in episode] for episode, z_e in zip(obs, z, strict=True)]
    return torch.stack([torch.stack(episode) for episode in steps])


def plain_losses(problem, vector):
    """Surrogate with the weighted KL to the prior, and the KL of actions, (2,)."""
    losses, latents = [], dict(zip(problem.meta, vector.split([p.numel() for p in problem.meta.values()]), strict=True))
    for i in range(len(ROWS)):
        phi, theta = plain_phi(problem, vector, i)
        batch = of_task(problem.outer, i)
        dist = plain_dist(problem.policy, phi, theta, batch["obs"], batch["eps"])[batch["mask"] == 1]
        batch = valid_steps(batch)
        ratio = (log_density(problem.policy, dist, batch["actions"]) - batch["logprobs"]).exp()
        surrogate, kl = -(ratio * batch["advantages"]).mean(), divergence(problem.policy, batch["dist"], dist).mean()
        mu, log_sigma = (latents[name].view(5, Z)[ROWS[i]] for name in ("mu", "log_sigma"))
        prior = 0.5 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum()
        losses.append(torch.stack([surrogate + problem.weight * prior, kl]))
    return torch.stack(losses).mean(0).detach()


# -------------------------------------------------------------------------------------------------------- the test data


def make_batch(policy, phi, theta, e=4, t=3):
    """Episodes of random observations, with zeros after their ends as those of rollout, and random advantages."""
    n, mask = len(ROWS), ragged_mask(len(ROWS), e, t)
    obs, eps = torch.randn(n, e, t, 2) * mask[..., None], torch.randn(n, e, Z)
    dist = [plain_dist(policy, of_task(phi, i), theta, obs[i], eps[i]) for i in range(n)]
    mean, log_std = (dist := torch.stack(dist)).chunk(2, -1)
    actions = (mean + log_std.exp() * torch.randn_like(mean)) * mask[..., None]
    whitened = torch.randn(n, e)
    whitened = (whitened - whitened.mean(1, keepdim=True)) / whitened.std(1, correction=0, keepdim=True)
    batch = {"obs": obs, "eps": eps, "z": module.latent(phi, eps), "actions": actions, "mask": mask, "dist": dist}
    batch |= {"advantages": torch.randn(n, e, t) * mask, "episode_advantages": whitened}
    return {name: x.detach() for name, x in batch.items()} | {"logprobs": log_density(policy, dist, actions).detach()}


def make_problem(num_steps=1, adapt_policy=False, latent_adaptation=True, weight=0.3):
    """A small policy, its meta-parameters, and batches collected on the way of its adaptation to the tasks of ROWS."""
    policy = module.Policy(2, Z, gym.spaces.Box(-1, 1, (2,)), 4)
    meta = {name: p.detach() + 0.3 * torch.randn_like(p) for name, p in policy.named_parameters()}
    steps = {name: p for name, p in meta.items() if adapt_policy}
    meta |= {"mu": torch.randn(5, Z), "log_sigma": 0.3 * torch.randn(5, Z)}
    steps |= {"mu": torch.zeros(Z), "log_sigma": torch.zeros(Z)} if latent_adaptation else {}
    meta |= {f"log_lr.{name}": -1 + 0.3 * torch.randn_like(p) for name, p in steps.items()}
    problem = SimpleNamespace(policy=policy, meta=meta, inner=[], weight=weight)
    problem.vector = parameters_to_vector(meta.values())
    for k in range(num_steps + 1):
        found = [plain_phi(problem, problem.vector, i) for i in range(len(ROWS))]
        phi, theta = {name: torch.stack([p[name] for p, _ in found]).detach() for name in found[0][0]}, found[0][1]
        batch = make_batch(policy, phi, theta)
        problem.inner += [batch] if k < num_steps else []
    problem.outer, problem.phi, problem.theta = batch, phi, theta
    problem.dist_of = partial(
        module.adapted_distributions,
        like=meta,
        rows=ROWS,
        inner_batches=problem.inner,
        outer_batch=batch,
        policy=policy,
    )
    problem.penalty = partial(module.latent_kl, like=meta, rows=ROWS, weight=weight)
    return problem


@pytest.fixture
def update(monkeypatch):
    """meta_update on a problem; returns the new vector, what was logged, and what is inside the function."""
    solve = module.conjugate_gradient

    def run(problem, cg_damping=1e-5):
        seen = SimpleNamespace()

        def conjugate_gradient(product, b, iters):
            seen.product, seen.gradient = product, b
            return solve(product, b, iters)

        monkeypatch.setattr(module, "conjugate_gradient", conjugate_gradient)
        arguments = (problem.vector, problem.dist_of, problem.outer, problem.policy, 0.01, 10, cg_damping)
        seen.vector, seen.logged = module.meta_update(*arguments, penalty=problem.penalty)
        return seen

    return run


VARIANTS = [{}, {"num_steps": 2}, {"adapt_policy": True}, {"adapt_policy": True, "num_steps": 2}]
VARIANTS += [{"latent_adaptation": False, "num_steps": 0}, {"latent_adaptation": False, "adapt_policy": True}]

# ---------------------------------------------------------------------------------------------------- the meta-gradient


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_meta_gradient(update, variant):
    """In everything: weights, rows (one of them for two tasks), α; through z' and through the inner steps."""
    problem = make_problem(**variant)
    seen = update(problem)
    assert error(seen.gradient, central_differences(lambda x: plain_losses(problem, x)[0], problem.vector)) < 1e-6
    by_name = module.unflatten(seen.gradient, problem.meta)
    assert all(g.abs().max() > 1e-6 for g in by_name.values())
    assert (by_name["mu"][[1, 2, 4]] == 0).all() and (by_name["log_sigma"][[1, 2, 4]] == 0).all()
    old, new = plain_losses(problem, problem.vector).tolist(), plain_losses(problem, seen.vector).tolist()
    assert [seen.logged["losses/surrogate"], seen.logged["losses/kl"]] == pytest.approx(new, rel=1e-9)
    assert new[0] < old[0] and 0 < new[1] <= 0.01


def test_rows_of_other_tasks_stay_as_they_are(update):
    """Bit for bit, while those of the meta-batch move."""
    problem = make_problem()
    after = module.unflatten(update(problem).vector, problem.meta)
    for name in ("mu", "log_sigma"):
        assert torch.equal(after[name][[1, 2, 4]], problem.meta[name][[1, 2, 4]])
        assert (after[name][[0, 3]] != problem.meta[name][[0, 3]]).all()


def test_fisher_product(update):
    """It is the Hessian of the KL of actions, plus damping; the KL to the prior has no part in it."""
    problem = make_problem()
    product = update(problem, cg_damping=0.01).product
    matrix = torch.stack([product(e) for e in torch.eye(len(problem.vector))])
    weight = problem.outer["mask"] / (problem.outer["mask"].sum((1, 2), keepdim=True) * len(ROWS))

    def mean_kl(vector):
        return (weight * divergence(problem.policy, problem.outer["dist"], problem.dist_of(vector))).sum()

    assert error(matrix, hessian(mean_kl)(problem.vector) + 0.01 * torch.eye(len(problem.vector))) < 1e-10


def test_kl_to_the_prior():
    """Of the rows as they are before adaptation, summed over dimensions, a mean over tasks."""
    problem = make_problem()
    mu, sigma = problem.meta["mu"][ROWS], problem.meta["log_sigma"][ROWS].exp()
    expected = torch.distributions.kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(-1).mean()
    torch.testing.assert_close(module.latent_kl(problem.vector, problem.meta, ROWS), expected)
    torch.testing.assert_close(problem.penalty(problem.vector), problem.weight * expected)
    other = problem.meta | {name: p + 1 for name, p in problem.meta.items() if name.startswith(("log_lr", "net"))}
    assert torch.equal(problem.penalty(parameters_to_vector(other.values())), problem.penalty(problem.vector))


# ------------------------------------------------------------------------------------------------------- the adaptation


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[2:3], ids=str)
def test_inner_step_is_the_closed_form(variant):
    """For every task by itself, also when all are computed at once."""
    problem = make_problem(**variant)
    theta, _, lr = module.split(problem.meta)
    step = partial(module.inner_step, lr=lr, policy=problem.policy)
    at_once = vmap(step, in_dims=(0, None, 0))(problem.phi, theta, problem.outer)
    for i in range(len(ROWS)):
        phi, batch = of_task(problem.phi, i), of_task(problem.outer, i)
        expected = plain_step(problem, phi, theta, batch, lr)
        assert expected.keys() == phi.keys() == at_once.keys()
        for name, p in step(phi, theta, batch).items():
            torch.testing.assert_close(p, expected[name])
            torch.testing.assert_close(at_once[name][i], expected[name])
            assert not torch.equal(p, phi[name])


def test_derivatives_of_the_inner_step():
    """z is a constant and Â has mean 0: μ' moves one to one with μ, and with α along the score."""
    problem = make_problem()
    theta, _, lr = module.split(problem.meta)
    phi, batch = of_task(problem.phi, 0), of_task(problem.outer, 0)

    def mean(mu, lr_mu):
        return module.inner_step(phi | {"mu": mu}, theta, batch, lr | {"mu": lr_mu}, problem.policy)["mu"]

    torch.testing.assert_close(jacrev(mean)(phi["mu"], lr["mu"]), torch.eye(Z))
    score = ((batch["z"] - phi["mu"]) / phi["log_sigma"].exp() ** 2 * batch["episode_advantages"][:, None]).mean(0)
    torch.testing.assert_close(jacrev(mean, argnums=1)(phi["mu"], lr["mu"]), torch.diag(score))


def test_without_latents_it_is_the_step_of_maml():
    """A policy that does not read z and adapts its weights takes maml_trpo.py's inner step."""
    problem = make_problem(adapt_policy=True, latent_adaptation=False)
    theta, _, lr = module.split(problem.meta)
    theta["net.0.weight"][:, 2:] = 0
    dist = vmap(partial(module.act, theta, policy=problem.policy), in_dims=(None, 0, 0))(
        {}, problem.outer["obs"], torch.zeros(1, 1, Z).expand(3, 1, 1, Z)
    )
    batch = of_task(problem.outer | {"logprobs": log_density(problem.policy, dist, problem.outer["actions"])}, 0)
    phi = of_task(module.start(theta, {"mu": torch.zeros(1, Z), "log_sigma": torch.zeros(1, Z)}, lr), 0)
    adapted = module.inner_step(phi, theta, batch, lr, problem.policy)
    twin = maml_trpo.Policy(2, gym.spaces.Box(-1, 1, (2,)), 4)
    blind = theta | {"net.0.weight": theta["net.0.weight"][:, :2]}
    blind_lr = lr | {"net.0.weight": lr["net.0.weight"][:, :2]}
    expected = maml_trpo.inner_step(blind, batch, blind_lr, twin, "lvc")
    for name, p in expected.items():
        torch.testing.assert_close(adapted[name][:, :2] if name == "net.0.weight" else adapted[name], p)
        assert not torch.equal(p, blind[name])
    assert torch.equal(adapted["mu"], phi["mu"]) and torch.equal(adapted["log_sigma"], phi["log_sigma"])


def episodes_with(rewards, t=5):
    """A batch of one task whose episodes have these rewards."""
    return {
        "rewards": rewards,
        "obs": torch.randn(1, 1, t, 2).expand(1, rewards.shape[1], t, 2),
        "mask": torch.ones_like(rewards),
    }


def test_episode_advantages():
    """The discounted return, standardised over a task's episodes; where all start alike the baseline drops out."""
    batch = episodes_with(torch.randn(1, 7, 5))
    advantages = module.episode_advantages(batch, 0.9)
    returns = (batch["rewards"] * 0.9 ** torch.arange(5.0)).sum(-1)
    torch.testing.assert_close(advantages, (returns - returns.mean()) / returns.std(correction=0))
    changed = batch | {"rewards": 100 * batch["rewards"] - 3}
    torch.testing.assert_close(module.episode_advantages(changed, 0.9), advantages, rtol=1e-6, atol=1e-6)
    two = {name: torch.cat([x, x]) for name, x in batch.items()}
    two["rewards"][1] = 0.1 + 1e-12 * torch.randn(7, 5)  # each task by itself: here returns are equal but for rounding
    both = module.episode_advantages(two, 0.9)
    torch.testing.assert_close(both[:1], advantages)
    assert torch.equal(both[1], torch.zeros(7))


def test_the_baseline_takes_off_what_the_start_explains():
    """Returns that are a linear function of the first observation leave no signal to speak of, noise on them does."""
    obs, noise = torch.randn(1, 200, 1, 2), torch.randn(1, 200, 1)
    batch = {"obs": obs, "mask": torch.ones(1, 200, 1), "rewards": 30 * obs[..., 0] + noise}
    advantages = module.episode_advantages(batch, 0.9)
    assert np.corrcoef(advantages[0], noise[0, :, 0])[0, 1] > 0.95


@pytest.mark.parametrize("halving", [True, False])
def test_a_bandit(halving):
    """z is the action: the first step points to the best z, a shrinking α arrives there, a constant one leaves."""
    best, phi, generator = (
        torch.tensor([1.6, -0.8]),
        {"mu": torch.zeros(1, Z), "log_sigma": torch.zeros(1, Z)},
        torch.Generator(),
    )
    generator.manual_seed(0)
    policy, distances = module.Policy(2, Z, gym.spaces.Box(-1, 1, (2,)), 4), []
    for k in range(30):
        z = module.latent(phi, torch.randn(1, 200, Z, generator=generator))
        batch = episodes_with(-((z - best) ** 2).sum(-1, keepdim=True), t=1)
        batch |= {"z": z, "episode_advantages": module.episode_advantages(batch, 0.99)}
        lr = dict.fromkeys(phi, 0.5 ** max(0, k - 1) if halving else 1.0)
        old = phi["mu"]
        phi = vmap(partial(module.inner_step, lr=lr, policy=policy), in_dims=(0, None, 0))(phi, {}, batch)
        if k == 0:
            assert torch.cosine_similarity(phi["mu"] - old, best - old).item() > 0.9
        distances.append((phi["mu"] - best).norm().item())
    assert (max(distances[5:]) < 0.4) == halving and (distances[-1] > 2) == (not halving)


# ----------------------------------------------------------------------------------------------------------- the policy


def test_the_policy_reads_the_direction_of_z():
    """At the length √Z, and of z = 0 nothing; without normalisation it reads z itself."""
    obs, z = torch.randn(7, 2), 5 * torch.randn(7, Z)
    for normalise, read in ((True, z / z.norm(dim=1, keepdim=True) * Z**0.5), (False, z)):
        policy = module.Policy(2, Z, gym.spaces.Box(-1, 1, (2,)), 4, init_std=0.3, normalise_latent=normalise)
        mean, log_std = policy(obs, z).chunk(2, -1)
        torch.testing.assert_close(mean, policy.net(torch.cat([obs, read], -1)))
        torch.testing.assert_close(log_std.exp(), torch.full((7, 2), 0.3))
        assert torch.equal(policy(obs, 0 * z)[:, :2], policy.net(torch.cat([obs, 0 * z], -1)))


# ----------------------------------------------------------------------------------------------------------- collection


class Episodes(gym.Env):
    """Of one to four steps, from random starts; for collect."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)

    def __init__(self, discrete: bool):
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (1,), np.float64)

    def sample_tasks(self, n):
        return self.np_random.normal(size=(n, 1))

    def set_task(self, task):
        self.task = task

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.np_random.integers(1, 5)
        return self.np_random.normal(size=2), {}

    def step(self, action):
        self.left -= 1
        return self.np_random.normal(size=2), float(np.sum(action * self.task)), self.left == 0, False, {}


gym.register("Episodes-v0", Episodes, max_episode_steps=4, kwargs={"discrete": False})
gym.register("EpisodesDiscrete-v0", Episodes, max_episode_steps=4, kwargs={"discrete": True})


@pytest.mark.parametrize("env_id", ["Episodes-v0", "EpisodesDiscrete-v0"])
def test_collect(env_id):
    """One z per episode, from its task's distribution; actions from the policy's and the rng's noise."""
    n, e = 3, 5
    envs = module.make_envs(env_id, n * e)
    policy = module.Policy(2, Z, envs.single_action_space, 4)
    theta = {name: p.detach() + 0.5 * torch.randn_like(p) for name, p in policy.named_parameters()}
    phi = {"mu": torch.randn(n, Z), "log_sigma": 0.3 * torch.randn(n, Z), "net.4.bias": torch.randn(n, policy.out_size)}
    sizes = {"envs": envs, "policy": policy, "horizon": 4, "gamma": 0.9, "gae_lambda": 0.8, "reward": "dense"}
    collect, tasks = partial(module.collect, theta, phi, **sizes), envs.sample_tasks(n, np.random.default_rng(0))
    batch, greedy = (collect(tasks, np.random.default_rng(5), deterministic=x) for x in (False, True))
    rng = np.random.default_rng(5)
    eps = torch.as_tensor(rng.normal(size=(n * e, Z))).unflatten(0, (n, e))
    noise = (rng.gumbel if policy.discrete else rng.normal)(size=(n * e, 4, policy.out_size))
    noise = torch.as_tensor(noise).unflatten(0, (n, e))[:, :, : batch["mask"].shape[-1]]
    assert 0 < batch["mask"].mean() < 1
    for data, scale in ((batch, 1), (greedy, 0)):
        assert torch.equal(data["eps"], eps)
        for i in range(n):
            x = of_task(data, i)
            dist, mask = plain_dist(policy, of_task(phi, i), theta, x["obs"], eps[i]), x["mask"]
            torch.testing.assert_close(x["z"], phi["mu"][i] + phi["log_sigma"][i].exp() * eps[i])
            if policy.discrete:
                actions = (dist + scale * noise[i]).argmax(-1) * mask
            else:
                mean, log_std = dist.chunk(2, -1)
                actions = (mean + log_std.exp() * scale * noise[i]) * mask[..., None]
            torch.testing.assert_close(x["actions"].double(), actions)
            torch.testing.assert_close(x["dist"], dist)
            torch.testing.assert_close(x["logprobs"], log_density(policy, dist, x["actions"]))
    torch.testing.assert_close(batch["advantages"], module.standardised_advantages(batch, 0.9, 0.8))
    torch.testing.assert_close(batch["episode_advantages"], module.episode_advantages(batch, 0.9))
    assert torch.equal(collect(tasks + 1, np.random.default_rng(5))["eps"], eps)


def test_the_sparse_reward():
    """Takes the place of the dense one, in the returns and in both kinds of advantages."""
    envs, policy = module.make_envs("SparsePointRobot-v0", 60), module.Policy(2, Z, gym.spaces.Box(-1, 1, (2,)), 4)
    theta, phi = dict(policy.named_parameters()), {"mu": torch.zeros(3, Z), "log_sigma": torch.zeros(3, Z)}
    sizes = {"envs": envs, "policy": policy, "horizon": 20, "gamma": 0.9, "gae_lambda": 0.8}
    dense, sparse = (
        module.collect(theta, phi, np.full((3, 2), 0.2), np.random.default_rng(0), reward=reward, **sizes)
        for reward in ("dense", "sparse")
    )
    assert torch.equal(sparse["rewards"], dense["sparse_reward"]) and (sparse["rewards"] > 0).any()
    torch.testing.assert_close(sparse["episode_advantages"], module.episode_advantages(sparse, 0.9))
    torch.testing.assert_close(sparse["advantages"], module.standardised_advantages(sparse, 0.9, 0.8))
    for name in ("advantages", "episode_advantages", "rewards"):
        assert not torch.allclose(sparse[name], dense[name])


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_meta_update_starts_where_the_data_was_collected(adapt_policy):
    """From collection to update, everything agrees: what dist_of computes is what was done."""
    envs = module.make_envs("Episodes-v0", 12)
    policy = module.Policy(2, Z, envs.single_action_space, 4)
    meta = {name: p.detach() for name, p in policy.named_parameters()}
    steps = {name: p for name, p in meta.items() if adapt_policy} | dict.fromkeys(("mu", "log_sigma"), torch.zeros(Z))
    meta |= {"mu": torch.randn(5, Z), "log_sigma": torch.randn(5, Z)}
    meta |= {f"log_lr.{name}": torch.full_like(p, -1) for name, p in steps.items()}
    theta, table, lr = module.split(meta)
    phi, tasks = module.start(theta, {name: p[ROWS] for name, p in table.items()}, lr), np.ones((3, 1))
    sizes = {"envs": envs, "policy": policy, "horizon": 4, "gamma": 0.9, "gae_lambda": 0.8, "reward": "dense"}
    inner = module.collect(theta, phi, tasks, np.random.default_rng(0), **sizes)
    phi = vmap(partial(module.inner_step, lr=lr, policy=policy), in_dims=(0, None, 0))(phi, theta, inner)
    outer = module.collect(theta, phi, tasks, np.random.default_rng(1), **sizes)
    vector = parameters_to_vector(meta.values())
    dist = module.adapted_distributions(vector, meta, ROWS, [inner], outer, policy)
    torch.testing.assert_close(dist, outer["dist"], rtol=1e-12, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- the meta-test


def run_evaluate(problem, successes=(), num_steps=5, m=5, group=4):
    """evaluate with a collect and an adapt that do nothing; returns its scores, and the φ and α they were given."""
    seen = SimpleNamespace(phi=[], lr=[], theta=[])

    def collect(theta, phi, tasks, rng, deterministic=False):
        k = len(seen.phi) % (num_steps + 1)
        seen.phi.append(phi)
        success = torch.tensor([[[k in successes and task[0] == 2]] * 3 for task in tasks], dtype=torch.float64)
        return {"rewards": torch.ones(len(tasks), 3, 1), "success": success, "obs": torch.zeros(len(tasks), 3, 1, 2)}

    def adapt(phi, theta, batch, lr):
        seen.lr.append(lr)
        return {name: p + 1 for name, p in phi.items()}

    tasks = np.arange(m)[:, None]
    scores = module.evaluate(
        problem.meta, tasks, collect, adapt, group, num_steps, LR, 0.5, seed=1, paths=(paths := [])
    )
    return scores, seen, paths


def test_meta_test_starts_from_the_prior_with_a_step_size_that_shrinks():
    """Also for the second group of tasks. LatentSpace has learned no step size, and shrinks it a step later."""
    for adapts, expected in ((True, [1, 1, 0.5, 0.25, 0.125]), (False, [1, 1, 1, 0.5, 0.25])):
        problem = make_problem(latent_adaptation=adapts)
        before = {name: p.clone() for name, p in problem.meta.items()}
        _, seen, paths = run_evaluate(problem)
        assert len(seen.phi) == 12 and len(paths) == 6
        for k, phi in enumerate(seen.phi):
            assert phi.keys() == {"mu", "log_sigma"}  # the policy does not adapt
            assert all(torch.equal(p, torch.full((4, Z), float(k % 6))) for p in phi.values())
        for name in ("mu", "log_sigma"):
            alpha = problem.meta[f"log_lr.{name}"].exp() if adapts else LR[name]
            for lr, factor in zip(seen.lr, 2 * expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(lr[name]), torch.as_tensor(factor * alpha))
        assert all(torch.equal(p, before[name]) for name, p in problem.meta.items())


def test_the_policy_adapts_at_meta_test_if_it_did_in_training():
    problem = make_problem(adapt_policy=True)
    _, seen, _ = run_evaluate(problem)
    theta = module.split(problem.meta)[0]
    assert seen.phi[0].keys() == {"mu", "log_sigma"} | theta.keys()
    assert all(torch.equal(seen.phi[6][name][2], p) for name, p in theta.items())


def test_deterministic_episodes_are_scored_but_not_adapted_to():
    problem, read = make_problem(), []

    def collect(theta, phi, tasks, rng, deterministic=False):
        read.append(phi["mu"].max().item())
        return {"rewards": torch.full((len(tasks), 3, 1), 2.0 if deterministic else 1.0)}

    def adapt(phi, theta, batch, lr):
        return phi | {"mu": phi["mu"] + batch["rewards"].mean()}

    for deterministic, score in ((False, 1), (True, 2)):
        rest = {"inner_lr": LR, "lr_decay": 0.5, "seed": 1, "deterministic": deterministic}
        scores = module.evaluate(problem.meta, np.ones((2, 1)), collect, adapt, group=2, num_steps=3, **rest)
        assert (scores["return"] == score).all()
    assert read == [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3]


def test_found():
    """Whether a task had a success in any of the episodes so far."""
    scores, _, _ = run_evaluate(make_problem(), successes=(1, 3))
    assert scores["success"].tolist() == [[0, 0, k in (1, 3), 0, 0] for k in range(6)]
    assert scores["found"].tolist() == [[0, 0, k > 1, 0, 0] for k in range(6)]


def test_found_is_about_the_sampled_episodes_that_were_adapted_to():
    """Mean actions are scored and not adapted to: what they meet or miss is not found, nor lost."""
    problem = make_problem()

    def collect(theta, phi, tasks, rng, deterministic=False):
        hits = torch.as_tensor(tasks[:, 0] == int(deterministic), dtype=torch.float64)  # a task each
        return {"rewards": torch.ones(len(tasks), 3, 1), "success": hits[:, None, None].expand(-1, 3, 1)}

    arguments = (problem.meta, np.array([[0], [1]]), collect, lambda phi, theta, batch, lr: phi)
    rest = {"num_steps": 2, "inner_lr": LR, "lr_decay": 0.5, "seed": 1, "deterministic": True}
    scores = module.evaluate(*arguments, group=2, **rest)
    assert scores["success"].tolist() == [[0, 1]] * 3
    assert scores["found"].tolist() == [[0, 0], [1, 0], [1, 0]]


def test_the_figure(tmp_path, monkeypatch, capsys):
    paths = [torch.randn(2, 50, 20, 3), torch.randn(2, 50, 9, 3)]
    module.episodes_figure(tmp_path / "a.png", paths, np.ones((7, 2)))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and "a.png" in capsys.readouterr().out
    module.episodes_figure(tmp_path / "a.png", paths, np.ones((1, 2)))  # fewer tasks than lanes
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    module.episodes_figure(tmp_path / "b.png", paths, np.zeros((7, 2)))
    output = capsys.readouterr().out
    assert "matplotlib" in output and output.count("\n") == 1 and not (tmp_path / "b.png").exists()


def test_no_set_of_training_tasks():
    with pytest.raises(SystemExit, match=r"^error: --num-train-tasks 0: "):
        module.main(module.Args(num_train_tasks=0))


# --------------------------------------------------------------------------------------------------------------- probes


@pytest.fixture
def train(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own and in single precision; returns its metrics."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    settings = {"env_id": "ProbeBox-v0", "meta_batch_size": 10, "num_train_tasks": 10, "hidden_size": 8, "max_kl": 0.02}
    settings |= {"test_reward": "dense", "total_timesteps": 40_000, "num_threads": 1, "eval_every": 1000}
    settings |= {"num_eval_steps": 3, "eval_episodes": 20}
    return lambda **changes: module.main(module.Args(**(settings | changes)))


def test_probe_is_learned(train):
    """Of 1 at most; blind before adaptation, as are episodes without it."""
    scores = train()
    assert scores["eval/return_after_60_episodes"] > 0.7
    assert scores["eval/return_after_0_episodes"] == pytest.approx(0, abs=0.15)
    assert train(inner_lr=1e-9, sigma_lr=1e-9)["eval/return_after_60_episodes"] == pytest.approx(0, abs=0.15)


def test_a_direction_in_one_dimension_is_refused(train):
    """It is a sign: what the policy does has no gradient in z, so that neither latents nor α would be learned."""
    z = torch.randn(7, 1, requires_grad=True)
    module.Policy(2, 1, gym.spaces.Box(-1, 1, (2,)), 4)(torch.randn(7, 2), z).sum().backward()
    assert z.grad.abs().max() < 1e-5
    with pytest.raises(SystemExit, match=r"^error: --latent-dim 1: .*--latent-dim 2.*--no-normalise-latent$"):
        train(latent_dim=1, total_timesteps=1)
    assert not Path("runs").exists()
    train(latent_dim=1, normalise_latent=False, total_timesteps=1)


def test_flags_reach_the_update(train, monkeypatch):
    """Weight of the KL, spread of the latents, step sizes before training, inner steps."""
    update, seen = module.meta_update, []

    def spy(vector, dist_of, batch, policy, penalty, **settings):
        seen.append((penalty(vector).item(), dist_of.keywords["like"], dist_of.keywords["inner_batches"]))
        return update(vector, dist_of, batch, policy, penalty=penalty, **settings)

    monkeypatch.setattr(module, "meta_update", spy)
    flags = {"num_inner_steps": 2, "inner_lr": 0.3, "sigma_lr": 0.2, "adapt_policy": True, "policy_lr": 0.1}
    for weight, spread in ((1.0, 1.0), (3.0, 1.0), (1.0, 0.0)):
        train(total_timesteps=1, kl_weight=weight, init_mu_std=spread, **flags)
    kl = [penalty for penalty, _, _ in seen]
    assert kl[0] > 0.1 and kl == pytest.approx([kl[0], 3 * kl[0], 0])
    for _, meta, inner_batches in seen:
        assert len(inner_batches) == 2
        for name, alpha in (("mu", 0.3), ("log_sigma", 0.2), ("net.0.weight", 0.1), ("log_std", 0.1)):
            torch.testing.assert_close(meta[f"log_lr.{name}"].exp(), torch.full_like(meta[f"log_lr.{name}"], alpha))


def test_every_training_task_has_a_row_of_its_own(train):
    """Latents that do not adapt learn their tasks by heart, those of all tasks, in meta-batches of half of them."""
    settings = {"latent_adaptation": False, "num_train_tasks": 20, "total_timesteps": 30_000, "kl_weight": 0.01}
    assert train(exp_name="by_heart", **settings)["charts/episodic_return"] > 0.5
    (path,) = Path("runs").glob("*__by_heart__*/checkpoint.pt")
    assert (torch.load(path, weights_only=True)["meta"]["log_sigma"] != 0).all()


def test_latent_space_collects_once_and_has_no_step_sizes(train):
    """An iteration is 10 tasks x 10 episodes of one to three steps, without a phase before adaptation."""
    train(latent_adaptation=False, total_timesteps=1, exp_name="latent_space")
    (path,) = Path("runs").glob("*__latent_space__*/checkpoint.pt")
    checkpoint = torch.load(path, weights_only=True)
    assert 100 <= checkpoint["global_step"] <= 300
    assert not [name for name in checkpoint["meta"] if name.startswith("log_lr")]
