"""maesn.py: its mathematics against closed forms and plain loops, its meta-test, and a family that
is learned in seconds.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
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
    unpack,
    valid_steps,
)
from test_maml_trpo import natural_step  # and ProbeBox-v0 is registered
from test_runs import scalars
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, hessian, jacrev
from torch.nn.utils import parameters_to_vector

import maesn as module
import maml_trpo

double = pytest.fixture(autouse=True)(double_precision)
BOX = gym.spaces.Box(-1, 1, (2,))
LATENTS = ("mu", "log_sigma")
Z = 2
ROWS = torch.tensor([3, 0, 3])  # of a table of five; one of them twice

# ----------------------------------------------------------- the same algorithm once more, in loops


def plain_step(policy, phi, theta, batch, alpha):
    """The step of one task: the latent's closed form, and autograd for weights."""
    new, sigma, advantages = dict(phi), phi["log_sigma"].exp(), batch["episode_advantages"]
    score = {"mu": 0, "log_sigma": 0}
    for z, a in zip(batch["z"], advantages / len(advantages), strict=True):
        score["mu"] = score["mu"] + (z - phi["mu"]) / sigma**2 * a
        score["log_sigma"] = score["log_sigma"] + ((z - phi["mu"]) ** 2 / sigma**2 - 1) * a
    for name in score.keys() & alpha.keys():
        new[name] = phi[name] + alpha[name] * score[name]
    weights = {name: phi[name].detach().requires_grad_() for name in theta.keys() & phi.keys()}
    if weights:
        z = batch["z"].unsqueeze(1).expand(*batch["mask"].shape, -1)
        data = valid_steps(batch | {"z": z})
        dist_params = functional_call(policy, theta | weights, (data["obs"], data["z"]))
        ratio = (log_density(dist_params, data["actions"]) - data["logprobs"]).exp()
        gain = (ratio * data["advantages"]).mean()
        grads = torch.autograd.grad(gain, list(weights.values()))
        new |= {name: phi[name] + alpha[name] * g for name, g in zip(weights, grads, strict=True)}
    return new


def plain_phi(p, vector, i):
    """φ of task i after adaptation, and θ."""
    meta = unpack(vector, p.meta)
    theta = {name: x for name, x in meta.items() if name.startswith("net") or name == "log_std"}
    alpha = {name[7:]: x.exp() for name, x in meta.items() if name.startswith("log_lr.")}
    phi = {name: meta[name][ROWS[i]] for name in LATENTS}
    phi |= {name: x for name, x in theta.items() if name in alpha}
    for batch in p.batches[: p.num_steps]:
        phi = plain_step(p.policy, phi, theta, of_task(batch, i), alpha)
    return phi, theta


def plain_policy(policy, phi, theta, obs, eps):
    """What task i does, episode by episode: the ε of an episode makes one z for all its steps."""
    weights = {name: phi.get(name, x) for name, x in theta.items()}
    episodes = []
    for o, e in zip(obs, eps, strict=True):
        z = phi["mu"] + phi["log_sigma"].exp() * e
        episodes.append(functional_call(policy, weights, (o, torch.stack([z] * len(o)))))
    return torch.stack(episodes)


def plain_losses(p, vector):
    """Surrogate with the weighted KL to the prior, and the KL of actions, (2,)."""
    meta, losses = unpack(vector, p.meta), []
    for i, row in enumerate(ROWS):
        phi, theta = plain_phi(p, vector, i)
        batch = of_task(p.outer, i)
        dist_params = plain_policy(p.policy, phi, theta, batch["obs"], batch["eps"])
        data = valid_steps(batch | {"new": dist_params})
        ratio = (log_density(data["new"], data["actions"]) - data["logprobs"]).exp()
        mu, log_sigma = meta["mu"][row], meta["log_sigma"][row]
        prior = 0.5 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum()
        loss = p.args.kl_weight * prior - (ratio * data["advantages"]).mean()
        losses.append(torch.stack([loss, divergence(data["dist_params"], data["new"]).mean()]))
    return torch.stack(losses).mean(0).detach()


# ------------------------------------------------------------------------------------ the test data


def make_args(**changes):
    rest = {"hidden_size": 3, "gamma": 0.9, "gae_lambda": 0.8, "kl_weight": 0.3}
    return module.Args(**rest | {"inner_lr": 0.7, "sigma_lr": 0.3, "horizon": 4} | changes)


def make_meta(policy, adapt_policy=False, latent_adaptation=True):
    """Meta-parameters with a table of five, moved away from where they start."""
    meta = {name: x.detach() + 0.3 * torch.randn_like(x) for name, x in policy.named_parameters()}
    adapted = dict(meta) if adapt_policy else {}
    if latent_adaptation:
        adapted |= dict.fromkeys(LATENTS, torch.zeros(Z))
    meta |= {"mu": torch.randn(5, Z), "log_sigma": 0.3 * torch.randn(5, Z)}
    alpha = {f"log_lr.{name}": -1 + 0.3 * torch.randn_like(x) for name, x in adapted.items()}
    return meta | alpha


def make_problem(num_steps=1, **adapts):
    """A small policy, its meta-parameters, and batches collected on the way of its adaptation to
    the tasks of ROWS.
    """
    args = make_args()
    policy = in_units(module.Policy(2, BOX, args))
    p = SimpleNamespace(args=args, policy=policy, meta=make_meta(policy, **adapts), batches=[])
    p.vector = parameters_to_vector(p.meta.values())
    for p.num_steps in range(num_steps + 1):
        found = [plain_phi(p, p.vector, i) for i in range(len(ROWS))]
        phi = [{name: x.detach() for name, x in one.items()} for one, _ in found]
        theta, eps, whitened = found[0][1], torch.randn(3, 4, Z), torch.randn(3, 4)

        def does(i, obs, phi=phi, theta=theta, eps=eps):
            return plain_policy(policy, phi[i], theta, obs, eps[i])

        p.phi = {name: torch.stack([x[name] for x in phi]) for name in phi[0]}
        whitened = whitened - whitened.mean(1, keepdim=True)
        batch = make_batch(does, 3, e=4, t=3) | {"eps": eps, "z": module.latent(p.phi, eps)}
        batch["episode_advantages"] = whitened / whitened.std(1, correction=0, keepdim=True)
        p.batches.append(batch)
    p.outer, p.theta = batch, theta
    return p


def data_of(p):
    """What main gives to meta_update."""
    return {"meta": p.meta, "rows": ROWS, "batches": p.batches}


def map_of(p):
    """What the adapted policies do, of the meta-parameters alone."""
    rest = {"data": data_of(p), "policy": p.policy, "args": p.args}
    return partial(module.adapted_policies, **rest)


def update(p, c=0, **flags):
    """meta_update on a problem: the new vector, and what it logs; c·vector is added to the loss."""

    def penalty(vector, data, args):
        return module.weighted_kl(vector, data, args) + (c * vector).sum()

    rest = (module.adapted_policies, p.policy, replace(p.args, **flags), penalty)
    return module.meta_update(p.vector, data_of(p), *rest)


def step_of(p, c=0, **flags):
    """The full step of meta_update, that of the first try of its line search."""
    vector, logged = update(p, c, **flags)
    return (p.vector - vector) / 0.8 ** (logged["losses/line_search_tries"] - 1)


def gradient_of(p):
    """∇S of meta_update: one iteration of conjugate gradient goes along it."""
    return gradient_behind(partial(step_of, p, cg_iters=1), len(p.vector))


VARIANTS = [{}, {"num_steps": 2}, {"adapt_policy": True}, {"adapt_policy": True, "num_steps": 2}]
VARIANTS += [{"latent_adaptation": False, "num_steps": 0}]
VARIANTS += [{"latent_adaptation": False, "adapt_policy": True}]

# -------------------------------------------------------------------------------- the meta-gradient


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_meta_gradient_is_in_everything(variant):
    """Weights, rows (one of them for two tasks), α; through z' and through the inner steps."""
    p = make_problem(**variant)
    gradient = gradient_of(p)
    some = torch.randn(12, len(p.vector))
    numeric = central_differences(lambda x: plain_losses(p, x)[0], p.vector, directions=some)
    assert error(some @ gradient, numeric) < 1e-6
    by_name = unpack(gradient, p.meta)
    assert all(g.abs().max() > 1e-6 for g in by_name.values())
    for name in LATENTS:
        assert by_name[name][[1, 2, 4]].abs().max() < 1e-12
    vector, logged = update(p)
    old, new = plain_losses(p, p.vector).tolist(), plain_losses(p, vector).tolist()
    assert [logged["losses/surrogate"], logged["losses/kl"]] == pytest.approx(new, rel=1e-9)
    assert new[0] < old[0]
    assert 0 < new[1] <= 0.01


def test_rows_of_other_tasks_stay_as_they_are():
    """Bit for bit, while those of the meta-batch move."""
    p = make_problem()
    after = unpack(update(p)[0], p.meta)
    for name in LATENTS:
        assert torch.equal(after[name][[1, 2, 4]], p.meta[name][[1, 2, 4]])
        assert (after[name][[0, 3]] != p.meta[name][[0, 3]]).all()


def test_the_fisher_product_is_with_the_hessian_of_the_kl_of_actions():
    """The KL to the prior has no part in it. The step of two iterations has the gradient and its
    product in it: here of three gradients in random directions.
    """
    p = make_problem()
    weight = p.outer["mask"] / (p.outer["mask"].sum((1, 2), keepdim=True) * len(ROWS))

    def mean_kl(vector):
        return (weight * divergence(p.outer["dist_params"], map_of(p)(vector))).sum()

    matrix = hessian(mean_kl)(p.vector) + 0.01 * torch.eye(len(p.vector))
    gradient = gradient_of(p)
    for c in torch.randn(3, len(p.vector)):
        step = step_of(p, c, cg_iters=2, cg_damping=0.01)
        assert error(step, natural_step(matrix, gradient + c, 2)) < 1e-10
        assert error(step, natural_step(matrix, gradient + c, 1)) > 0.01


def test_the_kl_to_the_prior_is_of_the_rows_before_adaptation():
    """Summed over dimensions, a mean over tasks."""
    p = make_problem()
    mu, sigma = p.meta["mu"][ROWS], p.meta["log_sigma"][ROWS].exp()
    expected = kl_divergence(Normal(mu, sigma), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(module.latent_kl(p.vector, data_of(p)), expected)
    weighted = partial(module.weighted_kl, data=data_of(p), args=p.args)
    torch.testing.assert_close(weighted(p.vector), p.args.kl_weight * expected.mean())
    other = {name: x + (name not in LATENTS) for name, x in p.meta.items()}
    other = parameters_to_vector(other.values())
    assert torch.equal(weighted(other), weighted(p.vector))


# ----------------------------------------------------------------------------------- the adaptation


@pytest.mark.parametrize("variant", VARIANTS[:1] + VARIANTS[2:3], ids=str)
def test_the_inner_step_is_the_closed_form(variant):
    """For every task by itself, also when all are computed at once."""
    p = make_problem(**variant)
    theta, _, alpha = module.split(p.meta)
    at_once = module.inner_steps(p.phi, theta, p.outer, alpha, p.policy)
    for i in range(len(ROWS)):
        phi, batch = of_task(p.phi, i), of_task(p.outer, i)
        expected = plain_step(p.policy, phi, theta, batch, alpha)
        assert expected.keys() == phi.keys() == at_once.keys()
        for name, x in module.inner_step(phi, theta, batch, alpha, p.policy).items():
            torch.testing.assert_close(x, expected[name])
            torch.testing.assert_close(at_once[name][i], expected[name])
            assert not torch.equal(x, phi[name])


def test_derivatives_of_the_inner_step():
    """z is a constant and Â has mean 0: μ' moves one to one with μ, and with α along the score."""
    p = make_problem()
    theta, _, alpha = module.split(p.meta)
    phi, batch = of_task(p.phi, 0), of_task(p.outer, 0)

    def mean(mu, alpha_mu):
        moved, step_sizes = phi | {"mu": mu}, alpha | {"mu": alpha_mu}
        return module.inner_step(moved, theta, batch, step_sizes, p.policy)["mu"]

    torch.testing.assert_close(jacrev(mean)(phi["mu"], alpha["mu"]), torch.eye(Z))
    score = (batch["z"] - phi["mu"]) / phi["log_sigma"].exp() ** 2
    score = (score * batch["episode_advantages"][:, None]).mean(0)
    jacobian = jacrev(mean, argnums=1)(phi["mu"], alpha["mu"])
    torch.testing.assert_close(jacobian, torch.diag(score))


def test_without_latents_it_is_the_step_of_maml():
    """A policy that does not read z and adapts its weights takes maml_trpo.py's inner step."""
    p = make_problem(adapt_policy=True, latent_adaptation=False)
    theta, _, alpha = module.split(p.meta)
    theta["net.0.weight"][:, 2:] = 0
    batch = of_task(p.outer, 0)
    dist_params = module.behave({}, theta, batch["obs"], torch.zeros(4, 1, Z), p.policy)
    batch["logprobs"] = log_density(dist_params, batch["actions"])
    prior = dict.fromkeys(LATENTS, torch.zeros(1, Z))
    phi = of_task(module.start(theta, prior, alpha), 0)
    adapted = module.inner_step(phi, theta, batch, alpha, p.policy)
    args = maml_trpo.Args(hidden_size=3, inner_loss="lvc")
    twin = in_units(maml_trpo.Policy(2, BOX, args))
    blind = theta | {"net.0.weight": theta["net.0.weight"][:, :2]}
    blind_alpha = alpha | {"net.0.weight": alpha["net.0.weight"][:, :2]}
    for name, x in maml_trpo.inner_step(blind, batch, blind_alpha, twin, args).items():
        same = adapted[name][:, :2] if name == "net.0.weight" else adapted[name]
        torch.testing.assert_close(same, x)
        assert not torch.equal(x, blind[name])
    assert all(torch.equal(adapted[name], phi[name]) for name in LATENTS)


def episodes_with(rewards, t=5):
    """A batch of one task whose episodes have these rewards."""
    obs = torch.randn(1, 1, t, 2).expand(1, rewards.shape[1], t, 2)
    return {"rewards": rewards, "obs": obs, "mask": torch.ones_like(rewards)}


def test_episode_advantages_are_standardised_returns():
    """Discounted, over a task's episodes; where all start alike the baseline drops out."""
    args = make_args()
    batch = episodes_with(torch.randn(1, 7, 5))
    advantages = module.episode_advantages(batch, args)
    returns = (batch["rewards"] * 0.9 ** torch.arange(5.0)).sum(-1)
    torch.testing.assert_close(advantages, (returns - returns.mean()) / returns.std(correction=0))
    changed = module.episode_advantages(batch | {"rewards": 100 * batch["rewards"] - 3}, args)
    torch.testing.assert_close(changed, advantages, rtol=1e-6, atol=1e-6)
    two = {name: torch.cat([x, x]) for name, x in batch.items()}
    # each task by itself: here returns are equal but for rounding
    two["rewards"][1] = 0.1 + 1e-12 * torch.randn(7, 5)
    both = module.episode_advantages(two, args)
    torch.testing.assert_close(both[:1], advantages)
    assert torch.equal(both[1], torch.zeros(7))


def test_the_baseline_takes_off_what_the_start_explains():
    """Returns that are a linear function of the first observation leave no signal to speak of,
    noise on them does.
    """
    obs, noise = torch.randn(1, 200, 1, 2), torch.randn(1, 200, 1)
    batch = {"obs": obs, "mask": torch.ones(1, 200, 1), "rewards": 30 * obs[..., 0] + noise}
    advantages = module.episode_advantages(batch, make_args())
    assert np.corrcoef(advantages[0], noise[0, :, 0])[0, 1] > 0.95


@pytest.mark.parametrize("halving", [True, False])
def test_a_bandit_is_solved_with_a_shrinking_step_size(halving):
    """z is the action: the first step points to the best z, a shrinking α arrives there, a constant
    one is away from it most of the time.
    """
    args, best = make_args(), torch.tensor([1.6, -0.8])
    policy = in_units(module.Policy(2, BOX, args))
    phi = dict.fromkeys(LATENTS, torch.zeros(1, Z))
    distances = []
    for k in range(30):
        z = module.latent(phi, torch.randn(1, 200, Z))
        batch = episodes_with(-((z - best) ** 2).sum(-1, keepdim=True), t=1)
        batch |= {"z": z, "episode_advantages": module.episode_advantages(batch, args)}
        alpha = dict.fromkeys(phi, 0.5 ** max(0, k - 1) if halving else 1.0)
        old = phi["mu"]
        phi = module.inner_steps(phi, {}, batch, alpha, policy)
        if k == 0:
            assert torch.cosine_similarity(phi["mu"] - old, best - old).item() > 0.9
        distances.append((phi["mu"] - best).norm().item())
    assert (max(distances[5:]) < 0.4) == halving
    assert (np.median(distances[5:]) > 2) == (not halving)


# --------------------------------------------------------------------------------------- the policy


def test_the_policy_reads_the_direction_of_z():
    """At the length √Z, and of z = 0 nothing; without normalisation it reads z itself."""
    obs, z = torch.randn(7, 2), 5 * torch.randn(7, Z)
    for normalise, read in ((True, z / z.norm(dim=1, keepdim=True) * Z**0.5), (False, z)):
        policy = in_units(
            module.Policy(2, BOX, make_args(init_std=0.3, normalise_latent=normalise))
        )
        mean, log_std = policy(obs, z).chunk(2, -1)
        torch.testing.assert_close(mean, policy.net(torch.cat([obs, read], -1)))
        torch.testing.assert_close(log_std.exp(), torch.full((7, 2), 0.3))
        assert torch.equal(policy(obs, 0 * z)[:, :2], policy.net(torch.cat([obs, 0 * z], -1)))


# --------------------------------------------------------------------------------------- collection


class Episodes(gym.Env):
    """Of one to four steps, from random starts; for collect."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)

    def __init__(self, discrete: bool):
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float64)
        if discrete:
            self.action_space = gym.spaces.Discrete(3)

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
        reward = float(np.sum(action * self.task))
        return self.np_random.normal(size=2), reward, self.left == 0, False, {}


gym.register("Episodes-v0", Episodes, max_episode_steps=4, kwargs={"discrete": False})
gym.register("EpisodesDiscrete-v0", Episodes, max_episode_steps=4, kwargs={"discrete": True})


def player(env_id, **flags):
    """A policy for a family, three of its tasks, and arguments to collect with."""
    args = make_args(env_id=env_id, **flags)
    envs = module.make_envs(env_id)
    policy = in_units(module.Policy(2, envs.single_action_space, args))
    return policy, envs.sample_tasks(3, np.random.default_rng(0)), args


@pytest.mark.parametrize("env_id", ["Episodes-v0", "EpisodesDiscrete-v0"])
def test_collect_draws_one_z_per_episode(env_id):
    """From its task's distribution; actions from the policy's and the key's noise."""
    n, e = 3, 5
    policy, tasks, args = player(env_id, episodes_per_task=e)
    params = dict(policy.named_parameters())
    theta = {name: x.detach() + 0.5 * torch.randn_like(x) for name, x in params.items()}
    phi = {"mu": torch.randn(n, Z), "log_sigma": 0.3 * torch.randn(n, Z)}
    size = len(theta["net.4.bias"])
    phi["net.4.bias"] = torch.randn(n, size)
    key = ("train", 5, 0)
    collect = partial(module.collect, (theta, phi), key=key, policy=policy, args=args)
    batch, greedy = collect(tasks), collect(tasks, deterministic=True)
    generator = module.keyed_generator(args, "latents of train", 5, 0)
    eps = torch.randn(n, e, Z, generator=generator)
    generator = module.keyed_generator(args, *key)
    envs = module.make_envs(env_id, n * e)
    module.reset_lanes(envs, tasks.repeat(e, axis=0), generator)
    noise = module.draw_noise(envs.single_action_space, (n, e, 4), generator)
    noise = noise[:, :, : batch["mask"].shape[-1]]
    assert 0 < batch["mask"].mean() < 1
    for data, scale in ((batch, 1), (greedy, 0)):
        assert torch.equal(data["eps"], eps)
        for i in range(n):
            x = of_task(data, i)
            z = phi["mu"][i] + phi["log_sigma"][i].exp() * eps[i]
            torch.testing.assert_close(x["z"], z)
            dist_params = plain_policy(policy, of_task(phi, i), theta, x["obs"], eps[i])
            actions = actions_from(dist_params, scale * noise[i], policy.discrete)
            taken = x["mask"] if policy.discrete else x["mask"][..., None]
            torch.testing.assert_close(x["actions"].double(), actions * taken)
            torch.testing.assert_close(x["dist_params"], dist_params)
            expected = log_density(dist_params, x["actions"], policy.discrete)
            torch.testing.assert_close(x["logprobs"], expected)
    torch.testing.assert_close(batch["advantages"], module.standardised_advantages(batch, args))
    expected = module.episode_advantages(batch, args)
    torch.testing.assert_close(batch["episode_advantages"], expected)
    assert torch.equal(collect(tasks + 1)["eps"], eps)
    other = module.collect((theta, phi), tasks, ("train", 5, 1), policy, args)
    assert not torch.equal(other["eps"], eps)


def test_the_sparse_reward_takes_the_place_of_the_dense_one():
    """In the returns and in both kinds of advantages, of training or of the test."""
    flags = {"horizon": 20, "episodes_per_task": 20, "eval_episodes": 20}
    policy, _, args = player("SparsePointRobot-v0", **flags)
    theta, phi = dict(policy.named_parameters()), dict.fromkeys(LATENTS, torch.zeros(3, Z))
    tasks = np.full((3, 2), 0.2)
    play = partial(module.collect, (theta, phi), tasks, ("train", 0), policy)
    dense, sparse = (play(replace(args, train_reward=reward)) for reward in ("dense", "sparse"))
    assert torch.equal(sparse["rewards"], dense["sparse_rewards"])
    assert (sparse["rewards"] > 0).any()
    expected = module.episode_advantages(sparse, args)
    torch.testing.assert_close(sparse["episode_advantages"], expected)
    expected = module.standardised_advantages(sparse, args)
    torch.testing.assert_close(sparse["advantages"], expected)
    for name in ("advantages", "episode_advantages", "rewards"):
        assert not torch.allclose(sparse[name], dense[name])
        for batch, reward in ((dense, "dense"), (sparse, "sparse")):
            test = play(replace(args, test_reward=reward), test=True)
            assert torch.equal(test[name], batch[name])


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_meta_update_starts_where_the_data_was_collected(adapt_policy):
    """From collection to update, everything agrees: what the map computes is what was done."""
    policy, tasks, args = player("Episodes-v0", episodes_per_task=4)
    meta = make_meta(policy, adapt_policy)
    theta, table, alpha = module.split(meta)
    phi = module.start(theta, {name: x[ROWS] for name, x in table.items()}, alpha)
    inner = module.collect((theta, phi), tasks, ("train", 0), policy, args)
    phi = module.inner_steps(phi, theta, inner, alpha, policy)
    outer = module.collect((theta, phi), tasks, ("train", 1), policy, args)
    vector = parameters_to_vector(meta.values())
    data = {"meta": meta, "rows": ROWS, "batches": [inner, outer]}
    done = module.adapted_policies(vector, data, policy, args)
    torch.testing.assert_close(done, outer["dist_params"], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------ the meta-test

TEST = {"meta_batch_size": 4, "num_eval_steps": 5, "eval_episodes": 3, "eval_lr_decay": 0.5}
TEST |= {"test_reward": "dense"}
LEARNED, NOT_LEARNED = [1, 1, 0.5, 0.25, 0.125], [1, 1, 1, 0.5, 0.25]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("adapts", "factors"),
    [
        ({}, LEARNED),
        ({"latent_adaptation": False}, NOT_LEARNED),
        ({"adapt_policy": True}, LEARNED),
    ],
    ids=str,
)
def test_meta_test_starts_from_the_prior_with_a_step_size_that_shrinks(
    adapts, factors, deterministic
):
    """In a loop, also for the second group of tasks, which wraps around. LatentSpace has learned no
    step size, and shrinks it a step later. The policy adapts if it did in training. Mean actions
    are scored and not adapted to.
    """
    policy, _, args = player("Episodes-v0", deterministic_eval=deterministic, **TEST)
    tasks = np.linspace(-1, 1, 5)[:, None]
    meta = make_meta(policy, **adapts)
    before = {name: x.clone() for name, x in meta.items()}
    scores, episodes = module.evaluate(meta, tasks, policy, args)
    assert all(torch.equal(x, before[name]) for name, x in meta.items())

    theta, _, learned = module.split(meta)
    alpha = {"mu": 0.7, "log_sigma": 0.3} | learned
    names = ["sampled_return", "return"] if deterministic else ["return"]
    expected = {name: np.zeros((6, 5)) for name in names}
    for first, rows in ((0, [0, 1, 2, 3]), (4, [4, 0, 1, 2])):
        prior = dict.fromkeys(LATENTS, torch.zeros(Z))
        phi = [prior | {name: x for name, x in theta.items() if name in learned}] * 4
        for k in range(6):
            together = {name: torch.stack([x[name] for x in phi]) for name in phi[0]}
            params, key = (theta, together), ("eval", first, k)
            play = partial(module.collect, params, tasks[rows], key, policy, args, test=True)
            batch = play()
            for name in names:
                scored = play(deterministic=deterministic and name == "return")
                returns = scored["rewards"].sum(-1).mean(1)
                expected[name][k, rows[: 5 - first]] = returns[: 5 - first]
            if first == 0:
                torch.testing.assert_close(episodes[f"obs_{k}"], batch["obs"])
            if k < 5:
                shrunk = {name: factors[k] * x for name, x in alpha.items()}
                for i in range(4):
                    phi[i] = plain_step(policy, phi[i], theta, of_task(batch, i), shrunk)
    assert scores.keys() == expected.keys()
    assert episodes.keys() == {f"obs_{k}" for k in range(6)}
    for name in names:
        np.testing.assert_allclose(scores[name], expected[name])


class Search(gym.Env):
    """Episodes of one step. Task 0 succeeds by chance, task 1 if the action is not 0, task 2 if it
    is.
    """

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float64)

    def sample_tasks(self, n):
        return np.zeros((n, 1))

    def set_task(self, task):
        self.task = task[0]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(2), {}

    def step(self, action):
        success = [self.np_random.random() < 0.1, action[0] != 0, action[0] == 0][int(self.task)]
        return np.ones(2), 1.0, True, False, {"success": float(success)}


gym.register("Search-v0", Search, max_episode_steps=1)


def search(tasks, **flags):
    """Scores of a policy whose mean actions are 0."""
    policy, _, args = player("Search-v0", **TEST | flags)
    meta = make_meta(policy)
    meta |= {name: 0 * x for name, x in meta.items() if name.startswith("net")}
    return module.evaluate(meta, np.array(tasks)[:, None], policy, args)[0]


def test_found_is_whether_a_task_had_a_success_in_any_of_the_episodes_so_far():
    scores = search([0, 0, 0, 0, 0])
    success, found = scores["success"], scores["found"]
    for k, i in np.ndindex(6, 5):
        assert found[k, i] == any(success[j, i] > 0 for j in range(k))
    assert 0 < found[1:].mean() < 1
    assert ((success == 0) & (found == 1)).any()
    assert ((success > 0) & (found == 0)).any()


def test_found_is_about_the_sampled_episodes_that_were_adapted_to():
    """Mean actions are scored and not adapted to: what they meet or miss is not found, nor lost."""
    scores = search([1, 2], deterministic_eval=True, num_eval_steps=2)
    assert scores["success"].tolist() == [[0, 1]] * 3
    assert scores["sampled_success"].tolist() == [[1, 0]] * 3
    assert scores["found"].tolist() == [[0, 0], [1, 0], [1, 0]]


def test_no_set_of_training_tasks_is_refused():
    with pytest.raises(SystemExit, match=r"^error: --num-train-tasks 0: "):
        module.main(module.Args(num_train_tasks=0, num_threads=1))


# ------------------------------------------------------------------------------------------- probes


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """main with the settings of the probes, in a folder of its own and in single precision; returns
    its metrics.
    """
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    settings = {"env_id": "ProbeBox-v0", "meta_batch_size": 10, "num_train_tasks": 10}
    settings |= {"hidden_size": 8, "max_kl": 0.1, "test_reward": "dense"}
    settings |= {"total_timesteps": 20_000, "num_threads": 1, "eval_every": 1000}
    settings |= {"num_eval_steps": 3, "eval_episodes": 20}
    return lambda **changes: module.main(module.Args(**(settings | changes)))


def run_of(exp_name):
    """The folder of the run of that name."""
    (folder,) = Path("runs").glob(f"*__{exp_name}__*")
    return folder


def test_probe_is_learned(probe):
    """Of 1 at most; blind before adaptation, as are episodes without it."""
    scores = probe(total_timesteps=40_000)
    assert scores["eval/return_after_60_episodes"] > 0.7
    assert scores["eval/return_after_0_episodes"] == pytest.approx(0, abs=0.15)
    blind = probe(inner_lr=1e-9, sigma_lr=1e-9, total_timesteps=10_000)
    assert blind["eval/return_after_60_episodes"] == pytest.approx(0, abs=0.15)


def test_a_direction_in_one_dimension_is_refused(probe):
    """It is a sign: what the policy does has no gradient in z, so that neither latents nor α would
    be learned.
    """
    z = torch.randn(7, 1, requires_grad=True)
    policy = in_units(module.Policy(2, BOX, make_args(latent_dim=1)))
    policy(torch.randn(7, 2), z).sum().backward()
    assert z.grad.abs().max() < 1e-5
    line = r"^error: --latent-dim 1: .*--latent-dim 2.*--no-normalise-latent$"
    with pytest.raises(SystemExit, match=line):
        probe(latent_dim=1, total_timesteps=1)
    assert not Path("runs").exists()
    probe(latent_dim=1, normalise_latent=False, total_timesteps=1)


def test_flags_reach_the_update(probe):
    """Weight of the KL, spread of the latents, step sizes before training, inner steps: as a δ of
    next to nothing leaves everything where it starts, with a surrogate of 0.
    """
    flags = {"env_id": "PointRobot-v0", "horizon": 5, "num_test_tasks": 4, "num_eval_steps": 1}
    flags |= {"num_inner_steps": 2, "inner_lr": 0.3, "sigma_lr": 0.2}
    flags |= {"adapt_policy": True, "policy_lr": 0.1, "max_kl": 1e-12}
    flags |= {"total_timesteps": 1501}  # the first 1500 are for the units
    losses = []
    for weight, spread in ((1.0, 1.0), (3.0, 1.0), (1.0, 0.0)):
        name = f"{weight}_{spread}"
        probe(exp_name=name, kl_weight=weight, init_mu_std=spread, **flags)
        logged = {tag: list(values.values()) for tag, values in scalars(run_of(name)).items()}
        losses += logged["losses/surrogate"]
        assert logged["losses/latent_kl"] == pytest.approx([losses[-1] / weight], abs=1e-4)
        assert logged["losses/kl"][0] < 1e-5  # all inner steps are in the map
        checkpoint = load(run_of(name))
        assert checkpoint["global_step"] == 2 * 10 * 10 * 5 * 3
        alphas = {"mu": 0.3, "log_sigma": 0.2, "net.0.weight": 0.1, "log_std": 0.1}
        for name, alpha in alphas.items():
            learned = checkpoint["meta"][f"log_lr.{name}"].exp()
            torch.testing.assert_close(learned, torch.full_like(learned, alpha), rtol=1e-4, atol=0)
    assert losses[0] > 0.1
    assert losses == pytest.approx([losses[0], 3 * losses[0], 0], abs=1e-4)


def test_every_training_task_has_a_row_of_its_own(probe):
    """Latents that do not adapt learn their tasks by heart, those of all tasks, in meta-batches of
    half of them.
    """
    settings = {"latent_adaptation": False, "num_train_tasks": 20, "kl_weight": 0.01}
    scores = probe(exp_name="by_heart", total_timesteps=12_000, **settings)
    assert scores["charts/episodic_return"] > 0.5
    assert (load(run_of("by_heart"))["meta"]["log_sigma"] != 0).all()


def test_latent_space_collects_once_and_has_no_step_sizes(probe):
    """An iteration is 10 tasks x 10 episodes of one to three steps, without a phase before
    adaptation.
    """
    probe(latent_adaptation=False, total_timesteps=1, exp_name="latent_space")
    checkpoint = load(run_of("latent_space"))
    assert 100 <= checkpoint["global_step"] <= 300
    assert not [name for name in checkpoint["meta"] if name.startswith("log_lr")]
