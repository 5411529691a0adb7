"""Streaming DiLoCo against torchft's numbers, the paper's loop in float64, DiLoCo, and the wire."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import diloco, pmean_over, streaming_diloco
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step, step_wire
from jaxcomm.transforms import fragment_labels

P = jax.P
# torchft's regression fixtures: (delay, alpha) -> a fragment merged at steps 3, 9 and one merged at
# steps 6, 12, after 0, 1, ... steps. With alpha 1 nothing comes back from the outer parameters.
GOLDEN = {
  (0, 0.0): (
    [1, -1, -3, -11, -13, -15, -17, -19, -21, -35],
    [1, -1, -3, -5, -7, -9, -23, -25, -27, -29],
  ),
  (0, 0.5): (
    [1, -1, -3, -8, -10, -12, -14, -16, -18, -24.5],
    [1, -1, -3, -5, -7, -9, -17, -19, -21, -23],
  ),
  (1, 0.0): (
    [1, -1, -3, -7, -9, -11, -13, -15, -17, -27],
    [1, -1, -3, -5, -7, -9, -19, -21, -23, -25],
  ),
  (1, 0.5): ([1, -1, -3, -6, -8, -10, -12, -14, -16, -21.5], None),
  (0, 1.0): (list(range(1, -18, -2)), list(range(1, -18, -2))),
  (1, 1.0): (list(range(1, -18, -2)), list(range(1, -18, -2))),
}
OUTER_AT_3_AND_9 = {(1, 0.5): (-7, -25)}


def outer_sgd(learning_rate, momentum=None):
  sgd = optax.sgd(learning_rate, momentum, nesterov=momentum is not None)
  return optax.chain(pmean_over("replica"), sgd)


def paper_streaming(theta, labels, step, *, period, delay, alpha, lr, momentum):
  """The algorithm of https://arxiv.org/abs/2501.18512, elementwise, in float64.

  Args:
    theta: float64[R, d], equal rows; `step(theta, t)` takes inner step t = 1, 2, ... in place.
    labels: int[d], the fragment of each element.

  Yields:
    theta, and the outer parameters, after every step.
  """
  outer, buffer, in_flight = theta[0].copy(), np.zeros_like(theta[0]), {}
  num_fragments = labels.max() + 1
  for t in itertools.count(1):
    step(theta, t)
    for p in range(num_fragments):
      mine, due = labels == p, (p + 1) * period // num_fragments
      if (t + delay - due) % period == 0:
        in_flight[p] = (outer - theta).mean(0)[mine]
      if (t - due) % period == 0:
        g = in_flight.pop(p)
        buffer[mine] = momentum * buffer[mine] + g
        outer[mine] -= lr * (g + momentum * buffer[mine])
        theta[:, mine] = alpha * theta[:, mine] + (1 - alpha) * outer[mine]
    yield theta.copy(), outer.copy()


def test_golden_trajectories_of_torchft():
  """-2 per inner step, outer SGD(2), two fragments, six steps per round."""

  def train(tx, grad):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update({"f0": grad, "f1": grad}, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), (params, state.anchor)

    params = {"f0": jnp.ones(()), "f1": jnp.ones(())}
    return jax.lax.scan(step, (params, tx.init(params)), length=9)[1]

  settings = {"sync_period": 6, "fragments": 2}
  txs = [
    streaming_diloco(optax.sgd(1.0), outer_sgd(2.0), delay=delay, alpha=alpha, **settings)
    for delay, alpha in GOLDEN
  ]
  roll_out = jax.vmap(lambda grad: [train(tx, grad) for tx in txs], axis_name="replica")
  for case, (params, outer) in zip(GOLDEN, jax.jit(roll_out)(jnp.full(2, 2.0))):
    for name, want in zip(("f0", "f1"), GOLDEN[case]):
      if want is not None:
        np.testing.assert_array_equal(params[name], [want[1:]] * 2, err_msg=str(case))
    if case in OUTER_AT_3_AND_9:
      assert tuple(outer["f0"][0, [2, 8]].tolist()) == OUTER_AT_3_AND_9[case]

    def inner(theta, t):
      theta -= 2

    loop = paper_streaming(
      np.ones((2, 2)), np.arange(2), inner, period=6, delay=case[0], alpha=case[1], lr=2, momentum=0
    )
    for t, (theta, outer_t) in enumerate(itertools.islice(loop, 9)):
      np.testing.assert_array_equal([params["f0"][:, t], params["f1"][:, t]], theta.T)
      if case[0] == 0 or (t + 1) % 3 != 2:  # in flight, ours has taken its outer step already
        np.testing.assert_array_equal([outer["f0"][0, t], outer["f1"][0, t]], outer_t)


STACKED = {"layers": True, "head": False}
CURVATURE = np.linspace(0.3, 1.0, 11).astype(np.float32)


def make_problem(num_replicas=4, num_steps=12):  # after which nothing is in flight
  """Layers [3, 2] and a head [5], each pulled to targets [R, T, 11]."""
  rng = np.random.default_rng(3)
  start = rng.normal(size=11).astype(np.float32)
  targets = rng.normal(size=(num_replicas, num_steps, 11)).astype(np.float32)
  return {"layers": jnp.asarray(start[:6].reshape(3, 2)), "head": jnp.asarray(start[6:])}, targets


def flat(params):
  layers = params["layers"]
  return jnp.concatenate([layers.reshape(*layers.shape[:-2], 6), params["head"]], -1)


def loss_fn(params, target):
  return 0.5 * jnp.sum(CURVATURE * (flat(params) - target) ** 2)


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_follows_the_papers_loop(train, context):
  """Layers of a stacked leaf in different fragments; two of three steps in flight."""
  params, targets = make_problem()
  labels = fragment_labels(params, 2, stacked=STACKED)
  assert labels["layers"].tolist() == [0, 1, 0]
  settings = {"delay": 2, "alpha": 0.25}
  tx = streaming_diloco(
    optax.sgd(0.3), outer_sgd(0.7, 0.9), sync_period=6, fragments=2, stacked=STACKED, **settings
  )
  got = train(tx, loss_fn, params, targets, context=context, apply_updates=jaxcomm.apply_updates)

  def inner(theta, t):
    theta -= 0.3 * CURVATURE * (theta - targets[:, t - 1])

  theta = np.tile(np.asarray(flat(params), np.float64), (4, 1))
  elements = np.concatenate([np.repeat(labels["layers"], 2), np.repeat(labels["head"], 5)])
  loop = paper_streaming(theta, elements, inner, period=6, lr=0.7, momentum=0.9, **settings)
  history = list(itertools.islice(loop, targets.shape[1]))
  for t, (want, _) in enumerate(history):
    mine = np.concatenate([got.params["layers"][:, t].reshape(4, 6), got.params["head"][:, t]], 1)
    np.testing.assert_allclose(mine, want, atol=3e-6)
  outer = jaxcomm.outer_params(got.state.opt_state)
  np.testing.assert_allclose(flat(outer), history[-1][1], atol=3e-6)
  if context == "shard_map":
    varying = got.layout.varying.opt_state
    assert not any(jax.tree.leaves((varying.anchor, varying.outer_states, varying.count)))


def test_one_fragment_without_delay_or_mixing_is_diloco():
  """And a bfloat16 leaf stays within its rounding of the float32 anchor."""
  params = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}
  grads = np.random.default_rng(4).normal(size=(2, 7, 1)).astype(np.float32)

  def train(tx, grads):
    def step(carry, g):
      params, state = carry
      grad = jax.tree.map(lambda p: g.astype(p.dtype) + p, params)
      updates, state = tx.update(grad, state, params)
      params = optax.apply_updates(params, updates)
      return (params, state), (params, jaxcomm.outer_params(state))

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

  one = streaming_diloco(optax.adam(0.1), sync_period=3, fragments=1, alpha=0.0)
  both = jax.jit(
    jax.vmap(
      lambda g: [train(tx, g) for tx in (one, diloco(optax.adam(0.1), sync_period=3))],
      axis_name="replica",
    )
  )
  ours, theirs = both(grads)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  assert (np.asarray(ours[0]["a"])[0, 3] != np.asarray(ours[0]["a"])[1, 3]).any()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.75])
def test_replicas_that_keep_a_share_alpha_drift_further_apart_by_1_over_1_minus_alpha(train, alpha):
  """Replicas that always move apart: their distance grows until a merge takes what a round adds."""
  period, rounds = 2, 24
  pull = np.asarray([[-1.0], [0.0], [3.0]], np.float32)
  slopes = np.repeat(pull[:, None], period * rounds, axis=1)
  outer = outer_sgd(0.7, momentum=0.9)
  tx = streaming_diloco(
    optax.sgd(0.1), outer, sync_period=period, fragments=1, delay=0, alpha=alpha
  )
  got = train(tx, lambda p, slope: jnp.sum(p * slope), jnp.zeros(1), slopes)
  apart = np.asarray(got.params - got.params.mean(0))[:, :, 0]
  drift = -0.1 * period * (pull - pull.mean())[:, 0]  # of one round
  np.testing.assert_allclose(apart[:, -1], alpha / (1 - alpha) * drift, atol=1e-2)
  before = apart[:, -2] + drift / period  # where the step of the merge would have led
  np.testing.assert_allclose(before, drift / (1 - alpha), atol=1e-2)


@pytest.fixture(scope="module")
def compiled():
  """A step of four replicas with fragments of 40, 24 and 24 elements, and its layout."""
  shapes = {"layers": (4, 8), "embed": (40,), "head": (16,)}
  mesh = jax.make_mesh(
    (4,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
  )
  tx = streaming_diloco(
    optax.sgd(0.1),
    sync_period=6,
    fragments={"embed": np.int32(0), "layers": np.array([1, 2, 2, 1]), "head": np.int32(2)},
    delay=1,
  )
  init = lambda key: {k: jnp.zeros(s) for k, s in shapes.items()}  # noqa: E731
  loss = lambda p, b: (sum(jnp.sum((x - b[0]) ** 2) for x in jax.tree.leaves(p)), {})  # noqa: E731
  return make_train_step(loss, init, tx, mesh)


def test_a_step_sends_one_fragment_or_nothing(compiled):
  batch = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=compiled.batch_sharding)
  program = compiled.compile(batch)
  report = collective_bytes(program, compiled.layout.mesh)
  assert {(op.kind, op.dtype, op.axis) for op in report.ops} == {("all-reduce", "f32", "replica")}
  [[conditional]] = {tuple({b.conditional for b in op.branch}) for op in report.ops}
  elements = [0] * 4
  for op in report.ops:
    assert [b.conditional for b in op.branch] == [conditional]
    elements[op.branch[0].index] += int(np.prod(op.shape))
  assert elements == [0, 40, 16, 32]
  assert report.always == 0
  sent = [2 * 3 / 4 * 4 * n for n in elements]
  wire = step_wire(compiled, program)
  assert [wire.sent(level) for level in range(4)] == sent

  state, rows = compiled.init(jax.random.key(0)), jnp.arange(4.0)
  levels = []
  for _ in range(12):
    state, metrics = compiled.step(state, rows)
    levels.append(int(metrics["level"]))
    assert bool(metrics["synced"]) == (levels[-1] > 0)
  assert levels == [0, 1, 0, 2, 0, 3] * 2  # sent after steps 1, 3 and 5
  assert compiled.step._cache_size() == 1
  shares = (1 / 2, 1 / 6, 1 / 6, 1 / 6)
  assert wire.per_step(shares)["replica"] == pytest.approx(sum(map(wire.sent, levels)) / 12)


@pytest.mark.parametrize("delay", [0, 1])
def test_an_exchange_with_a_delay_waits_for_no_gradient(delay):
  tx = streaming_diloco(optax.sgd(0.1), sync_period=2, fragments=1, delay=delay)

  def exchanged(gradient):
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    _, state = tx.update({"w": jnp.ones(3)}, state, params)
    params = {"w": jnp.full(3, 0.9)}
    return tx.update({"w": jnp.full(3, gradient)}, state, params)[1]

  state = jax.jit(jax.vmap(exchanged, axis_name="replica"))(jnp.array([1.0, jnp.nan]))
  assert state.sent.tolist() == [1, 1]
  assert bool(jnp.isfinite(state.anchor["w"]).all()) == (delay > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_layers_of_sharded_leaves_stay_sharded(kind):
  """With int4 messages: a fragment crosses `replica` only."""
  mesh = jax.make_mesh(
    (2, 2),
    ("replica", "fsdp"),
    (getattr(jax.sharding.AxisType, kind),) * 2,
    devices=jax.devices()[:4],
  )
  specs = {"layers": P(None, "fsdp"), "head": P("fsdp")}
  mean = jaxcomm.compressed_mean("replica", jaxcomm.int4(8), specs=specs)
  tx = streaming_diloco(
    optax.sgd(0.1),
    optax.chain(mean, optax.sgd(0.7, 0.9, nesterov=True)),
    sync_period=4,
    fragments=2,
    stacked=STACKED,
  )
  init = lambda key: {"layers": jnp.ones((3, 32)), "head": jnp.ones(32)}  # noqa: E731
  loss = lambda p, b: (sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) + 0 * b.sum(), {})  # noqa: E731
  step = make_train_step(loss, init, tx, mesh, param_specs=specs)
  batch = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=step.batch_sharding)
  report = collective_bytes(step.compile(batch), mesh)
  inner = [op for op in report.ops if "fsdp" in op.axis]
  assert sum(int(np.prod(op.shape)) for op in inner) <= 4  # sums of losses
  assert {op.dtype for op in report.ops if op.axis == "replica"} == {"u8"}
  assert step.layout.shapes.opt_state.outer_states[0][1][0].trace["layers"].shape == (2, 32)


def test_labels_are_even_and_follow_layers():
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
  params = {"embed": leaf(60, 16), "w": leaf(6, 16, 64), "b": leaf(6, 16), "norm": leaf(16)}
  stacked = {"embed": 0, "w": 1, "b": 1, "norm": 0}
  strided = fragment_labels(params, 4, stacked=stacked)
  assert strided["w"].tolist() == strided["b"].tolist() == [0, 1, 2, 3, 0, 1]
  assert {strided["embed"].item(), strided["norm"].item()} <= {2, 3}
  sequential = fragment_labels(params, 3, stacked=stacked, pattern="sequential")
  assert sequential["w"].tolist() == [0, 0, 1, 1, 2, 2]
  sizes = np.zeros(4)
  for name, x in params.items():
    np.add.at(sizes, strided[name], x.size / max(strided[name].size, 1))
  assert sizes.sum() == 60 * 16 + 6 * 16 * 65 + 16
  assert sizes.max() / sizes.sum() < 1 / 3


SGD = optax.sgd(0.1)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (
      {"sync_period": 10},
      "`sync_period` must be a multiple of the number of `fragments`, 4, got 10",
    ),
    ({"sync_period": 0}, "`sync_period` must be an integer >= 1, got 0"),
    ({"delay": 2}, "`delay` must be below `sync_period` / `fragments`.*below 2, got 2"),
    ({"delay": -1}, "`delay` must be an integer >= 0, got -1"),
    ({"alpha": 1.5}, r"`alpha` must be in \[0, 1\], got 1.5"),
    ({"fragments": 0}, "`fragments` must be an integer >= 1, got 0"),
    ({"fragments": {"w": 0, "b": 2}}, r"`fragments` must be .* every integer.*got \[0, 2\]"),
    ({"fragments": {"w": 0.5}}, "`fragments` must be an integer >= 1, or a tree of labels"),
    ({"outer": 0.7}, r"`outer` must be an optax transform, got 0\.7"),
    ({"inner": 0.1}, r"`inner` must be an optax transform, got 0\.1"),
  ],
)
def test_rejects_bad_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    streaming_diloco(**{"inner": SGD, "sync_period": 8, **kwargs})


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"fragments": 4}, "`num_fragments` must be at most what 2 leaves.*got 4, of which 2"),
    ({"pattern": "random"}, "`pattern` must be 'strided' or 'sequential', got 'random'"),
    ({"pattern": "sequential"}, "`pattern` 'sequential' is one of layers, of which `stacked`"),
    ({"fragments": {"w": np.arange(2), "b": 0}}, r"`fragments` must label a leaf of shape \(3,\)"),
  ],
)
def test_rejects_fragments_that_do_not_fit(kwargs, message):
  tx = streaming_diloco(SGD, **{"sync_period": 8, "fragments": 2, **kwargs})
  with pytest.raises(ValueError, match=message):
    tx.init({"w": jnp.ones(3), "b": jnp.ones(2)})


def test_rejects_what_cannot_be_exchanged(train):
  params, targets = make_problem(2, 1)
  tx = streaming_diloco(SGD, sync_period=8, fragments=2)
  with pytest.raises(ValueError, match="`params` must be given to update"):
    tx.update(params, tx.init(params))
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    tx.update(params, tx.init(params), params)
  with pytest.raises(ValueError, match="`params` must be floating-point"):
    tx.init({"n": jnp.arange(3), "w": jnp.ones(2)})
  alone = streaming_diloco(SGD, optax.sgd(0.7), sync_period=8, fragments=2)
  with pytest.raises(ValueError, match="`outer` must average over axis `replica`"):
    train(alone, loss_fn, params, targets)
