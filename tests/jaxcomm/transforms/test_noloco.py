"""NoLoCo against the paper's loop in float64, the recursion of its disagreement, and its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import diloco, noloco, pmean_over
from jaxcomm.collectives import random_matching
from jaxcomm.transforms import noloco_stability_bound

STEPS, SIZE, RATE = 12, 5, 0.3
CURVATURE = np.linspace(0.2, 1.0, SIZE)


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def make_problem(num_replicas, seed=0):
  rng = np.random.default_rng(seed)
  targets = rng.normal(size=(num_replicas, STEPS, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


def paper_noloco(start, targets, *, sync_period, alpha, beta, gamma, seed):
  """NoLoCo, https://arxiv.org/abs/2506.10911, with SGD inside: float64[R, T, d] of all replicas."""
  num_replicas = len(targets)
  pairs = random_matching(seed)
  slow = np.tile(start.astype(np.float64), (num_replicas, 1))
  fast, momentum = slow.copy(), np.zeros_like(slow)
  history = np.zeros(targets.shape)
  for t in range(STEPS):
    fast = fast - RATE * CURVATURE * (fast - targets[:, t])
    if (t + 1) % sync_period == 0:
      exchange = int(pairs.phase((t + 1) // sync_period - 1, num_replicas))
      partner = list(pairs.phases(num_replicas)[exchange][0])
      progress = fast - slow
      mean_progress = (progress + progress[partner]) / 2
      mean_slow = (slow + slow[partner]) / 2
      momentum = alpha * momentum + beta * mean_progress + gamma * (mean_slow - slow)
      slow = slow + momentum
      fast = slow.copy()
    history[:, t] = fast
  return history


@pytest.mark.parametrize(
  ("context", "num_replicas", "gamma"),
  [
    ("vmap", 4, None),
    ("shard_map", 4, 0.4),
    pytest.param("shard_map", 4, None, marks=pytest.mark.slow),
    pytest.param("vmap", 5, 0.4, marks=pytest.mark.slow),  # one is left over, and steps alone
  ],
)
def test_follows_the_papers_loop(train, context, num_replicas, gamma):
  params, targets = make_problem(num_replicas)
  settings = {"sync_period": 3, "seed": 7}
  tx = noloco(optax.sgd(RATE), consensus_lr=gamma, allow_idle=num_replicas % 2 == 1, **settings)
  got = train(tx, loss_fn, params, targets, context=context)
  want = paper_noloco(
    np.asarray(params["w"]), targets, alpha=0.5, beta=0.7, gamma=gamma or 0.7, **settings
  )
  np.testing.assert_allclose(got.params["w"], want, atol=2e-6)
  # No two replicas agree, and nothing that differs is stored once.
  state, varying = got.state.opt_state, got.layout.varying
  assert len(np.unique(got.params["w"][:, -1], axis=0)) == num_replicas
  own = (varying.params, varying.opt_state.anchor, varying.opt_state.outer_state)
  assert jax.tree.leaves(own) == [True] * 3
  assert not varying.opt_state.count
  np.testing.assert_array_equal(state.anchor["w"], got.params["w"][:, -1])  # exactly


def test_a_pair_alone_is_diloco_with_heavy_ball(train):
  """The group is everybody, γ = β, and all start equal."""
  params, targets = make_problem(2)
  ours = train(noloco(optax.adam(RATE), sync_period=3), loss_fn, params, targets)
  outer = optax.chain(pmean_over("replica"), optax.sgd(0.7, momentum=0.5))
  theirs = train(diloco(optax.adam(RATE), outer, sync_period=3), loss_fn, params, targets)
  np.testing.assert_allclose(ours.params["w"], theirs.params["w"], atol=1e-6)


def test_the_mean_of_all_is_diloco_with_heavy_ball_whoever_meets_whom(train):
  """On quadratics of one curvature: so it lacks what Nesterov's momentum gives DiLoCo."""
  params, targets = make_problem(4)
  ours = train(noloco(optax.sgd(RATE), sync_period=3), loss_fn, params, targets)

  def outer_diloco(nesterov, momentum=0.5, outer_lr=0.7):
    outer = optax.sgd(outer_lr, momentum=momentum, nesterov=nesterov)
    return diloco(optax.sgd(RATE), optax.chain(pmean_over("replica"), outer), sync_period=3)

  theirs = train(outer_diloco(False), loss_fn, params, targets)
  np.testing.assert_allclose(ours.params["w"].mean(0), theirs.params["w"].mean(0), atol=2e-6)

  # Of the way left after a round, r of which it covers: heavy ball forgets by sqrt(alpha) a round,
  # Nesterov by sqrt(alpha (1 - beta r)), where the roots of the recursion are complex.
  still = np.zeros((1, 36, SIZE), np.float32)
  settings = {"momentum": 0.8, "outer_lr": 0.5}
  heavy, nesterov = (
    np.abs(train(outer_diloco(kind, **settings), loss_fn, params, still).params["w"][0, -6:])
    for kind in (False, True)
  )
  assert nesterov.max() < 0.5 * heavy.max()


def recursion(alpha, gamma, num_replicas):
  """Maps (X, Y, Z), second moments of slow weights and momenta, over one random exchange.

  X sums |d|², Y d·s, Z |s|² over replicas, with d and s the distances from the mean of all. A pair
  keeps its mean, a projection, so that (1 - W)² = 1 - W, whose expectation is k on what is centred.
  """
  k = 0.5 if num_replicas % 2 else num_replicas / (2 * (num_replicas - 1))
  z = np.array([gamma**2 * k, -2 * alpha * gamma * k, alpha**2])
  y = np.array([-gamma * k, alpha, 0]) + z
  x = np.array([1 - 2 * gamma * k, 2 * alpha, 0]) + z
  return np.stack([x, y, z])


def growth(alpha, gamma, num_replicas):
  return np.abs(np.linalg.eigvals(recursion(alpha, gamma, num_replicas))).max()


def test_the_bound_is_where_the_recursion_turns():
  for num_replicas in (2, 3, 4, 7, 8, 16, 1000):
    for alpha in (0.0, 0.3, 0.5, 0.9, 0.99):
      bound = noloco_stability_bound(alpha, num_replicas)
      assert (
        growth(alpha, 0.999 * bound, num_replicas) < 1 < growth(alpha, 1.001 * bound, num_replicas)
      )
  bounds = [noloco_stability_bound(a, n) for n, a in ((8, 0.5), (16, 0.5), (8, 0.9))]
  np.testing.assert_allclose(bounds, [1.615, 1.552, 0.436], atol=5e-4)
  np.testing.assert_allclose(noloco_stability_bound(0.5, 10**6), 2 * (1 - 0.25), rtol=1e-5)
  assert noloco_stability_bound(0.9, 1) == np.inf
  rates = [growth(0.5, 0.7, n) for n in (2, 8, 16)] + [growth(0.9, 0.7, 8)]
  np.testing.assert_allclose(rates, [0.5, 0.668, 0.685, 1.07], atol=5e-3)


def exchange(alpha, gamma, count, slow, momentum):
  """Slow weights and momentum of one replica after an exchange without inner progress."""
  tx = noloco(optax.sgd(0.0), sync_period=1, outer_lr=gamma, outer_momentum=alpha, allow_idle=True)
  state = tx.init(slow)._replace(count=count, anchor=slow, outer_state=momentum)
  _, state = tx.update(jnp.zeros_like(slow), state, slow)
  return state.anchor, state.outer_state


def moments(slow, momentum):
  d, s = (x - x.mean(-2, keepdims=True) for x in (slow, momentum))
  return np.stack([(d * d).sum((-2, -1)), (d * s).sum((-2, -1)), (s * s).sum((-2, -1))], -1)


@pytest.mark.parametrize("num_replicas", [8, pytest.param(5, marks=pytest.mark.slow)])
def test_disagreement_follows_its_recursion(num_replicas):
  """The mean over all draws of one exchange, exactly, from any state."""
  rng = np.random.default_rng(1)
  slow, momentum = rng.normal(size=(2, num_replicas, 3)).astype(np.float32)
  pairs = random_matching()
  counts = jnp.arange(100)

  @jax.jit
  def all_draws(alpha, gamma):
    replicas = jax.vmap(exchange, in_axes=(None, None, None, 0, 0), axis_name="replica")
    return jax.vmap(replicas, in_axes=(None, None, 0, None, None))(
      alpha, gamma, counts, slow, momentum
    )

  draws = np.asarray(jax.jit(jax.vmap(lambda t: pairs.phase(t, num_replicas)))(counts))
  first = [int(np.flatnonzero(draws == draw)[0]) for draw in range(len(pairs.phases(num_replicas)))]
  before = moments(slow.astype(np.float64), momentum.astype(np.float64))
  for alpha, gamma in ((0.5, 0.7), (0.9, 0.3), (0.0, 1.0)):
    slows, momenta = (np.asarray(x, np.float64)[first] for x in all_draws(alpha, gamma))
    after = moments(slows, momenta).mean(0)
    np.testing.assert_allclose(
      after, recursion(alpha, gamma, num_replicas) @ before, rtol=1e-5, atol=1e-5
    )
    # The mean of all moves by the mean momentum only, whoever meets whom.
    want = alpha * momentum.astype(np.float64).mean(0)
    np.testing.assert_allclose(momenta.mean(1), np.tile(want, (len(first), 1)), atol=1e-6)


@pytest.mark.slow
def test_too_much_momentum_drives_replicas_apart():
  """From equal momenta, the mean square over many draws of 40 exchanges."""
  slow = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)

  def run(alpha, first, slow):
    def step(carry, t):
      return exchange(alpha, 0.7, first + t, *carry), None

    return jax.lax.scan(step, (slow, jnp.zeros_like(slow)), jnp.arange(40))[0][0]

  replicas = jax.vmap(run, in_axes=(None, None, 0), axis_name="replica")
  many = jax.jit(jax.vmap(replicas, in_axes=(None, 0, None)))
  firsts = 1000 * jnp.arange(64)
  for alpha, least, most in ((0.5, 0.0, 1e-4), (0.9, 2.0, 100.0)):
    after = np.asarray(many(alpha, firsts, slow), np.float64)
    ratio = moments(after, after)[:, 0].mean() / moments(slow, slow)[0]
    assert least < ratio < most, (alpha, ratio)


def traced(tx, num_replicas):
  p = jnp.zeros((num_replicas, 3))
  jax.eval_shape(jax.vmap(lambda p: tx.update(p, tx.init(p), p), axis_name="replica"), p)


def test_refuses_what_would_drift_apart():
  tx = noloco(optax.sgd(0.1), outer_momentum=0.9, outer_lr=0.7)
  message = r"`outer_lr` must be below 0\.436 with `outer_momentum`=0\.9 and 8 replicas, got 0\.7"
  with pytest.raises(ValueError, match=message):
    traced(tx, 8)
  traced(tx, 2)  # pairs that always meet agree
  with pytest.raises(ValueError, match=r"`consensus_lr` must be below 1\.615"):
    traced(noloco(optax.sgd(0.1), consensus_lr=1.7), 8)
  traced(noloco(optax.sgd(0.1), consensus_lr=1.7, check_stability=False), 8)


def test_rejects_bad_arguments():
  with pytest.raises(ValueError, match=r"an odd number of them, 5: pass `allow_idle=True`"):
    traced(noloco(optax.sgd(0.1)), 5)
  traced(noloco(optax.sgd(0.1)), 1)
  for name, bad in (
    ("sync_period", 0),
    ("outer_momentum", 1.0),
    ("outer_momentum", -0.1),
    ("outer_lr", 0.0),
    ("consensus_lr", -1.0),
  ):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {bad}"):
      noloco(optax.sgd(0.1), **{name: bad})


def test_evaluation_sees_each_replicas_slow_weights(train):
  params, targets = make_problem(4)
  got = train(noloco(optax.sgd(RATE), sync_period=5), loss_fn, params, targets[:, :7])
  slow = jaxcomm.outer_params(got.state.opt_state)["w"]
  np.testing.assert_array_equal(slow, got.params["w"][:, 4])
