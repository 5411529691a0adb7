"""Asynchronous outer optimizers: synchronous steps, weights, the order of arrivals, and the toy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.transforms import async_outer, delayed_nesterov, simulate_arrivals

NOTEBOOK_SECONDS = (0.58, 0.75, 1.51, 3.33)  # per step of four workers


def feed(tx, arrivals, **extra):
  """The outer parameters after each arrival, from zero."""

  @jax.jit
  def roll_out(arrivals, extra):
    def step(carry, row):
      outer, state = carry
      updates, state = tx.update(row[0], state, outer, **row[1])
      outer = optax.apply_updates(outer, updates)
      return (outer, state), outer

    zeros = jnp.zeros_like(arrivals[0])
    return jax.lax.scan(step, (zeros, tx.init(zeros)), (arrivals, extra))[1]

  return np.asarray(roll_out(arrivals, extra))


def test_n_arrivals_are_one_synchronous_step():
  n, rounds = 4, 3
  arrivals = np.random.default_rng(0).normal(size=(n * rounds, 5)).astype(np.float32)
  nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
  means = arrivals.reshape(rounds, n, 5).mean(1)
  want = feed(nesterov, jnp.asarray(means))
  buffered = feed(async_outer(nesterov, num_workers=n, buffer=n), jnp.asarray(arrivals))
  spread = feed(delayed_nesterov(0.7, 0.9, num_workers=n), jnp.asarray(arrivals))
  for got in (buffered, spread):
    np.testing.assert_allclose(got[n - 1 :: n], want, atol=1e-5)
  assert not buffered[: n - 1].any()  # waits
  np.testing.assert_allclose(spread[0], -0.7 * arrivals[0] / n, atol=1e-6)  # does not


def test_weights_of_number_and_age():
  arrivals, age = jnp.ones((3, 1)), jnp.array([0, 3, 8])
  plain = feed(async_outer(optax.sgd(1.0), num_workers=4), arrivals)
  np.testing.assert_allclose(-np.diff(plain[:, 0], prepend=0), [0.5, 0.5, 0.5], rtol=1e-6)
  poly = feed(async_outer(optax.sgd(1.0), num_workers=4, staleness="poly"), arrivals, age=age)
  np.testing.assert_allclose(-np.diff(poly[:, 0], prepend=0), [0.5, 0.25, 0.5 / 3], rtol=1e-6)


def test_arrivals_of_workers_of_different_speeds():
  arrivals = simulate_arrivals(NOTEBOOK_SECONDS, sync_period=20, num_arrivals=200)
  seconds = [a.seconds for a in arrivals]
  assert seconds == sorted(seconds)
  counts = np.bincount([a.worker for a in arrivals])
  for worker, s in enumerate(NOTEBOOK_SECONDS):  # nobody waits
    assert counts[worker] == pytest.approx(seconds[-1] / (20 * s), abs=1)
  assert max(a.age for a in arrivals) >= 8
  # A long grace period is a synchronous round: as slow as the slowest, and nothing is stale but by
  # those who came before in the same round.
  rounds = simulate_arrivals(NOTEBOOK_SECONDS, sync_period=20, num_arrivals=8, grace_seconds=60)
  assert [a.worker for a in rounds] == [0, 1, 2, 3] * 2
  assert [a.version for a in rounds] == [0] * 4 + [4] * 4
  assert rounds[-1].seconds == pytest.approx(2 * 20 * 3.33)


def mixture_of_gaussians():
  """Four classes of two clusters each in 16 dimensions, in four shards."""
  rng = np.random.default_rng(1)
  centers = rng.normal(size=(8, 16))
  centers /= np.linalg.norm(centers, axis=1, keepdims=True)
  cluster = rng.integers(0, 8, size=(4, 512))
  x = centers[cluster] + 0.5 * rng.normal(size=(4, 512, 16))
  return jnp.asarray(x, jnp.float32), jnp.asarray(cluster % 4)


@pytest.mark.slow
def test_momentum_of_stale_arrivals_hurts_and_the_delayed_one_does_not():
  """The toy of the paper's notebook: mean loss at the end, plain against delayed Nesterov."""
  x, y = mixture_of_gaussians()

  def loss(w, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(
      jax.nn.relu(x @ w["a"]) @ w["b"], y
    ).mean()

  start = {
    "a": 0.25 * jax.random.normal(jax.random.key(0), (16, 32)),
    "b": 0.2 * jax.random.normal(jax.random.key(1), (32, 4)),
  }

  @jax.jit
  def pseudo_gradient(outer, worker, key):
    def step(carry, key):
      w, state = carry
      rows = jax.random.randint(key, (32,), 0, 512)
      grads = jax.grad(loss)(w, x[worker][rows], y[worker][rows])
      updates, state = inner.update(grads, state, w)
      return (optax.apply_updates(w, updates), state), None

    inner = optax.adam(0.01)
    (w, _), _ = jax.lax.scan(step, (outer, inner.init(outer)), jax.random.split(key, 10))
    return jax.tree.map(jnp.subtract, outer, w)

  def train(tx):
    @jax.jit
    def apply(arrival, state, outer):
      updates, state = tx.update(arrival, state, outer)
      outer = optax.apply_updates(outer, updates)
      return outer, state, loss(outer, x.reshape(-1, 16), y.reshape(-1))

    versions, state, losses = [start], tx.init(start), []
    for i, a in enumerate(simulate_arrivals(NOTEBOOK_SECONDS, sync_period=10, num_arrivals=120)):
      delta = pseudo_gradient(versions[a.version], a.worker, jax.random.key(i))
      outer, state, value = apply(delta, state, versions[-1])
      versions.append(outer)
      losses.append(float(value))
    return np.mean(losses[-40:])

  naive = train(async_outer(optax.sgd(0.7, momentum=0.9, nesterov=True), num_workers=4))
  delayed = train(delayed_nesterov(0.7, 0.9, num_workers=4))
  assert delayed < 0.8 * naive, (delayed, naive)


def test_rejects_bad_input():
  sgd = optax.sgd(0.1)
  for kwargs, message in (
    ({"buffer": 5}, "`buffer` must be at most `num_workers`, 4, got 5"),
    ({"buffer": 0}, "`buffer` must be an integer >= 1, got 0"),
    ({"num_workers": 0}, "`num_workers` must be an integer >= 1, got 0"),
    ({"staleness": "linear"}, "`staleness` must be 'constant' or 'poly', got 'linear'"),
    ({"outer": 0.7}, "`outer` must be an optax transform, got 0.7"),
  ):
    with pytest.raises(ValueError, match=message):
      async_outer(**{"outer": sgd, "num_workers": 4, **kwargs})
  tx = async_outer(sgd, num_workers=4, staleness="poly")
  with pytest.raises(ValueError, match="`age` must be given"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1"):
    delayed_nesterov(0.1, 1, num_workers=2)
  with pytest.raises(ValueError, match=r"`learning_rate` must be positive and finite, got -0\.1"):
    delayed_nesterov(-0.1, num_workers=2)
  good = {"step_seconds": [1.0], "sync_period": 1, "num_arrivals": 1}
  for kwargs, message in (
    ({"step_seconds": [1, 0]}, r"`step_seconds` must be positive numbers, got \[1, 0\]"),
    ({"grace_seconds": -1}, "`grace_seconds` must be finite and at least 0, got -1"),
    ({"num_arrivals": 0}, "`num_arrivals` must be an integer >= 1, got 0"),
  ):
    with pytest.raises(ValueError, match=message):
      simulate_arrivals(**{**good, **kwargs})
