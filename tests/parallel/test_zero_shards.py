"""Shards alone: gathered bits, and the scale of gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import int8
from parallel import (
  PartitionPlan,
  Shard,
  gather_params,
  partitioned,
  reduce_scatter_grads,
  shard_params,
)

AXES = ("gcd", "gpu", "node")
EVERYWHERE = jax.P(("node", "gpu", "gcd"))
ODD = {"scalar": (), "one": (1,), "vector": (13,), "matrix": (5, 7), "empty": (0, 3)}
# Mesh (node, gpu, gcd) lists node 0 first; parts are numbered gcd first.
DEVICE_OF_PART = np.arange(8).reshape(2, 2, 2).transpose(2, 1, 0).reshape(-1)
PLANS = {
  "flat": PartitionPlan.zero(3, AXES),
  "levels": PartitionPlan(weights=AXES, gradients=AXES, optimizer=AXES),
  "secondary": PartitionPlan.zeropp(AXES, ("gcd", "gpu"), weight_bits=None, grad_bits=None),
  "topo": PartitionPlan.topo(),
}


REPLICATED = jax.P()


def on_devices(fn, mesh, in_specs=REPLICATED):
  """jit of `fn` on every device; what each returns, stacked in front."""

  def local(*args):
    return jax.tree.map(lambda x: x[None], fn(*args))

  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=EVERYWHERE))


def draw(shapes, lead=(), dtype="float32"):
  rng = np.random.default_rng(0)
  return {k: jnp.asarray(rng.normal(size=(*lead, *s)), dtype) for k, s in shapes.items()}


@pytest.fixture
def mesh(zero):
  return jax.make_mesh((2, 2, 2), ("node", "gpu", "gcd"), (jax.sharding.AxisType.Auto,) * 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gathers_what_was_sharded(mesh, plan, dtype):
  params = draw(ODD, dtype=dtype)
  gather = on_devices(lambda p: gather_params(shard_params(p, plan, dtype=dtype), plan), mesh)
  for name, got in gather(params).items():
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, np.stack([params[name]] * 8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [PLANS["flat"], PLANS["levels"]], ids=["flat", "levels"])
def test_scatters_the_mean_of_every_leaf(mesh, plan, dtype):
  """1-D and 2-D leaves alike: the mean over devices, each device its contiguous part."""
  grads = draw(ODD, lead=(8,), dtype=dtype)
  scatter = on_devices(
    lambda g: reduce_scatter_grads(jax.tree.map(lambda x: x[0], g), plan), mesh, EVERYWHERE
  )
  parts = jax.tree.map(np.asarray, scatter(grads))
  for name, shape in ODD.items():
    got = parts[name][DEVICE_OF_PART].reshape(-1)[: int(np.prod(shape))].astype(np.float64)
    want = np.asarray(grads[name], np.float64).mean(0).reshape(-1)
    tolerance = 1e-6 if dtype == "float32" else 0.03  # three roundings to 8 bits, values below 2
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_quantized_weights_have_the_same_bits_everywhere(mesh):
  """Those of one rounding of each part, although they travel in three hops."""
  plan = PartitionPlan.zeropp(AXES, ("gcd", "gpu"), block_size=8)
  plan = dataclasses.replace(plan, min_size=9)
  params = draw({"matrix": (5, 31), "small": (8,)})
  gather = on_devices(
    lambda p: gather_params(shard_params(p, plan, key=jax.random.key(0)), plan), mesh
  )
  got = gather(params)
  flat = jnp.pad(params["matrix"].reshape(-1), (0, 192 - 155))  # 8 devices times whole blocks
  code = int8(block_size=8)
  want = code.decompress(jax.jit(code.compress)(None, flat), flat.shape)[:155].reshape(5, 31)
  np.testing.assert_array_equal(got["matrix"], np.stack([want] * 8))
  np.testing.assert_array_equal(got["small"], np.stack([params["small"]] * 8))


def test_quantized_gradients_are_means():
  """Unbiased, so neither sums nor cut off at the largest code."""
  axes = AXES[:2]
  levels = PartitionPlan(weights=axes, gradients=axes, optimizer=axes, block_size=8, min_size=1)
  plan = dataclasses.replace(levels, grad_bits={"gcd": 4, "gpu": 4})
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), axes, auto, devices=jax.devices()[:4])
  grads = draw({"matrix": (8, 8)}, lead=(4,))["matrix"]

  def scatter(key, grads):
    keys = jax.random.split(key, 100)
    return jax.lax.map(lambda k: reduce_scatter_grads(grads[0], plan, k), keys)

  fn = jax.shard_map(
    scatter, mesh=mesh, in_specs=(REPLICATED, jax.P(axes)), out_specs=jax.P(None, axes)
  )
  draws = np.asarray(jax.jit(fn)(jax.random.key(0), grads))
  error = draws - np.asarray(grads).mean(0).reshape(1, 64)
  assert np.abs(error.mean(0)).max() < 5 * error.std(0).max() / 10  # 5 sigma of 100 draws
  # Two roundings, each by less than a step, 1/7 of the largest value of a block.
  assert np.abs(error).max() < 2 / 7 * np.abs(grads).max()


@pytest.mark.parametrize("plan", [PLANS["topo"], PLANS["secondary"]], ids=["topo", "secondary"])
def test_derivative_is_the_mean_gradient(mesh, plan):
  params = draw({"w": (3, 5)})
  x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 3)), jnp.float32)
  fn = partitioned(lambda w, x: jnp.sum(jnp.sin(x @ w["w"])), plan)

  def local(params, x):
    shards = shard_params(params, plan)

    def loss(slots):
      is_shard = lambda s: isinstance(s, Shard)  # noqa: E731
      moved = jax.tree.map(lambda s, z: s.replace(slot=z), shards, slots, is_leaf=is_shard)
      return fn(moved, x)

    return jax.grad(loss)({"w": shards["w"].slot})["w"]

  got = np.asarray(on_devices(local, mesh, (REPLICATED, EVERYWHERE))(params, x))
  grad = jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w))), in_axes=(None, 0))
  grads = np.pad(grad(params["w"], x).reshape(8, 15), [(0, 0), (0, 1)])
  if plan.gradients == AXES:
    np.testing.assert_allclose(got[DEVICE_OF_PART].reshape(-1), grads.mean(0), rtol=0, atol=1e-6)
    return
  for node in (slice(0, 4), slice(4, 8)):  # across nodes once a step, by the training step
    parts = got[node][[0, 2, 1, 3]].reshape(-1)  # gcd first
    np.testing.assert_allclose(parts, grads[node].mean(0), rtol=0, atol=1e-6)


def test_rejects_bad_input(mesh):
  plan = PLANS["topo"]
  params = {"w": jnp.ones((2, 3))}
  with pytest.raises(ValueError, match="axis `gcd` is unbound"):
    shard_params(params, plan)
  with pytest.raises(ValueError, match=r"floating point, got int32 at \['w'\]"):
    on_devices(lambda p: shard_params(p, plan)["w"].weight, mesh)({"w": jnp.ones(3, int)})
  with pytest.raises(ValueError, match="`shards` must be single layers"):
    on_devices(lambda p: gather_params(shard_params(p, plan, stacked=True), plan), mesh)(params)
  quantized = PartitionPlan.topo(grad_bits=4, block_size=8)
  quantized = dataclasses.replace(quantized, min_size=1)
  with pytest.raises(ValueError, match="`key` must be"):
    on_devices(lambda p: reduce_scatter_grads(p, quantized), mesh)(params)
