"""Asynchronous Local SGD: against a server in float64, its clock, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import pmean_over
from jaxcomm.transforms import async_local_sgd, async_outer, simulate_arrivals, simulate_async

TICKS, SIZE, RATE = 24, 5, 0.3
SECONDS = [1.0, 1.5, 2.0]


def loss_fn(params, target):
  return 0.5 * jnp.sum((params - target) ** 2)


def make_targets(num_workers=3):
  rng = np.random.default_rng(3)
  return rng.normal(size=(num_workers, TICKS, SIZE)).astype(np.float32)


def server_in_float64(clock, targets, lr, momentum):
  """Delayed Nesterov by the paper's text; parameters of all workers after each tick."""
  n = len(targets)
  outer = np.ones(SIZE)
  theta, fetched = np.ones((n, SIZE)), np.ones((n, SIZE))
  gathered, velocity, arrivals, history = np.zeros(SIZE), np.zeros(SIZE), 0, []
  for t in range(TICKS):
    working = clock.works[t]
    theta[working] -= RATE * (theta - targets[:, t])[working]
    if clock.arrival[t]:
      i = clock.arrival[t] - 1
      delta = fetched[i] - theta[i]
      outer = outer - lr * delta / n
      gathered, arrivals = gathered + delta, arrivals + 1
      if arrivals % n == 0:
        velocity = momentum * velocity + gathered / n
        outer = outer - lr * momentum * velocity
        gathered = np.zeros(SIZE)
      theta[i] = fetched[i] = outer
    history.append(theta.copy())
  return np.stack(history, 1), outer


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_follows_the_server(train, context):
  clock = simulate_async(SECONDS, num_ticks=TICKS, sync_period=2)
  assert len(set(clock.arrival)) == 4
  assert clock.age.max() > 1
  got = train(
    async_local_sgd(optax.sgd(RATE), schedule=clock), loss_fn, jnp.ones(SIZE), make_targets(),
    context=context,
  )  # fmt: skip
  want, outer = server_in_float64(clock, make_targets().astype(np.float64), 0.7, 0.9)
  np.testing.assert_allclose(got.params, want, atol=2e-5)
  for row in np.asarray(optax.tree.get(got.state.opt_state, "anchor")).reshape(-1, SIZE):
    np.testing.assert_allclose(row, outer, atol=2e-5)


def test_a_stale_arrival_weighs_less(train):
  clock = simulate_async(SECONDS, num_ticks=TICKS, sync_period=2)
  outer = async_outer(optax.sgd(1.0), num_workers=3, staleness="poly")
  tx = async_local_sgd(optax.sgd(RATE), outer, schedule=clock, mean=pmean_over("replica"))
  got = train(tx, lambda p, x: jnp.sum(p * jnp.sign(x)) ** 1, jnp.zeros(1), np.ones((3, TICKS, 1)))
  moved = sum(
    -2 * RATE / np.sqrt(3 * (1 + age)) for age, who in zip(clock.age, clock.arrival) if who
  )
  np.testing.assert_allclose(optax.tree.get(got.state.opt_state, "anchor")[0], [moved], rtol=1e-5)


def test_one_worker_is_local_sgd(train):
  clock = simulate_async([2.0], num_ticks=TICKS, sync_period=3)
  assert clock.works.all()
  assert clock.arrival.tolist() == [0, 0, 1] * (TICKS // 3)
  got = train(
    async_local_sgd(optax.sgd(RATE), optax.sgd(1.0), schedule=clock),
    loss_fn, jnp.ones(SIZE), make_targets(1),
  )  # fmt: skip
  plain = train(optax.sgd(RATE), loss_fn, jnp.ones(SIZE), make_targets(1))
  np.testing.assert_allclose(got.params, plain.params, atol=1e-5)


def test_the_clock_is_that_of_arrivals_where_nobody_waits():
  clock = simulate_async([2, 7, 11], num_ticks=20, sync_period=3)
  told = [(w - 1, a) for w, a in zip(clock.arrival, clock.age) if w]
  expected = simulate_arrivals([2, 7, 11], sync_period=3, num_arrivals=len(told))
  assert {w for w, _ in told} == {0, 1, 2}
  assert told == [(a.worker, a.age) for a in expected]


def test_workers_that_finish_together_are_taken_in_turn():
  clock = simulate_async([1.0] * 4, num_ticks=40, sync_period=5)
  assert clock.arrival[4:8].tolist() == [1, 2, 3, 4]
  assert clock.works[:5].all()
  assert clock.works[5].tolist() == [True, False, False, False]
  counts = np.bincount(clock.arrival, minlength=5)[1:]
  assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"step_seconds": [1, 0]}, "`step_seconds` must be positive"),
    ({"step_seconds": []}, "`step_seconds` must be positive"),
    ({"num_ticks": 0}, "`num_ticks` must be an integer >= 1, got 0"),
    ({"sync_period": 0}, "`sync_period` must be an integer >= 1, got 0"),
  ],
)
def test_rejects_clocks(change, message):
  good = {"step_seconds": [1, 2], "num_ticks": 8, "sync_period": 2}
  with pytest.raises(ValueError, match=message):
    simulate_async(**{**good, **change})


def test_rejects_what_does_not_fit():
  clock = simulate_async([1, 2], num_ticks=8, sync_period=2)
  with pytest.raises(ValueError, match="`outer` must be"):
    async_local_sgd(optax.sgd(0.1), 3, schedule=clock)  # pyright: ignore[reportArgumentType]
  tx = async_local_sgd(optax.sgd(0.1), schedule=clock)
  state = tx.init(jnp.ones(2))
  with pytest.raises(ValueError, match="`params` must be given"):
    tx.update(jnp.ones(2), state)
  with pytest.raises(ValueError, match=r"`schedule` must be of as many workers .* 3, got 2"):
    jax.vmap(lambda g: tx.update(g, state, g), axis_name="replica")(jnp.ones((3, 2)))
