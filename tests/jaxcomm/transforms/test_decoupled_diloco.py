"""Decoupled DiLoCo: the simulated clock, the merge against a float64 loop, and failures."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import pmean_over, streaming_diloco
from jaxcomm.transforms import decoupled_diloco, simulate_quorum

CURVATURE = np.linspace(0.3, 1.0, 6).astype(np.float32)
LABELS = {"a": np.int32(0), "b": np.int32(1)}


def make_problem(num_ticks, num_replicas=4):
  rng = np.random.default_rng(9)
  targets = rng.normal(size=(num_replicas, num_ticks, 6)).astype(np.float32)
  return {"a": jnp.ones(2), "b": jnp.zeros(4)}, targets


def loss_fn(params, target):
  return 0.5 * jnp.sum(CURVATURE * (jnp.concatenate([params["a"], params["b"]]) - target) ** 2)


def nesterov():
  return optax.chain(pmean_over("replica"), optax.sgd(0.7, momentum=0.9, nesterov=True))


def test_equal_speeds_and_a_quorum_of_all_are_streaming(train):
  params, targets = make_problem(13)
  clock = simulate_quorum([2.0] * 4, num_ticks=12, sync_period=6, num_fragments=2, quorum=4)
  assert clock.fragment.tolist() == [0, 0, 1, 0, 0, 2] * 2
  assert clock.works.all()
  assert (clock.goodput, clock.tick_seconds) == (1.0, 2.0)
  tx = decoupled_diloco(optax.adam(0.1), nesterov(), schedule=clock, fragments=LABELS)
  got = train(tx, loss_fn, params, targets)
  same = streaming_diloco(optax.adam(0.1), nesterov(), sync_period=6, fragments=LABELS, alpha=0.0)
  want = train(same, loss_fn, params, targets)
  for name in params:
    np.testing.assert_allclose(got.params[name][:, :12], want.params[name][:, :12], atol=1e-6)
    # the schedule has 12 ticks
    np.testing.assert_array_equal(got.params[name][:, 12], got.params[name][:, 11])


@pytest.mark.parametrize("context", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
def test_follows_a_loop_over_the_schedule(train, context):
  """Different speeds, two fragments, a quorum of two, and a learner that is down for a while."""
  clock = simulate_quorum(
    [1.0, 1.0, 1.5, 2.5],
    num_ticks=24,
    sync_period=4,
    num_fragments=2,
    quorum=2,
    grace_seconds=1.0,
    tokens_per_step=[1, 2, 1, 1],
    down=[(1, 6.0, 15.0)],
  )
  assert set(clock.fragment.tolist()) == {0, 1, 2}
  params, targets = make_problem(24)
  tx = decoupled_diloco(optax.sgd(0.3), nesterov(), schedule=clock, fragments=LABELS)
  got = train(tx, loss_fn, params, targets, context=context)

  outer = np.array([1.0, 1, 0, 0, 0, 0])
  theta, buffer, elements = np.tile(outer, (4, 1)), np.zeros(6), np.repeat([1, 2], [2, 4])
  for t in range(24):
    step = 0.3 * CURVATURE * (theta - targets[:, t])
    theta -= clock.works[t][:, None] * step
    if p := clock.fragment[t]:
      mine = elements == p
      g = clock.weights[t].astype(np.float64) @ (outer - theta)[:, mine]
      buffer[mine] = 0.9 * buffer[mine] + g
      outer[mine] -= 0.7 * (g + 0.9 * buffer[mine])
      theta[:, mine] = outer[mine]
    mine = np.concatenate([got.params["a"][:, t], got.params["b"][:, t]], 1)
    np.testing.assert_allclose(mine, theta, atol=3e-6)
  anchor = jaxcomm.outer_params(got.state.opt_state)
  np.testing.assert_allclose(np.concatenate([anchor["a"], anchor["b"]]), outer, atol=3e-6)


def test_quorum_grace_and_weights():
  speeds = {"num_ticks": 40, "sync_period": 4}
  quick = simulate_quorum([1, 1, 2], quorum=2, **speeds)
  # The slow learner has done half as many steps whenever it is in, every other time.
  assert quick.fragment.nonzero()[0].tolist() == list(range(3, 40, 4))
  np.testing.assert_allclose(quick.weights[3], [0.5, 0.5, 0])
  np.testing.assert_allclose(quick.weights[7], [0.4, 0.4, 0.2], rtol=1e-6)
  # A grace window waits for it: merges are later, and all are in.
  patient = simulate_quorum([1, 1, 2], quorum=2, grace_seconds=10, **speeds)
  assert patient.fragment.nonzero()[0].tolist() == list(range(7, 40, 8))
  np.testing.assert_allclose(patient.weights[7], [0.4, 0.4, 0.2], rtol=1e-6)
  # But not for longer than it lasts, nor when another fragment wants the link.
  short = simulate_quorum([1, 1, 9], quorum=2, grace_seconds=2, **speeds)
  assert short.fragment.nonzero()[0][0] == 5
  two = simulate_quorum([1, 1, 9], quorum=2, grace_seconds=99, num_fragments=2, **speeds)
  assert two.fragment[:8].tolist() == [0, 0, 0, 1, 0, 0, 0, 2]
  # Tokens count twice.
  heavy = simulate_quorum([1, 1], quorum=2, tokens_per_step=[1, 3], **speeds)
  np.testing.assert_allclose(heavy.weights[3], [0.1, 0.9], rtol=1e-6)


def test_goodput_is_the_time_that_learners_are_up():
  """Failures cost their own time and nobody else's; without a quorum nothing is merged."""
  down = [(0, 20.0, 60.0), (1, 50.0, 80.0)]
  clock = simulate_quorum([1, 1, 1, 1], num_ticks=100, sync_period=5, quorum=3, down=down)
  assert clock.goodput == pytest.approx(1 - 70 / 400)
  assert not clock.works[20:60, 0].any()
  merged = clock.fragment.nonzero()[0]
  assert not ((merged >= 50) & (merged < 60)).any()  # two are down
  assert ((merged >= 25) & (merged < 50)).sum() == 5
  assert not clock.weights[merged[(merged >= 20) & (merged < 60)], 0].any()
  sums = clock.weights.sum(1)
  np.testing.assert_allclose(sums, clock.fragment > 0, atol=1e-6)


@pytest.mark.slow
def test_a_broken_learner_outside_the_merge_has_no_influence(train):
  params, targets = make_problem(4, num_replicas=3)
  clock = simulate_quorum([1, 1, 3], num_ticks=4, sync_period=4, quorum=2)
  assert clock.weights[3].tolist() == [0.5, 0.5, 0.0]
  tx = decoupled_diloco(optax.sgd(0.3), nesterov(), schedule=clock)
  targets[2] = np.nan
  got = train(tx, loss_fn, params, targets)
  assert np.isnan(got.params["a"][2, 2]).all()
  assert np.isfinite(got.params["a"][:2]).all()
  assert np.isfinite(jaxcomm.outer_params(got.state.opt_state)["a"]).all()


def test_rejects_bad_input(train):
  good = {"step_seconds": [1, 1], "num_ticks": 8, "sync_period": 4, "quorum": 2}
  for kwargs, message in (
    ({"quorum": 3}, "`quorum` must be at most 2 learners, got 3"),
    ({"quorum": 0}, "`quorum` must be an integer >= 1, got 0"),
    ({"num_fragments": 3}, "`sync_period` must be a multiple of .* 3, got 4"),
    ({"step_seconds": []}, "`step_seconds` must be positive numbers"),
    ({"tokens_per_step": [1]}, "`tokens_per_step` must be a positive number for each of 2"),
    ({"down": [(2, 0, 1)]}, r"`down` must be of learners below 2.*got \(2, 0, 1\)"),
    ({"down": [(0, 3, 1)]}, r"`down` must be .* from a time to a later one, got \(0, 3, 1\)"),
  ):
    with pytest.raises(ValueError, match=message):
      simulate_quorum(**{**good, **kwargs})
  clock = simulate_quorum(**good)
  with pytest.raises(ValueError, match="`fragments` must be as many as in `schedule`, 1, got 2"):
    decoupled_diloco(optax.sgd(0.1), schedule=clock, fragments=LABELS)
  params, targets = make_problem(1)
  tx = decoupled_diloco(optax.sgd(0.1), schedule=clock)
  with pytest.raises(ValueError, match=r"`schedule` must be of as many learners .* 4, got 2"):
    train(tx, loss_fn, params, targets)
