"""The table that every method must pass, on every kind of mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import (
  ad_psgd,
  adagossip,
  co2,
  compressed_mean,
  demo,
  dfedsam,
  diloco,
  e3m0,
  eager_diloco,
  ef21,
  int4,
  int8,
  local_sgd,
  noloco,
  one_bit_adam,
  pmean_over,
  powersgd_mean,
  sgp,
  sign_majority,
  slowmo,
  streaming_diloco,
  zero_one_adam,
)
from jaxcomm.collectives import ring
from jaxcomm.training import make_train_step
from jaxcomm.transforms import (
  async_local_sgd,
  decoupled_diloco,
  simulate_async,
  simulate_quorum,
)

AxisType = jax.sharding.AxisType
P = jax.P
STEPS, ROWS = 60, 8
RATE = 0.25  # a power of two: products are exact, however the compiler fuses them
SPECS = {"w": P("fsdp"), "h": P()}
PARAMS = {"w": np.full((8, 3), 2.0, np.float32), "h": np.full(6, -1.0, jnp.bfloat16)}


def sgd_after(mean, learning_rate):
  return optax.chain(mean, optax.sgd(learning_rate))


def nesterov_after(mean):
  return optax.chain(mean, optax.sgd(0.5, momentum=0.5, nesterov=True))


def compressed(compressor, learning_rate, place, **kwargs):
  mean = compressed_mean("replica", compressor, specs=place.specs, **kwargs)
  return sgd_after(mean, learning_rate)


def powersgd(learning_rate, place, **kwargs):
  where = {"specs": SPECS, "mesh": place.mesh()} if place.fsdp > 1 else {}
  mean = powersgd_mean("replica", 1, min_compression_rate=1.0, **where, **kwargs)
  return sgd_after(mean, learning_rate)


def diloco_over(mean, learning_rate):
  return diloco(optax.sgd(learning_rate), nesterov_after(mean), sync_period=2)


TICKS = 500  # more than any test here takes
# name -> (learning_rate, Context) -> transform
METHODS = {
  "pmean": lambda lr, place: sgd_after(pmean_over("replica"), lr),
  # Each algorithm with and without feedback; each compressor.
  "int8_two_hop": functools.partial(compressed, int8(8)),
  "int8_ef_two_hop": functools.partial(compressed, int8(8), error_feedback=True),
  "int4_all_gather": functools.partial(compressed, int4(8), algorithm="all_gather"),
  "e3m0_ef_all_gather": functools.partial(
    compressed, e3m0(8), algorithm="all_gather", error_feedback=True
  ),
  "local_sgd": lambda lr, place: local_sgd(optax.sgd(lr), sync_period=2),
  "local_sgd_int8": lambda lr, place: local_sgd(
    optax.sgd(lr), sync_period=2, mean=compressed_mean("replica", int8(8), specs=place.specs)
  ),
  "diloco": lambda lr, place: diloco_over(pmean_over("replica"), lr),
  "diloco_int4": lambda lr, place: diloco_over(
    compressed_mean("replica", int4(8), specs=place.specs), lr
  ),
  "diloco_e3m0_ef": lambda lr, place: diloco_over(
    compressed_mean("replica", e3m0(8), error_feedback=True, specs=place.specs), lr
  ),
  "streaming_diloco": lambda lr, place: streaming_diloco(
    optax.sgd(lr), nesterov_after(pmean_over("replica")), sync_period=2, fragments=2
  ),
  "eager_diloco": lambda lr, place: eager_diloco(
    optax.sgd(lr), optax.sgd(0.5, momentum=0.5, nesterov=True), sync_period=2
  ),
  "decoupled_diloco": lambda lr, place: decoupled_diloco(
    optax.sgd(lr), nesterov_after(pmean_over("replica")), schedule=simulate_quorum(
      [1.0] * place.replicas, num_ticks=TICKS, sync_period=2, quorum=place.replicas
    ),
  ),
  "async_local_sgd": lambda lr, place: async_local_sgd(
    optax.sgd(lr), optax.sgd(0.3), schedule=simulate_async(
      [1.0] * place.replicas, num_ticks=TICKS, sync_period=2
    ),
  ),
  "slowmo": lambda lr, place: slowmo(optax.sgd(lr), sync_period=2, inner_lr=lr),
  "co2": lambda lr, place: co2(
    optax.sgd(lr), sync_period=2, gap=2.0, skip_nonfinite=True  # the norm would couple the leaves
  ),
  "ef21": lambda lr, place: sgd_after(ef21("replica", int4(8), specs=place.specs), lr),
  "powersgd": powersgd,
  "powersgd_alternating": functools.partial(powersgd, variant="alternating"),
  "one_bit_adam": lambda lr, place: one_bit_adam(
    lr / 2, "replica", b1=0.5, warmup_steps=10, specs=place.specs
  ),
  "zero_one_adam": lambda lr, place: zero_one_adam(
    lr / 2, "replica", b1=0.5, var_freeze_step=20, var_update_scaler=4, local_step_scaler=8,
    local_step_clipper=2, specs=place.specs,
  ),
  "sign_majority": lambda lr, place: sgd_after(
    sign_majority("replica", specs=place.specs), lr / 5
  ),
  "demo": lambda lr, place: demo(
    lr / 5, "replica", compression_decay=0.9, compression_topk=2, compression_chunk=4,
    specs=place.specs,
  ),
  "noloco": lambda lr, place: noloco(
    optax.sgd(lr), sync_period=2, outer_lr=0.5, consensus_lr=0.75
  ),
  "dfedsam": lambda lr, place: dfedsam(optax.sgd(lr), ring(), sync_period=2, gossip_steps=2),
  "sgp": lambda lr, place: sgp(optax.sgd(lr)),
  "sgp_overlap": lambda lr, place: sgp(optax.sgd(lr), ring(), overlap=True),
  "ad_psgd": lambda lr, place: ad_psgd(optax.sgd(lr), delay=1),
  "adagossip": lambda lr, place: adagossip(optax.sgd(lr), ring(), consensus_lr=0.01, b2=0.9),
}  # fmt: skip
# Every replica ends elsewhere, pulled by its own rows, around a mean that all methods but adagossip
# keep.
GOSSIP = ("noloco", "dfedsam", "sgp", "sgp_overlap", "ad_psgd", "adagossip")
# XLA sums matrix products, and fuses quotients, in one way for one replica and another for four.
REORDERED = ("demo", "zero_one_adam", "sgp_overlap", "adagossip")
EXACT = ("pmean", "local_sgd", "diloco", *GOSSIP[:-1])


@dataclasses.dataclass(frozen=True)
class Context:
  """Where replicas live: stacked on one device, or on devices that fsdp may divide."""

  replicas: int = 4
  stacked: bool = False
  fsdp: int = 1
  kind: AxisType = AxisType.Auto

  def mesh(self):
    shape = (1 if self.stacked else self.replicas, self.fsdp)
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("replica", "fsdp"), axis_types=(self.kind,) * 2, devices=devices)

  @property
  def specs(self):
    """What `compressed_mean` must be told: types tell on Explicit axes."""
    return SPECS if self.fsdp > 1 and self.kind == AxisType.Auto else None


CONTEXTS = {
  "vmap": Context(stacked=True),
  "devices": Context(),
  "auto": Context(fsdp=2),
  "explicit": Context(fsdp=2, kind=AxisType.Explicit),
  **{f"devices{n}": Context(replicas=n) for n in (1, 2, 8)},
  **{f"vmap{n}": Context(replicas=n, stacked=True) for n in (1, 2, 8)},
}
FAST = {
  ("pmean", "vmap"),
  ("pmean", "devices"),
  ("int8_ef_two_hop", "vmap"),
  ("int8_ef_two_hop", "devices"),
  ("int8_ef_two_hop", "explicit"),
  ("int8_ef_two_hop", "auto"),
  ("local_sgd", "vmap"),
  ("local_sgd", "devices"),
  ("diloco_int4", "vmap"),
  ("diloco_int4", "devices"),
  ("diloco_int4", "auto"),
  ("diloco_int4", "explicit"),
  ("powersgd", "explicit"),
  ("demo", "auto"),
  ("noloco", "devices"),
}


def cell(*names):
  slow = any((names[0], context) not in FAST for context in names[1:])
  return pytest.param(*names, marks=pytest.mark.slow if slow else (), id="-".join(names))


TABLE = [cell(m, c) for m in METHODS for c in ("vmap", "devices", "auto", "explicit")]
TABLE += [
  cell(m, c)
  for m in ("int8_ef_two_hop", "diloco", "diloco_int4")
  for c in CONTEXTS
  if c[-1].isdigit()
]


def make_batch():
  rng = np.random.default_rng(5)
  batch = {k: 1 + 0.1 * rng.normal(size=(ROWS, *p.shape)) for k, p in PARAMS.items()}
  return {k: x.astype(np.float32) for k, x in batch.items()}


def loss_fn(params, batch):
  """Convex, with its minimum at the mean of all rows, which no replica has alone."""
  far = jax.tree.map(lambda p, x: jnp.square(p.astype(jnp.float32)[None] - x), params, batch)
  return sum(jnp.sum(f) for f in jax.tree.leaves(far)) / (2 * len(batch["w"])), {}


@dataclasses.dataclass(frozen=True)
class Run:
  step: object
  first: object  # state before the first step, donated
  last: object
  losses: np.ndarray  # float32[T, R]
  programs: int  # compiled for all steps


@pytest.fixture(scope="module")
def runs():
  """`runs(method, context)`: trains once, for all rows of the table."""

  @functools.cache
  def run(method, context):
    place = CONTEXTS[context]
    tx = METHODS[method](RATE, place)
    init = lambda key: jax.tree.map(jnp.asarray, PARAMS)  # noqa: E731
    train = make_train_step(
      loss_fn, init, tx, place.mesh(), param_specs=SPECS, num_replicas=place.replicas
    )
    first = state = train.init(jax.random.key(0))
    batch = jax.device_put(make_batch(), train.batch_sharding)
    losses = []
    for _ in range(STEPS):
      state, metrics = train.step(state, batch)
      # One step at a time: XLA:CPU deadlocks with many collectives in flight on few cores.
      losses.append(np.asarray(metrics["loss"]))
    return Run(train, first, state, np.asarray(losses), train.step._cache_size())

  return run


def replica_params(run, name):
  """float64[R or 1, ...]"""
  x = np.asarray(run.last.params[name].astype(jnp.float32), np.float64)
  return x if run.step.layout.varying.params[name] else x[None]


@pytest.mark.parametrize(("method", "context"), TABLE)
def test_converges(runs, method, context):
  run = runs(method, context)
  for name, target in make_batch().items():
    # 4-bit means without feedback stop where the rounded gradients cancel: rows spread by 0.1.
    limit = 2e-3 if name == "w" and method in EXACT else 0.1
    params = replica_params(run, name)
    if method in GOSSIP and CONTEXTS[context].replicas > 1:
      spread = np.ptp(params, 0).max()
      assert 1e-3 < spread < 0.3, (name, spread)
      params = params.mean(0)
    far = np.abs(params - target.astype(np.float64).mean(0)).max()
    assert far < limit, (name, far)
    assert np.abs(PARAMS[name].astype(np.float64) - target.mean(0)).max() > 0.7
  assert run.losses.shape == (STEPS, CONTEXTS[context].replicas)


@pytest.mark.parametrize(("method", "context"), TABLE)
def test_compiles_once_for_all_rounds(runs, method, context):
  assert runs(method, context).programs == 1


@pytest.mark.parametrize(("method", "context"), TABLE)
def test_state_keeps_shapes_dtypes_and_shardings(runs, method, context):
  run = runs(method, context)
  expected = run.step.layout.shapes
  abstract = jax.eval_shape(run.step.init, jax.random.key(0))
  assert jax.tree.structure(run.last) == jax.tree.structure(expected)
  assert run.last.params["h"].dtype == jnp.bfloat16
  for first, last, shape, from_init in zip(
    *map(jax.tree.leaves, (run.first, run.last, expected, abstract))
  ):
    assert first.sharding == last.sharding or first.sharding.is_equivalent_to(
      last.sharding, last.ndim
    )
    assert last.sharding.is_equivalent_to(shape.sharding, last.ndim)
    assert (last.shape, last.dtype) == (shape.shape, shape.dtype)
    assert (from_init.shape, from_init.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(("method", "context"), TABLE)
def test_the_old_state_is_donated(runs, method, context):
  for path, leaf in jax.tree.leaves_with_path(runs(method, context).first):
    assert leaf.is_deleted() or leaf.size == 1, path  # `synced` is not read, hence not donated


@pytest.mark.parametrize(
  ("method", "one", "other"),
  [cell(m, "vmap", "devices") for m in METHODS]
  + [cell(m, "auto", "explicit") for m in METHODS]
  + [cell(m, f"vmap{n}", f"devices{n}") for m in ("diloco", "diloco_int4") for n in (1, 2, 8)],
)
def test_contexts_agree(runs, method, one, other):
  """Bit for bit in float32; XLA may keep more bits than bfloat16 has, in one program or another."""
  exact = 1e-6 if method in REORDERED else 0
  one, other = runs(method, one), runs(method, other)
  for (path, x), y in zip(jax.tree.leaves_with_path(one.last), jax.tree.leaves(other.last)):
    name = jax.tree_util.keystr(path)
    x, y = (np.asarray(a.astype(jnp.float32)) for a in (x, y))
    np.testing.assert_allclose(x, y, rtol=0, atol=2**-6 if "'h'" in name else exact, err_msg=name)


GRADS = {
  k: np.random.default_rng(6).normal(size=(4, 4, *p.shape)).astype(np.float32).astype(p.dtype)
  for k, p in PARAMS.items()
}
REMATERIALISED = ("int8_ef_two_hop", "diloco_int4", "powersgd", "zero_one_adam", "demo")
COMPOSED = ("pmean", "int8_ef_two_hop", "local_sgd")


def wrapped(make):
  """The same method inside optax's wrappers; `make(learning_rate)` makes it."""
  labels = jax.tree.map(lambda _: "all", PARAMS)
  return {
    "alone": make(RATE),
    "extra_args": optax.with_extra_args_support(make(RATE)),
    "chain": optax.chain(optax.identity(), optax.with_extra_args_support(make(RATE))),
    "masked": optax.masked(make(RATE), jax.tree.map(lambda _: True, PARAMS)),
    "partition": optax.partition({"all": make(RATE)}, labels),
    "inject": optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(RATE),
    "multi_steps": optax.MultiSteps(make(RATE), 2),
  }


def roll_out(txs, grads):
  """Parameters of one replica after all gradients, by each transform."""

  def train(name, tx):
    params = jax.tree.map(jnp.asarray, PARAMS)
    repeats = 2 if name == "multi_steps" else 1  # which averages two equal gradients

    def step(carry, grad):
      params, state = carry
      extra = {} if name == "alone" else {"value": jnp.zeros(()), "nobody_knows": 1}
      for _ in range(repeats):
        args = (grad, state, params)
        updates, state = tx.update(*args) if not extra else tx.update(*args, **extra)
        params = optax.apply_updates(params, updates)
      return (params, state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]

  return {name: train(name, tx) for name, tx in txs.items()}


@pytest.mark.parametrize(
  "method",
  [m if m in COMPOSED else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_composes_with_optax(method):
  """Unknown extra arguments, chain, masked, partition, inject_hyperparams, MultiSteps."""
  txs = wrapped(lambda lr: METHODS[method](lr, CONTEXTS["vmap"]))
  out = jax.jit(jax.vmap(functools.partial(roll_out, txs), axis_name="replica"))(GRADS)
  alone = out.pop("alone")
  for name, params in out.items():
    for leaf, want in alone.items():
      assert params[leaf].dtype == PARAMS[leaf].dtype
      # "inject": the rate is an array, and XLA may fuse its product otherwise.
      tolerance = {"rtol": 1e-6, "atol": 1e-6} if leaf == "w" else {"rtol": 2**-7, "atol": 2**-7}
      got, want = (np.asarray(x.astype(jnp.float32)) for x in (params[leaf], want))
      np.testing.assert_allclose(got, want, **tolerance, err_msg=name)


@pytest.mark.parametrize(
  "method", ["local_sgd", "diloco", pytest.param("diloco_int4", marks=pytest.mark.slow)]
)
def test_the_period_may_be_injected(method):
  """`sync_period` as a hyperparameter gives the rounds of a static one."""
  make = {
    "local_sgd": lambda sync_period: local_sgd(optax.sgd(RATE), sync_period=sync_period),
    "diloco": lambda sync_period: diloco(optax.sgd(RATE), sync_period=sync_period),
    "diloco_int4": lambda sync_period: diloco(
      optax.sgd(RATE),
      nesterov_after(compressed_mean("replica", int4(8))),
      sync_period=sync_period,
    ),
  }[method]
  txs = {"alone": make(sync_period=2), "inject": optax.inject_hyperparams(make)(sync_period=2)}
  out = jax.jit(jax.vmap(functools.partial(roll_out, txs), axis_name="replica"))(GRADS)
  jax.tree.map(np.testing.assert_array_equal, out["alone"], out["inject"])


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
@pytest.mark.parametrize(
  "method", ["local_sgd", *(pytest.param(m, marks=pytest.mark.slow) for m in REMATERIALISED)]
)
def test_rematerialised_losses_change_nothing(train, method, context):
  """In a scan, in a jit, as everywhere in these tests."""
  targets = {k: np.repeat(x[:4, None], 5, 1) for k, x in make_batch().items()}
  loss = lambda p, b: sum(  # noqa: E731
    jnp.sum(jnp.sin(p[k].astype(jnp.float32) - b[k])) for k in PARAMS
  )
  params = jax.tree.map(jnp.asarray, PARAMS)
  tx = METHODS[method](RATE, CONTEXTS["vmap"])
  plain = train(tx, loss, params, targets, context=context)
  remat = train(tx, loss, params, targets, context=context, checkpoint=True)
  jax.tree.map(np.testing.assert_array_equal, plain.params, remat.params)
