"""Training by a partition plan: equal to one device, with the bytes and the memory it promises."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

import jaxcomm
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step
from parallel import (
  PartitionPlan,
  flat_specs,
  make_zero_step,
  memory_per_device,
  partitioned,
  shard_state,
  traffic_per_step,
)
from parallel._zero_plan import axes_of

AXES = ("gcd", "gpu", "node")
ZERO3 = PartitionPlan.zero(3, AXES)
TOPO = PartitionPlan.topo()
ZEROPP = PartitionPlan.zeropp(AXES, ("gcd", "gpu"), weight_bits=None, grad_bits=None)
PLANS = pytest.mark.parametrize("plan", [TOPO, ZEROPP], ids=["topo", "zeropp"])


def legal_plans():
  """All nested choices of levels, joint or one by one, with every secondary copy.

  But for `TOPO` and `ZEROPP`, which the tests above check alike.
  """
  for w, g, o in itertools.combinations_with_replacement(range(4), 3):
    plan = PartitionPlan(weights=AXES[:w], gradients=AXES[:g], optimizer=AXES[:o])
    yield plan
    for kept in range(1, w):
      yield dataclasses.replace(plan, secondary=AXES[:kept])
  for stage in (1, 2, 3):
    yield PartitionPlan.zero(stage, AXES)


def shapes_of(zero):
  return jax.eval_shape(zero.init, jax.random.key(0))


def large(run):
  """The collectives of arrays, without those of the loss, the metrics and the norm."""
  return [op for op in run.wire.ops if op.kind != "all-reduce" or math.prod(op.shape) > 2]


def by_level(run):
  levels = {}
  for op in large(run):
    levels[op.axis] = levels.get(op.axis, 0.0) + op.bytes
  return levels


def check_training(zero, run):
  losses, params = zero.reference()
  np.testing.assert_allclose(run.losses, losses, rtol=0, atol=1e-5)
  got = jax.tree.map(lambda x: x[0], run.step.to_logical(run.state).params)  # of replica 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, params)


def check_bytes(zero, run, grad_accum=1, itemsize=4):
  sizes = {"weight_bytes": itemsize, "grad_bytes": itemsize, "stacked": True}
  mesh = run.step.layout.mesh.shape
  assert by_level(run) == traffic_per_step(
    run.step.plan, shapes_of(zero), mesh, grad_accum, **sizes
  )


def check_memory(zero, run):
  parts = memory_per_device(
    run.step.plan, shapes_of(zero), run.step.layout.mesh.shape, stacked=True,
    weight_bytes=1, grad_bytes=1,
  )  # fmt: skip
  arrays = [x for x in jax.tree.leaves(run.state) if x.ndim > 1]  # counters aside
  held = sum(x.addressable_shards[0].data.nbytes for x in arrays)
  assert held == parts["optimizer"]
  assert run.local_elements == {k: parts[k] for k in ("weights", "gradients")}


@PLANS
def test_trains_like_one_device(zero, plan):
  check_training(zero, zero.train(plan))


@PLANS
def test_sends_what_the_formula_says(zero, plan):
  check_bytes(zero, zero.train(plan))


@PLANS
def test_holds_what_the_formula_says(zero, plan):
  check_memory(zero, zero.train(plan))


@PLANS
def test_backward_crosses_nodes_with_gradients_only(zero, plan):
  """Weights cross nodes as often in the whole step as in the forward pass alone."""
  run = zero.train(plan)
  batch = run.step.abstract_batch(zero.batch())
  forward = run.step.evaluate.lower(run.step.layout.shapes, batch).compile().as_text()
  forward = collective_bytes(forward, run.step.layout.mesh)

  def crossings(ops):
    return sorted(
      (op.shape, op.times) for op in ops if op.kind == "all-gather" and "node" in op.axis
    )

  assert crossings(run.wire.ops) == crossings(forward.ops) != []
  if plan is TOPO:  # only to make weights of parameters, outside of the loop over layers
    assert {times for _, times in crossings(forward.ops)} == {1}
  gradients = [op for op in large(run) if "node" in op.axis and op.kind != "all-gather"]
  assert {op.kind for op in gradients} == {"reduce-scatter"}


@pytest.mark.slow
def test_micro_steps_are_the_same_step(zero):
  """And the slow links carry as much as with one micro-step."""
  run, once = zero.train(TOPO, grad_accum=2), zero.train(TOPO)
  check_training(zero, run)

  def scattered(run):
    ops = [op for op in run.wire.ops if op.kind == "reduce-scatter"]
    return [sum(op.bytes for op in ops if op.axis == axis) for axis in AXES]

  gcd, gpu, node = scattered(once)
  assert scattered(run) == [2 * gcd, 2 * gpu, node]
  assert by_level(run)["node"] == by_level(once)["node"]


@pytest.mark.slow
@pytest.mark.parametrize(
  "plan", [p for p in legal_plans() if p not in (TOPO, ZEROPP)], ids=lambda p: _name(p)
)
def test_every_legal_plan(zero, plan):
  run = zero.train(plan)
  check_training(zero, run)
  check_bytes(zero, run)
  check_memory(zero, run)


def _name(plan):
  parts = (plan.weights, plan.gradients, plan.optimizer, plan.secondary or ())
  return "-".join(str(len(axes_of(p))) for p in parts) + "joint" * (plan.optimizer == (AXES,))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("plan", "sizes"),
  [
    (TOPO, {"node": 1}),
    (ZEROPP, {"node": 1}),
    (TOPO, {"node": 3, "gcd": 1}),
    (ZEROPP, {"node": 3, "gcd": 1}),
    (TOPO, dict.fromkeys(AXES, 1)),
  ],
  ids=["topo-1node", "zeropp-1node", "topo-3nodes", "zeropp-3nodes", "1device"],
)
def test_degenerate_and_odd_meshes(zero, plan, sizes):
  run = zero.train(plan, **sizes)
  check_training(zero, run)
  check_bytes(zero, run)


@pytest.mark.slow
def test_replicas_around_a_plan(zero):
  """DiLoCo between two replicas of two nodes of two devices, against two devices."""
  nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
  outer = optax.chain(jaxcomm.pmean_over("replica"), nesterov)
  tx = jaxcomm.diloco(optax.adamw(1e-2), outer, sync_period=2)
  plan = PartitionPlan.zeropp(("node", "gpu"), "gpu", weight_bits=None, grad_bits=None)
  on_shards = zero.loss(functools.partial(partitioned, plan=plan))
  two = jax.make_mesh((2,), ("replica",), (AxisType.Auto,), devices=jax.devices()[:2])

  def train(step):
    state, losses = step.init(jax.random.key(0)), []
    for _ in range(5):
      state, metrics = step.step(state, zero.batch())
      losses.append(np.asarray(metrics["loss"]))
    return losses

  want = train(make_train_step(zero.loss(lambda fn: fn), zero.init, tx, two))
  mesh = zero.mesh(replica=2, gcd=1)
  got = train(make_zero_step(on_shards, zero.init, tx, mesh, plan, stacked=True))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_padding_stays_zero_and_frozen_leaves_as_they_are(zero):
  """Signs are never zero, also those of padding: the residual would remember, a checkpoint not."""
  plan = PartitionPlan.zeropp(("node", "gpu"), "gpu", weight_bits=None, grad_bits=None)
  specs = flat_specs(jax.eval_shape(zero.init, jax.random.key(0)), plan, stacked=True)
  signs = jaxcomm.error_feedback("replica", jaxcomm.compressors.scaled_sign(), specs=specs)
  labels = {"up": "signs", "down": "signs", "gain": "frozen"}
  tx = optax.multi_transform(
    {"signs": optax.chain(signs, optax.adamw(1e-2)), "frozen": optax.set_to_zero()}, labels
  )
  on_shards = zero.loss(functools.partial(partitioned, plan=plan))
  step = make_zero_step(on_shards, zero.init, tx, zero.mesh(replica=2, gcd=1), plan, stacked=True)
  first = step.init(jax.random.key(0))
  frozen, moved = np.asarray(first.params["gain"]), np.asarray(first.params["up"])
  state, _ = step.step(first, zero.batch())
  np.testing.assert_array_equal(state.params["gain"], frozen)
  assert np.abs(np.asarray(state.params["up"]) - moved).max() > 1e-3
  residuals = [x for x in jax.tree.leaves(state.opt_state) if x.shape[:1] == (2,) and x.ndim == 3]
  assert len(residuals) == 2  # up, down: [replicas, layers, padded]
  assert all(np.abs(x).max() > 0 for x in residuals)
  jax.tree.map(np.testing.assert_array_equal, step.from_logical(step.to_logical(state)), state)


@pytest.mark.slow
def test_explicit_axes(zero):
  mesh = zero.mesh(kind=AxisType.Explicit)
  whole = partitioned(zero.loss(lambda fn: fn), TOPO)  # the model as one layer
  step = make_zero_step(whole, zero.init, optax.sgd(0.1), mesh, TOPO)
  state, metrics = step.step(step.init(jax.random.key(0)), zero.batch())
  assert abs(float(metrics["loss"][0]) - zero.reference()[0][0]) < 1e-5
  assert state.params["gain"].sharding.spec == jax.P("replica", AXES)
  logical = step.to_logical(state)
  jax.tree.map(np.testing.assert_array_equal, step.from_logical(logical), state)


@pytest.mark.slow
def test_checkpoints_in_logical_shape_fit_any_plan(zero, tmp_path):
  """Steps 1-10 by three levels, then one more on 6 devices with a secondary copy: no difference."""
  one, other = zero.train(TOPO), zero.train(ZEROPP, node=3, gcd=1)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "step", one.step.to_logical(one.state))
    checkpointer.wait_until_finished()
    logical = checkpointer.restore(tmp_path / "step", other.step.logical_shapes)
  shapes = shapes_of(zero)
  jax.tree.map(lambda x, s: np.testing.assert_equal(x.shape, (1, *s.shape)), logical.params, shapes)
  state = other.step.from_logical(logical)
  again = jax.tree.map(np.asarray, other.step.to_logical(state))  # the meshes differ
  back = one.step.from_logical(jax.device_put(again, one.step.logical_layout.shardings))
  jax.tree.map(np.testing.assert_array_equal, one.state, back)

  want, got = (
    run.compiled(run_state, jax.device_put(zero.batch(), run.step.batch_sharding))
    for run, run_state in ((one, back), (other, state))
  )
  assert float(got[1]["loss"][0]) == pytest.approx(float(want[1]["loss"][0]), abs=1e-6)
  want, got = one.step.to_logical(want[0]), other.step.to_logical(got[0])
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # noqa: E731
  jax.tree.map(close, want.params, got.params)


def test_state_from_parameters(zero):
  run = zero.train(TOPO)
  state = run.step.init(jax.random.key(0))
  params = jax.tree.map(lambda x: x[0], run.step.to_logical(state).params)
  jax.tree.map(np.testing.assert_array_equal, shard_state(run.step, params), state)


def test_evaluates_like_one_device(zero):
  run = zero.train(TOPO)
  sums = run.step.evaluate(run.step.init(jax.random.key(0)), zero.batch())
  assert float(sums["tokens"][0]) == zero.batch()["mask"].sum()
  loss = float(sums["loss_sum"][0] / sums["tokens"][0])
  assert loss == pytest.approx(zero.reference()[0][0], abs=1e-5)


BAD_TX = {
  "norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
  "muon": optax.contrib.muon(1e-3),
}


@pytest.mark.parametrize("tx", BAD_TX.values(), ids=BAD_TX)
def test_rejects_optimizers_that_mix_elements(zero, tx):
  with pytest.raises(ValueError, match="`tx` must treat every element by itself"):
    make_zero_step(lambda *_: None, zero.init, tx, zero.mesh(), TOPO, stacked=True)


def test_rejects_optimizers_whose_state_is_not_like_the_parameter(zero):
  """Adafactor factors the moments of large matrices only, and a flat part is none."""
  tx = optax.adafactor(1e-3, multiply_by_parameter_scale=False, clipping_threshold=None)
  with pytest.raises(ValueError, match="Its state depends on the shape of a parameter"):
    make_zero_step(lambda *_: None, lambda key: jnp.ones((128, 128)), tx, zero.mesh(), TOPO)


def test_rejects_bad_input(zero):
  def make(plan=TOPO, mesh=None, init=zero.init, **options):
    mesh = zero.mesh() if mesh is None else mesh
    loss = partitioned(zero.loss(lambda fn: fn), plan)
    return make_zero_step(loss, init, optax.sgd(0.1), mesh, plan, **options)

  flat = jax.make_mesh((8,), ("fsdp",))
  with pytest.raises(ValueError, match="`mesh` must have an axis 'replica'"):
    make(mesh=flat)
  with pytest.raises(ValueError, match=r"`plan` names the axes \['pod'\], which the mesh lacks"):
    make(PartitionPlan.zero(1, ("gcd", "pod")))
  with pytest.raises(ValueError, match="`plan` must not name the axis 'replica'"):
    make(PartitionPlan.zero(1, "replica"))
  with pytest.raises(ValueError, match="`dtype` must be float32 or bfloat16, got float16"):
    make(dtype="float16")
  with pytest.raises(ValueError, match="`grad_accum` must be an integer >= 1, got 0"):
    make(grad_accum=0)
  with pytest.raises(ValueError, match=r"floating point, got int32 at \['table'\]"):
    make(init=lambda key: {"table": jnp.arange(3)})
  with pytest.raises(ValueError, match=r"an axis of layers, got a scalar at \['s'\]"):
    make(init=lambda key: {"s": jnp.zeros(())}, stacked=True)
  step = make(grad_accum=2)
  with pytest.raises(ValueError, match=r"rows divisible by devices \* grad_accum = 8 \* 2, got"):
    step.step.lower(step.layout.shapes, zero.batch(8))
