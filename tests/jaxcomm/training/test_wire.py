"""Bytes on the wire of a training step: formulas, dtypes, axes, and the promise of DiLoCo."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import compressed_mean, diloco, e3m0, int4, int8, local_sgd, pmean_over, zero_one_adam
from jaxcomm.collectives import allgather_pmean_bytes, compressed_pmean_bytes
from jaxcomm.compressors import scaled_sign
from jaxcomm.inspect import all_reduce_bytes, collective_bytes
from jaxcomm.training import StepWire, make_train_step, step_wire
from jaxcomm.transforms import zero_one_adam_levels

AxisType = jax.sharding.AxisType
P = jax.P
REPLICAS, PERIOD = 4, 20
SHAPES = {"w": (32, 64), "b": (64,), "v": (64, 10)}
SPECS = {"w": P("fsdp"), "b": P(), "v": P("fsdp")}
BATCH = {"x": np.ones((16, 32), np.float32)}


def init_params(key):
  """Numbers without a generator, which would take longest to compile."""
  del key
  rng = np.random.default_rng(0)
  return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def loss_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
  return jnp.mean((hidden @ params["v"]) ** 2), {}


def make_step(tx, *, fsdp=1, kind=AxisType.Auto, stacked=False):
  shape = (1 if stacked else REPLICAS, fsdp)
  devices = jax.devices()[: shape[0] * shape[1]]
  mesh = jax.make_mesh(shape, ("replica", "fsdp"), axis_types=(kind,) * 2, devices=devices)
  specs = SPECS if fsdp > 1 else None
  return make_train_step(loss_fn, init_params, tx, mesh, param_specs=specs, num_replicas=REPLICAS)


def report_of(train_step):
  return collective_bytes(train_step.compile(BATCH), train_step.layout.mesh)


def diloco_int4(specs=None):
  mean = compressed_mean("replica", int4(), specs=specs)
  outer = optax.chain(mean, optax.sgd(0.7, momentum=0.9, nesterov=True))
  return diloco(optax.adam(1e-3), outer, sync_period=PERIOD)


def ddp(mean=None):
  mean = pmean_over("replica") if mean is None else mean
  return optax.chain(mean, optax.adam(1e-3))


def dense_bytes(shapes):
  """Float32 ring all-reduces of all gradients."""
  return sum(all_reduce_bytes(4 * int(np.prod(s)), REPLICAS) for s in shapes.values())


def local_shapes(fsdp):
  return {k: (s[0] // (fsdp if SPECS[k] == P("fsdp") else 1), *s[1:]) for k, s in SHAPES.items()}


STACKED = {
  "ddp": ddp(),
  "ddp_int8": ddp(compressed_mean("replica", int8())),
  "diloco": diloco(optax.adam(1e-3), sync_period=PERIOD),
  "diloco_int4": diloco_int4(),
}


@pytest.fixture(scope="module")
def compiled():
  """`compiled(method, stacked)`: a step, its program, and what that sends."""

  @functools.cache
  def make(method, stacked):
    ts = make_step(STACKED[method], stacked=stacked)
    program = ts.compile(BATCH)
    return ts, program, step_wire(ts, program)

  return make


@pytest.fixture(scope="module")
def inner_alone():
  """`inner_alone(kind)`: the report of the same step without any exchange."""
  return functools.cache(lambda kind: report_of(make_step(optax.adam(1e-3), fsdp=2, kind=kind)))


@pytest.mark.parametrize("mean", ["int4", pytest.param("exact", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sync_adds_nothing_over_inner_axes(inner_alone, kind, mean):
  if mean == "int4":
    tx = diloco_int4(SPECS if kind == AxisType.Auto else None)
  else:
    tx = diloco(optax.adam(1e-3), sync_period=PERIOD)
  report = report_of(make_step(tx, fsdp=2, kind=kind))

  always = [op for op in report.ops if not op.branch]
  assert {op.axis for op in always} == {"fsdp"}
  key = lambda op: (op.kind, op.dtype, op.shape, op.axis, op.bytes)  # noqa: E731
  assert sorted(map(key, always)) == sorted(map(key, inner_alone(kind).ops))

  sync = [op for op in report.ops if op.branch]
  assert {op.axis for op in sync} == {"replica"}
  assert {op.group_size for op in sync} == {REPLICAS}
  assert {b.index for op in sync for b in op.branch} == {1}  # one branch, the other sends nothing
  shards = local_shapes(fsdp=2)
  if mean == "int4":
    assert {op.dtype for op in sync} == {"u8"}
    assert report.conditional == sum(
      compressed_pmean_bytes(s, REPLICAS, int4()) for s in shards.values()
    )
  else:
    assert {op.dtype for op in sync} == {"f32"}
    assert report.conditional == dense_bytes(shards)


MEANS = {
  "int8": (compressed_mean("replica", int8()), int8(), compressed_pmean_bytes),
  "int4": (
    compressed_mean("replica", int4(), error_feedback=True),
    int4(),
    compressed_pmean_bytes,
  ),
  "e3m0": (
    compressed_mean("replica", e3m0(), algorithm="all_gather"),
    e3m0(),
    allgather_pmean_bytes,
  ),
}


@pytest.mark.parametrize(
  "name", [m if m != "int4" else pytest.param(m, marks=pytest.mark.slow) for m in MEANS]
)
def test_bytes_equal_the_formulas(name):
  mean, compressor, formula = MEANS[name]
  report = report_of(make_step(ddp(mean)))
  assert report.by_axis == {
    "replica": sum(formula(s, REPLICAS, compressor) for s in SHAPES.values())
  }
  assert {op.dtype for op in report.ops} <= {"u8", "s8"}
  # One collective per hop and leaf, and no other.
  hops = {"all-to-all", "all-gather"} if formula is compressed_pmean_bytes else {"all-gather"}
  assert {op.kind for op in report.ops} == hops
  assert len(report.ops) == len(hops) * len(SHAPES)


@pytest.mark.parametrize(
  "tx",
  [diloco(optax.adam(1e-3), sync_period=PERIOD), local_sgd(optax.sgd(0.1), sync_period=PERIOD)],
  ids=["diloco", "local_sgd"],
)
def test_exactly_one_mean_per_sync(tx):
  """Each parameter crosses once, in the branch that ends a round; other steps send nothing."""
  report = report_of(make_step(tx))
  assert [op.kind for op in report.ops] == ["all-reduce"] * len(SHAPES)
  assert sorted(op.shape for op in report.ops) == sorted(SHAPES.values())
  assert report.always == 0
  assert report.conditional == dense_bytes(SHAPES)


def test_diloco_sends_a_hundredth_of_data_parallelism(compiled):
  ts, program, wire = compiled("diloco_int4", False)
  dense = compiled("ddp", False)[2]
  assert dense.levels == ({"replica": dense_bytes(SHAPES)},)
  assert dense.dense == wire.dense == dense_bytes(SHAPES)
  assert not wire.logical

  # Summed over a round of real steps, as the training loop does.
  state, sent = ts.init(jax.random.key(0)), 0.0
  batch = jax.device_put(BATCH, ts.batch_sharding)
  for _ in range(PERIOD):
    state, metrics = program(state, batch)
    sent += wire.sent(int(metrics["level"]))
  assert sent == sum(compressed_pmean_bytes(s, REPLICAS, int4()) for s in SHAPES.values())
  assert sent / PERIOD <= dense.sent(0) / 100
  shares = (1 - 1 / PERIOD, 1 / PERIOD)
  np.testing.assert_allclose(wire.per_step(shares)["replica"], sent / PERIOD)


@pytest.mark.parametrize(
  "method", [m if m == "diloco_int4" else pytest.param(m, marks=pytest.mark.slow) for m in STACKED]
)
def test_stacked_replicas_report_the_bytes_of_real_ones(compiled, method):
  logical, real = (compiled(method, stacked)[2] for stacked in (True, False))
  assert (logical.logical, real.logical) == (True, False)
  assert logical.levels == real.levels
  assert logical.dense == real.dense > 0


def test_stacked_replicas_on_two_devices():
  """Bytes over real inner axes are measured, those over replicas are logical, shard by shard."""
  tx = diloco(optax.adam(1e-3), sync_period=PERIOD)
  ts = make_step(tx, stacked=True, fsdp=2)
  wire = step_wire(ts, ts.compile(BATCH))
  assert wire.logical
  local, synced = wire.levels
  assert set(local) == {"fsdp"}
  assert synced == local | {"replica": dense_bytes(local_shapes(fsdp=2))}
  assert wire.dense == dense_bytes(local_shapes(fsdp=2))


def test_dense_counts_shards_where_parameters_are_sharded():
  ts = make_step(diloco_int4(SPECS), fsdp=2)
  wire = step_wire(ts, ts.compile(BATCH))
  assert wire.dense == dense_bytes(local_shapes(fsdp=2))


def test_arithmetic():
  wire = StepWire(
    levels=({"fsdp": 100.0}, {"replica": 40.0, "fsdp": 120.0}), dense=1000.0, logical=False
  )
  assert wire.sent(0) == 100
  assert wire.sent(1) == 160
  assert wire.per_step((0.75, 0.25)) == {"fsdp": 105.0, "replica": 10.0}
  assert wire.per_step((1.0,)) == {"fsdp": 100.0}
  # At 495 bytes/s: data parallelism 1000 / 495 s; the method 2 s + 10 / 495 s: equal.
  assert wire.break_even((0.75, 0.25), step_seconds=2.0) == 495.0
  ddp_wire = StepWire(levels=({"replica": 1000.0},), dense=1000.0, logical=False)
  assert ddp_wire.break_even((1.0,), step_seconds=2.0) == 0


@pytest.mark.slow
def test_every_level_of_exchange_is_counted():
  """0/1 Adam sends exact means, signs or nothing: each step counts what its branch sends."""
  schedule = {"var_freeze_step": 6, "var_update_scaler": 2, "local_step_scaler": 3}
  ts = make_step(zero_one_adam(1e-3, "replica", **schedule))
  compiled = ts.compile(BATCH)
  wire = step_wire(ts, compiled)
  signs = sum(compressed_pmean_bytes(s, REPLICAS, scaled_sign("rms")) for s in SHAPES.values())
  assert [level.get("replica", 0) for level in wire.levels] == [0, signs, dense_bytes(SHAPES)]
  state, levels = ts.init(jax.random.key(0)), []
  batch = jax.device_put(BATCH, ts.batch_sharding)
  for _ in range(14):
    state, metrics = compiled(state, batch)
    levels.append(int(metrics["level"]))
  assert tuple(levels.count(i) for i in range(3)) == zero_one_adam_levels(14, **schedule)
  assert len(set(levels)) == 3


def test_more_stacked_replicas_than_cpu_devices():
  mesh = jax.make_mesh((1,), ("replica",), (AxisType.Auto,), devices=jax.devices()[:1])
  ts = make_train_step(loss_fn, init_params, ddp(), mesh, num_replicas=16)
  with pytest.raises(ValueError, match=r"16 stacked replicas needs 16 CPU devices, got 8"):
    step_wire(ts, ts.compile(BATCH))
