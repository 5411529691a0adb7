"""Means on a background thread: the numbers of the simulated delay, order, time limits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import co2, compressed_mean, int8, pmean_over
from jaxcomm.transforms import HostMean, HostRound, ProcessMean, co2_outer, delayed

REPLICAS, SIZE, PERIOD, ROUNDS = 2, 5, 3, 4
OPTIONS = {"sync_period": PERIOD, "outer_momentum": 0.6, "clip_threshold": 0.3}
INNER = optax.adam(0.1)
RNG = np.random.default_rng(7)
TARGETS = RNG.normal(size=(REPLICAS, ROUNDS * PERIOD, SIZE)).astype(np.float32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=SIZE), jnp.float32)}
WAIT = 120  # seconds; no test waits so long unless it fails


def loss_fn(params, target):
  return jnp.sum(jnp.sin(params["w"] - target) ** 2)


def make_round(mean, outer=None):
  outer = co2_outer(**OPTIONS, mean=optax.identity()) if outer is None else outer
  value_and_grad = jax.value_and_grad(loss_fn)
  return HostRound(value_and_grad, INNER, outer, HostMean(mean), sync_period=PERIOD)


class Meeting:
  """The mean over threads that stand for processes."""

  def __init__(self, num):
    self._rows, self._barrier = [None] * num, threading.Barrier(num, timeout=WAIT)

  def mean_of(self, index):
    def mean(tree):
      self._rows[index] = tree
      self._barrier.wait()
      rows = list(self._rows)
      self._barrier.wait()  # all have read before one writes again
      return jax.tree.map(lambda *x: np.float32(sum(x) / np.float32(len(x))), *rows)

    return mean


def test_two_hosts_compute_what_co2_computes(train):
  """Each host a thread of its own, that waits only for the mean."""
  meeting = Meeting(REPLICAS)

  def host(i):
    run_round = make_round(meeting.mean_of(i))
    params, state, history, losses = PARAMS, run_round.init(PARAMS), [], []
    for batches in TARGETS[i].reshape(ROUNDS, PERIOD, SIZE):
      params, state, loss = run_round(params, state, batches, timeout=WAIT)
      history.append(params["w"])
      losses.append(loss)
    return np.stack(history), np.concatenate(losses), jax.tree.map(np.asarray, state)

  with ThreadPoolExecutor(REPLICAS) as pool:
    hosts = list(pool.map(host, range(REPLICAS)))
  whole = train(co2(INNER, **OPTIONS), loss_fn, PARAMS, TARGETS)
  for i, (history, losses, state) in enumerate(hosts):
    np.testing.assert_allclose(history, whole.params["w"][i, PERIOD - 1 :: PERIOD], atol=1e-6)
    np.testing.assert_allclose(losses, whole.loss[i], atol=1e-5)
    np.testing.assert_array_equal(history, hosts[0][0])
    assert state.count == ROUNDS * PERIOD
  moved = [state.outer_state.inflight["w"] for _, _, state in hosts]
  assert np.abs(moved[0] - moved[1]).max() > 1e-3


def test_a_mean_that_is_late_may_be_waited_for_again():
  arrived, calls = threading.Event(), []

  def mean(tree):
    calls.append(tree)
    assert arrived.wait(WAIT)
    return tree

  run_round = make_round(mean)
  state = run_round.init(PARAMS)
  before = jax.tree.map(np.array, state)
  with pytest.raises(TimeoutError):
    run_round(PARAMS, state, TARGETS[0, :PERIOD], timeout=0.01)
  jax.tree.map(np.testing.assert_array_equal, state, before)
  with pytest.raises(ValueError, match="`state` must be the one whose mean is still"):
    run_round(PARAMS, run_round.init(PARAMS), TARGETS[0, :PERIOD], timeout=WAIT)
  arrived.set()
  params, state, _ = run_round(PARAMS, state, TARGETS[0, :PERIOD], timeout=WAIT)
  assert len(calls) == 1  # one exchange, or the other processes would be one ahead
  np.testing.assert_array_equal(params["w"], PARAMS["w"])  # nothing was in flight
  run_round(params, state, TARGETS[0, PERIOD : 2 * PERIOD], timeout=WAIT)
  assert len(calls) == 2
  assert np.abs(calls[1]["w"]).max() > 0


def test_means_run_in_order_on_copies_and_hand_over_errors():
  def mean(tree):
    if tree[0] == 1:
      raise ConnectionError("lost a peer")
    return -tree

  host_mean = HostMean(mean)
  given = np.zeros(2, np.float32)
  pending = []
  for i in range(3):
    given[:] = i
    pending.append(host_mean.start(given))
  assert pending[0].result(WAIT).tolist() == [0, 0]
  with pytest.raises(ConnectionError, match="lost a peer"):
    pending[1].result(WAIT)
  assert pending[2].result(WAIT).tolist() == [-2, -2]


@pytest.mark.slow
def test_process_mean_keeps_the_state_of_its_mean():
  mesh = jax.make_mesh((1,), ("replica",), devices=jax.devices()[:1])
  tree = {"w": np.array([1.0, np.nan], np.float32)}
  skipping = ProcessMean(mesh, mean=pmean_over("replica", skip_nonfinite=True))
  assert skipping.state is None
  assert skipping(tree)["w"].tolist() == [0.0, 0.0]
  skipping(tree)
  assert skipping.state.total_left_out == 2
  mean = ProcessMean(mesh, mean=compressed_mean("replica", int8(), error_feedback=True))
  x = RNG.normal(size=300).astype(np.float32)
  np.testing.assert_array_equal(mean(x), x)  # alone it sends nothing
  assert mean.state.count == 1


def test_rejects():
  with pytest.raises(ValueError, match="`mean` must be a function of a tree, got None"):
    HostMean(None)
  sgd = optax.sgd(0.1)
  for kwargs, match in (
    ({"sync_period": 0}, "`sync_period` must be an integer >= 1"),
    ({"host_mean": np.mean}, "`host_mean` must be a HostMean"),
    ({"inner": 0.1}, "`inner` must be an optax transform"),
    ({"outer": 0.1}, "`outer` must be an optax transform"),
  ):
    given = {"inner": sgd, "outer": sgd, "host_mean": HostMean(lambda tree: tree), "sync_period": 2}
    with pytest.raises(ValueError, match=match):
      HostRound(jax.value_and_grad(loss_fn), **given | kwargs)
  run_round = make_round(lambda tree: tree, delayed(sgd))
  with pytest.raises(ValueError, match="`batches` must be arrays with a leading axis"):
    run_round(PARAMS, run_round.init(PARAMS), TARGETS[0, :2])
  with pytest.raises(ValueError, match="`mesh` must have one axis and one device of each"):
    ProcessMean(jax.make_mesh((2,), ("replica",), devices=jax.devices()[:2]))
  with pytest.raises(ValueError, match="`mean` must be an optax transform"):
    ProcessMean(jax.make_mesh((1,), ("replica",), devices=jax.devices()[:1]), mean=0.5)
