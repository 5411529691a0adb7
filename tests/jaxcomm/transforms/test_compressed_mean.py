"""The compressed mean as a transform: nothing is lost, nothing but payloads is sent."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import (
  _axes,
  _shards,
  compressed_mean,
  e3m0,
  ef21,
  error_feedback,
  int4,
  int8,
  pmean_over,
)
from jaxcomm.inspect import collective_bytes

REPLICAS, STEPS = 4, 6
# 12 elements in blocks of 8 make padded and partial blocks; 33 do not divide by 4 replicas.
SHAPES = {"w": (4, 3), "v": (33,), "s": ()}
COMPRESSORS = {
  "int8": int8(8),
  "int4": int4(8),
  "e3m0": e3m0(8),
  "stochastic": int4(8, rounding="stochastic"),
}
ALGORITHMS = ("two_hop", "all_gather")
FAST = (("int8", "two_hop"),)
METHODS = [
  pytest.param(c, a, marks=() if (c, a) in FAST else pytest.mark.slow, id=f"{c}-{a}")
  for c in COMPRESSORS
  for a in ALGORITHMS
]
CONTEXTS = ("vmap", "shard_map")


def gradients(num_replicas=REPLICAS, steps=STEPS, dtype=np.float32):
  rng = np.random.default_rng(3)
  return {k: rng.normal(size=(num_replicas, steps, *s)).astype(dtype) for k, s in SHAPES.items()}


def run(tx, grads, context):
  """Means [R, T, ...] and the last states, over the leading axis of `grads`."""
  num_replicas = jax.tree.leaves(grads)[0].shape[0]

  def roll_out(grads):
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    state = state._replace(residual=_axes.vary(state.residual, "replica"))

    def step(state, grad):
      mean, state = tx.update(grad, state)
      return state, mean

    return jax.lax.scan(step, state, grads)

  def local(grads):
    state, means = roll_out(jax.tree.map(lambda g: g[0], grads))
    return jax.tree.map(lambda x: x[None], (state, means))

  if context == "vmap":
    fun = jax.vmap(roll_out, axis_name="replica")
  else:
    auto, spec = (jax.sharding.AxisType.Auto,), jax.P("replica")
    devices = jax.devices()[:num_replicas]
    mesh = jax.make_mesh((num_replicas,), ("replica",), axis_types=auto, devices=devices)
    fun = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
  state, means = jax.jit(fun)(grads)
  return jax.tree.map(np.asarray, means), jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def results():
  """Every compressor, with error feedback, by both algorithms, in both contexts."""
  out = {}

  def get(name, algorithm, context):
    key = (name, algorithm, context)
    if key not in out:
      tx = compressed_mean("replica", COMPRESSORS[name], error_feedback=True, algorithm=algorithm)
      out[key] = run(tx, gradients(), context)
    return out[key]

  return get


@pytest.mark.parametrize(("name", "algorithm"), METHODS)
def test_error_feedback_loses_nothing(results, name, algorithm):
  """sum_t mean_t + mean_i residual_i = sum_t mean_i gradient_i, in both hops."""
  means, state = results(name, algorithm, "vmap")
  for key, grads in gradients().items():
    got = means[key][0].sum(0) + state.residual[key].mean(0)
    np.testing.assert_allclose(got, grads.astype(np.float64).mean(0).sum(0), atol=5e-6)
    if grads[0, 0].size > 1:
      assert np.abs(means[key][0] - grads.mean(0)).max() > 1e-4  # it was compressed


@pytest.mark.slow
@pytest.mark.parametrize("num_replicas", [2, 3, 8])
def test_error_feedback_with_other_numbers_of_replicas(num_replicas):
  grads = gradients(num_replicas)
  means, state = run(compressed_mean("replica", int4(8), error_feedback=True), grads, "shard_map")
  for key, grad in grads.items():
    got = means[key][0].sum(0) + state.residual[key].mean(0)
    np.testing.assert_allclose(got, grad.astype(np.float64).mean(0).sum(0), atol=1e-5)


@pytest.mark.parametrize(("name", "algorithm"), METHODS)
def test_all_replicas_get_the_same_bits(results, name, algorithm):
  means, state = results(name, algorithm, "shard_map")
  for mean in means.values():
    np.testing.assert_array_equal(mean, np.broadcast_to(mean[:1], mean.shape))
  assert state.count.tolist() == [STEPS] * REPLICAS
  assert not (state.residual["w"][0] == state.residual["w"][1]).all()


@pytest.mark.parametrize(("name", "algorithm"), METHODS)
def test_stacked_replicas_agree_with_devices_bit_for_bit(results, name, algorithm):
  stacked, devices = (results(name, algorithm, context) for context in CONTEXTS)
  jax.tree.map(np.testing.assert_array_equal, stacked, devices)


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased_and_differs_per_mean():
  steps = 64
  grads = {"v": np.repeat(gradients(steps=1)["v"], steps, 1)}
  compressor = COMPRESSORS["stochastic"]
  means = run(compressed_mean("replica", compressor, seed=7), grads, "vmap")[0]["v"][0]
  assert len(np.unique(means[:, 0])) > 5  # new noise at every mean
  # The variance of each hop is at most step^2 / 4 with step = max / 7; 4 sigma of the mean.
  step = np.abs(grads["v"]).max() / 7
  sigma = np.sqrt(step**2 / 4 / REPLICAS + step**2 / 4) / np.sqrt(steps)
  want = grads["v"][:, 0].astype(np.float64).mean(0)
  assert np.abs(means.mean(0) - want).max() < 4 * sigma


@pytest.mark.slow
def test_the_seed_makes_the_noise():
  grads = {"v": gradients(steps=1)["v"]}
  means = [
    run(compressed_mean("replica", COMPRESSORS["stochastic"], seed=seed), grads, "vmap")[0]["v"]
    for seed in (7, 7, 8)
  ]
  np.testing.assert_array_equal(means[0], means[1])
  assert (means[0] != means[2]).any()


@pytest.mark.parametrize("num_replicas", [1, 2, pytest.param(8, marks=pytest.mark.slow)])
def test_error_is_within_the_bound_for_any_number_of_replicas(num_replicas):
  """Nearest int8 is off by half a scale per hop; one replica sends and loses nothing."""
  grads = gradients(num_replicas, steps=1)
  means, _ = run(compressed_mean("replica", int8(8)), grads, "shard_map")
  for key, grad in grads.items():
    half_step = 0 if num_replicas == 1 else np.abs(grad).max() / 127 / 2
    error = np.abs(means[key][0, 0] - grad[:, 0].mean(0))
    assert error.max() <= 2.01 * half_step + 1e-6, key


@pytest.mark.parametrize("transform", [pmean_over("replica"), compressed_mean("replica", int8())])
def test_keeps_dtypes_and_state_types(transform):
  grads = {"h": jnp.ones((2, 3), jnp.bfloat16), "w": jnp.ones((2, 3)), "f": jnp.ones((2, 3), "f2")}

  def update(grads):
    state = transform.init(grads)
    mean, new = transform.update(grads, state)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, new)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, new)
    return mean

  mean = jax.eval_shape(jax.vmap(update, axis_name="replica"), grads)
  assert {k: m.dtype for k, m in mean.items()} == {k: g.dtype for k, g in grads.items()}


def test_without_error_feedback_no_residual_is_stored():
  params = {"w": jnp.ones(3)}
  assert compressed_mean("replica", int8()).init(params).residual == optax.EmptyState()
  residual = (
    compressed_mean("replica", int8(), error_feedback=True)
    .init({"w": jnp.ones(3, jnp.bfloat16)})
    .residual
  )
  assert residual["w"].dtype == jnp.float32


def sharded_mean(tx, kind, grads, specs):
  """One mean over replica=4 of leaves sharded over fsdp=2, and what it sent."""
  mesh = jax.make_mesh((4, 2), ("replica", "fsdp"), axis_types=(kind, kind))
  stacked = jax.tree.map(
    lambda g, s: jax.device_put(g, jax.NamedSharding(mesh, jax.P("replica", *s))), grads, specs
  )

  def local(grads):
    mean, _ = tx.update(jax.tree.map(lambda g: g[0], grads), tx.init(grads))
    return mean

  def fun(grads):
    return jax.shard_map(
      local, in_specs=jax.P("replica"), out_specs=jax.P(), axis_names={"replica"}
    )(grads)

  if kind == jax.sharding.AxisType.Explicit:
    # Explicit inside, Auto at the border: JAX would gather the shards there.
    inside = jax.tree.map(lambda s: jax.P(None, *s), specs)
    local = jax.sharding.explicit_axes(local, axes=("fsdp",), in_sharding=(inside,))
    fun = jax.sharding.auto_axes(fun, out_sharding=specs)
  with jax.set_mesh(mesh):
    compiled = jax.jit(fun).lower(stacked).compile()
  return compiled(stacked), collective_bytes(compiled, mesh)


KINDS = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
SPECS = {"w": jax.P("fsdp"), "v": jax.P(), "s": jax.P()}


@pytest.mark.parametrize(
  ("kind", "algorithm"),
  [
    ("auto", "two_hop"),
    pytest.param("explicit", "two_hop", marks=pytest.mark.slow),
    pytest.param("auto", "all_gather", marks=pytest.mark.slow),
  ],
)
def test_sharded_leaves_are_compressed_shard_by_shard(kind, algorithm):
  grads = {k: g[:, 0] for k, g in gradients().items()}
  specs = SPECS if kind == "auto" else None  # Explicit types tell
  tx = compressed_mean("replica", int8(8), algorithm=algorithm, specs=specs)
  means, report = sharded_mean(tx, KINDS[kind], grads, SPECS)
  assert {op.axis for op in report.ops} == {"replica"}
  # s8 is a payload of one array, u8 are codes and scales end to end.
  assert {op.dtype for op in report.ops} <= {"u8", "s8"}

  # What one device would send for its own shards is what it sends.
  plain = compressed_mean("replica", int8(8), algorithm=algorithm)
  shards = {"top": grads["w"][:, :2], "bottom": grads["w"][:, 2:], "v": grads["v"]}
  want, _ = run(plain, jax.tree.map(lambda g: g[:, None], shards), "vmap")
  halves = np.concatenate([want["top"], want["bottom"]], axis=2)
  np.testing.assert_array_equal(means["w"], halves[0, 0])
  np.testing.assert_array_equal(means["v"], want["v"][0, 0])


def test_shards_round_with_keys_of_their_own():
  """Equal shards under stochastic rounding must not get equal noise; replicated leaves must."""
  ones = np.full((4, 64), 1 / 3, np.float32)
  ones[:, ::8] = 1.0  # the scale of each block
  specs = {"w": jax.P("fsdp"), "v": jax.P()}
  compressor = int4(8, rounding="stochastic")
  tx = compressed_mean("replica", compressor, algorithm="all_gather", specs=specs)
  means, _ = sharded_mean(tx, KINDS["auto"], {"w": ones, "v": ones}, specs)
  assert (np.asarray(means["w"][:32]) != np.asarray(means["w"][32:])).any()
  copies = [np.asarray(s.data) for s in means["v"].addressable_shards]
  assert all((copy == copies[0]).all() for copy in copies)


def test_automatic_axes_need_specs():
  grads = {k: g[:, 0] for k, g in gradients().items()}
  with pytest.raises(ValueError, match=r"`specs` must say.*automatic mesh axes \{'fsdp': 2\}"):
    sharded_mean(compressed_mean("replica", int8()), KINDS["auto"], grads, SPECS)


def test_specs_of_all_parameters_fit_a_masked_mean():
  """Large leaves compressed, the others exact."""
  grads = {k: g[:, 0] for k, g in gradients().items()}
  large = {"w": True, "v": False, "s": False}
  compressed = optax.masked(compressed_mean("replica", int8(8), specs=SPECS), large)
  exact = optax.masked(pmean_over("replica"), jax.tree.map(lambda x: not x, large))
  means, report = sharded_mean(optax.chain(compressed, exact), KINDS["auto"], grads, SPECS)
  assert {op.axis for op in report.ops} == {"replica"}
  assert {op.shape for op in report.ops if op.dtype == "f32"} == {(33,), ()}
  np.testing.assert_allclose(means["v"], grads["v"].mean(0), rtol=1e-5, atol=1e-6)
  half_step = np.abs(grads["w"]).max() / 127 / 2
  assert np.abs(means["w"] - grads["w"].mean(0)).max() <= 2.01 * half_step


def test_one_spec_stands_for_all_leaves():
  grads = {k: g[:, 0] for k, g in gradients().items()}
  specs = jax.tree.map(lambda _: jax.P(), grads)
  tx = compressed_mean("replica", int8(), specs=jax.P())
  _, report = sharded_mean(tx, KINDS["auto"], grads, specs)
  assert {op.axis for op in report.ops} == {"replica"}


def test_stacked_replicas_cannot_be_compressed_by_shards():
  tx = compressed_mean("replica", int8(), specs={"w": jax.P("fsdp"), "v": jax.P()})
  grads = {"w": jnp.ones((2, 4)), "v": jnp.ones((2, 4))}
  for fsdp in (1, 2):
    update = jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="replica")
    mesh = jax.sharding.AbstractMesh((1, fsdp), ("replica", "fsdp"))
    refused = pytest.raises(ValueError, match=r"over the mesh axes \['fsdp'\].*vmap")
    with _shards.around_stacked_replicas(mesh), refused if fsdp > 1 else contextlib.nullcontext():
      jax.eval_shape(update, grads)


@pytest.mark.parametrize("make", [compressed_mean, error_feedback, ef21])
def test_rejects_what_is_no_compressor(make):
  with pytest.raises(ValueError, match=r"`compressor` must be a Compressor.* got 'int8'"):
    make("replica", "int8")


def test_rejects_an_unknown_algorithm():
  with pytest.raises(ValueError, match=r"`algorithm` must be one of .*got 'ring'"):
    compressed_mean("replica", int8(), algorithm="ring")


@pytest.mark.parametrize("transform", [pmean_over("replica"), compressed_mean("replica", int8())])
def test_rejects_updates_that_are_not_floats(transform):
  grads = {"n": jnp.ones((2, 3), jnp.int32)}
  with pytest.raises(ValueError, match=r"must .* floating-point"):
    jax.eval_shape(
      jax.vmap(lambda g: transform.update(g, transform.init(g)), axis_name="replica"), grads
    )
