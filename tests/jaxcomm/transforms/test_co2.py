"""CO2 against its recursion in float64, closed forms of the delay, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import co2, compressed_mean, int4, pmean_over
from jaxcomm.inspect import collective_bytes
from jaxcomm.transforms import staleness_gap

REPLICAS, SIZE, PERIOD, ROUNDS = 4, 5, 3, 6
STEPS = PERIOD * ROUNDS
CURVATURE = np.linspace(0.2, 1.0, SIZE)
CONTEXTS = [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"]
OPTIONS = {"outer_lr": 0.9, "outer_momentum": 0.6, "clip_threshold": 0.4, "inner_lr": 0.3}


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def make_problem(num_steps=STEPS):
  rng = np.random.default_rng(4)
  targets = rng.normal(size=(REPLICAS, num_steps, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


def recursion(start, targets, *, outer_lr, outer_momentum, clip_threshold, inner_lr):
  """The paper's recursion with our staleness gap; history [R, T, d], momenta [rounds, d], gaps."""
  before = now = start.astype(np.float64)  # x_{t-1,0} and x_{t,0}
  arriving = None  # the mean of x_{t-1,τ}
  m, momenta, gaps = np.zeros(SIZE), [], []
  x = [now] * REPLICAS
  history = np.zeros(targets.shape)
  for t in range(targets.shape[1]):
    x = [x[i] - inner_lr * CURVATURE * (x[i] - targets[i, t]) for i in range(REPLICAS)]
    if (t + 1) % PERIOD == 0:
      after = now
      if arriving is not None:
        far = np.linalg.norm(before - arriving)
        gaps.append(1 + np.linalg.norm(now - before) / far)
        m = outer_momentum * m + (before - arriving) / inner_lr / gaps[-1]
        m = np.clip(m, -clip_threshold, clip_threshold)
        momenta.append(m)
        after = now - outer_lr * inner_lr * m
      arriving = np.mean(x, axis=0)
      before, now = now, after
      x = [now] * REPLICAS
    history[:, t] = x
  return history, np.array(momenta), np.array(gaps)


@pytest.mark.parametrize("context", CONTEXTS)
def test_follows_the_recursion(train, context):
  params, targets = make_problem()
  got = train(
    co2(optax.sgd(0.3), sync_period=PERIOD, **OPTIONS), loss_fn, params, targets, context=context
  )
  start = np.asarray(params["w"])
  want, momenta, gaps = recursion(start, targets, **OPTIONS)
  np.testing.assert_allclose(got.params["w"], want, atol=5e-6)
  np.testing.assert_allclose(
    optax.tree.get(got.state.opt_state, "momentum")["w"], momenta[-1], atol=1e-5
  )
  np.testing.assert_allclose(optax.tree.get(got.state.opt_state, "gap"), gaps[-1], rtol=1e-5)
  assert gaps.min() >= 1
  assert gaps.max() > 1.2

  # The clip is at work: without it, as in the released code, the run is another one.
  assert (np.abs(momenta) == 0.4).any()
  unclipped, _, _ = recursion(start, targets, **OPTIONS | {"clip_threshold": np.inf})
  assert np.abs(unclipped - want).max() > 0.1

  boundaries = got.params["w"][:, PERIOD - 1 :: PERIOD]
  np.testing.assert_array_equal(boundaries, np.broadcast_to(boundaries[0], boundaries.shape))
  np.testing.assert_array_equal(boundaries[0, 0], start)  # the first round enters one round later
  anchor = jaxcomm.outer_params(got.state.opt_state)["w"]
  np.testing.assert_array_equal(anchor, boundaries[0, -1])
  if context == "shard_map":
    varying = got.layout.varying.opt_state.outer_state
    assert varying.inflight == {"w": True}
    assert not any(jax.tree.leaves(varying.outer_state))


@pytest.mark.parametrize("period", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_delay_one_recursion_on_a_quadratic(train, period):
  """x_{t+1} = x_t - (I - A^τ) x_{t-1}; for τ = 1 it is stable if and only if γλ < 1."""
  rounds = 60
  products = np.array([0.1, 0.25, 0.6, 0.9, 1.05])  # γλ
  tx = co2(optax.sgd(1.0), sync_period=period, outer_momentum=0.0, gap=1.0)
  targets = np.zeros((2, rounds * period, 1), np.float32)
  curvature = jnp.asarray(products, jnp.float32)
  got = train(
    tx, lambda p, zero: 0.5 * jnp.sum(curvature * (p - zero) ** 2), jnp.ones(SIZE), targets
  ).params[0, period - 1 :: period]

  x = [np.ones(SIZE), np.ones(SIZE)]  # x_0, and x_1, which is the same point
  for _ in range(rounds - 1):
    x.append(x[-1] - (1 - (1 - products) ** period) * x[-2])
  rounding = rounds * 2.0**-23  # one per round
  np.testing.assert_allclose(got, x[1:], atol=rounding * np.abs(x).max(), rtol=0)
  if period == 1:  # roots of z² - z + γλ: |z|² = γλ from 1/4 on
    assert np.abs(got[-10:, 4]).max() > 2
    assert np.abs(got[-10:, 3]).max() < 0.25


@pytest.mark.slow
def test_limits():
  """In one program: no clip, one replica, equal data, delayed averages, other gaps."""
  params, targets = make_problem()
  inner = optax.sgd(0.3)
  slow = lambda step, mean: jnp.full((), 2.0)  # noqa: E731
  entries = lambda step, mean: jax.tree.map(lambda g: jnp.full_like(g, 2.0), mean)  # noqa: E731
  txs = {
    "default": co2(inner, sync_period=PERIOD),
    "no_clip": co2(inner, sync_period=PERIOD, clip_threshold=np.inf),
    "averages": co2(inner, sync_period=PERIOD, outer_momentum=0.0, gap=1.0),
    "gap_2": co2(inner, sync_period=PERIOD, gap=2.0),
    "gap_function": co2(inner, sync_period=PERIOD, gap=slow),
    "gap_tree": co2(inner, sync_period=PERIOD, gap=entries),
  }

  def replica(targets):
    def roll_out(tx):
      def step(carry, target):
        p, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(p, target), state, p)
        p = jaxcomm.apply_updates(p, updates, state)
        return (p, state), (p["w"], optax.tree.get(state, "gap"))

      return jax.lax.scan(step, (params, tx.init(params)), targets)[1]

    return {name: roll_out(tx) for name, tx in txs.items()}

  run = jax.jit(jax.vmap(replica, axis_name="replica"))
  got = jax.tree.map(np.asarray, run(targets))
  np.testing.assert_array_equal(got["no_clip"][0], got["default"][0])
  for name in ("gap_function", "gap_tree"):
    np.testing.assert_allclose(got[name][0], got["gap_2"][0], atol=1e-6)
    assert (got[name][1][0, PERIOD - 1 :] == 2).all()
  gaps = got["default"][1]
  np.testing.assert_array_equal(gaps, np.broadcast_to(gaps[0], gaps.shape))
  assert gaps.min() >= 1
  assert gaps.max() > 1.2

  # α = 1, β = 0, no penalty: the parameters after a round are averages, one round late.
  anchors = got["averages"][0][0, PERIOD - 1 :: PERIOD]
  before, now = [np.asarray(params["w"], np.float64)] * 2
  for t in range(1, ROUNDS):
    ends = []
    for i in range(REPLICAS):
      x = before
      for k in range((t - 1) * PERIOD, t * PERIOD):
        x = x - 0.3 * CURVATURE * (x - targets[i, k])
      ends.append(x)
    before, now = now, now - (before - np.mean(ends, axis=0))
    np.testing.assert_allclose(anchors[t], now, atol=5e-6)

  same = jax.tree.map(np.asarray, run(np.broadcast_to(targets[:1], targets.shape)))
  alone = jax.tree.map(np.asarray, jax.jit(jax.vmap(replica, axis_name="replica"))(targets[:1]))
  for name, (w, _) in same.items():
    np.testing.assert_allclose(w, np.broadcast_to(alone[name][0], w.shape), atol=2e-6)


def test_staleness_gap():
  gap = jax.jit(staleness_gap)
  step = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[-4.0]])}
  mean = {"a": jnp.array([0.0, 1.5]), "b": jnp.array([[2.0]])}
  still = jax.tree.map(jnp.zeros_like, step)
  assert float(gap(step, mean)) == pytest.approx(3.0)
  assert float(gap(still, mean)) == 1
  assert float(gap(still, still)) == 1
  scaled = [jax.tree.map(lambda x: 2.0**10 * x, tree) for tree in (step, mean)]
  assert float(gap(*scaled)) == float(gap(step, mean))


@pytest.mark.slow
@pytest.mark.parametrize("context", ["vmap", "shard_map"])
def test_resumes_in_the_middle_of_a_round(train, context):
  """What is in flight, residuals, momentum and its gap included."""
  params, targets = make_problem()
  mean = compressed_mean("replica", int4(8), error_feedback=True)
  tx = co2(optax.adam(0.3), sync_period=PERIOD, mean=mean)
  whole = train(tx, loss_fn, params, targets[:, :13], context=context)
  for split in (7, 9):  # in a round, and between two
    first = train(tx, loss_fn, params, targets[:, :split], context=context)
    saved = jax.tree.map(np.asarray, first.state)  # what a checkpoint holds
    rest = train(tx, loss_fn, params, targets[:, split:13], context=context, state=saved)
    np.testing.assert_array_equal(rest.params["w"], whole.params["w"][:, split:])
    jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)


@pytest.mark.slow
def test_sends_one_mean_per_round_and_nothing_between():
  grads = {"w": jnp.ones((24, 20)), "b": jnp.ones(33)}
  dense = 2 * (REPLICAS - 1) / REPLICAS * 4 * (24 * 20 + 33)
  mesh = jax.make_mesh((REPLICAS,), ("replica",), devices=jax.devices()[:REPLICAS])
  for skip, extra in ((False, 0), (True, 2 * (REPLICAS - 1) / REPLICAS * 4)):
    tx = co2(optax.sgd(0.1), sync_period=4, skip_nonfinite=skip)

    def local(grads, state, tx=tx):
      grads = jaxcomm._axes.vary(grads, "replica")
      updates, state = tx.update(grads, state, grads)
      return jax.tree.map(lambda x: jaxcomm._axes.vary(x, "replica")[None], (updates, state))

    fun = jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("replica"))
    report = collective_bytes(jax.jit(fun).lower(grads, tx.init(grads)).compile(), mesh)
    assert {op.axis for op in report.ops} == {"replica"}
    assert (report.always, report.total) == (0, dense + extra)


BAD = {
  "outer_lr": [0.0, -1.0, None],
  "outer_momentum": [1.0, -0.5],
  "clip_threshold": [0.0, -1.0, "on"],
  "gap": [0.5, float("inf"), float("nan"), "ratio", True, None, [2.0]],
  "inner_lr": [0.0, lambda count: 0.0],
  "sync_period": [0, 1.5],
  "outer_shards": [0, 2.0],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_rejects(name, value):
  with pytest.raises(ValueError, match=f"`{name}` must be .*got"):
    co2(optax.sgd(0.1), **{"sync_period": 2, name: value})


def test_rejects_what_sharding_cannot_follow():
  with pytest.raises(ValueError, match="`mean` must be None with `outer_shards`"):
    co2(optax.sgd(0.1), sync_period=2, mean=pmean_over("replica"), outer_shards=4)
  with pytest.raises(ValueError, match="`gap` must not be a function with `outer_shards`"):
    co2(optax.sgd(0.1), sync_period=2, gap=lambda step, mean: 1.0, outer_shards=4)


def test_rejects_a_mean_that_is_none(train):
  params, targets = make_problem()
  tx = co2(optax.sgd(0.1), sync_period=2, mean=optax.identity())
  with pytest.raises(ValueError, match="`outer` must average over axis `replica`"):
    train(tx, loss_fn, params, targets, context="shard_map")
