"""Running a function of one device's array on N devices, in the three ways that must agree."""

import jax
import jax.numpy as jnp
import pytest

AXIS = "replica"


def make_mesh(n):
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((n,), (AXIS,), auto, devices=jax.devices()[:n])


def on_devices(fn, mode, n, *, equal=False):
  """jit of `fn(local) -> tree` over stacked arrays [n, ...]; results stacked as well.

  `mode` is "checked" or "unchecked" (shard_map with and without replication checks) or "vmap".
  With `equal`, a checked result must be typed as equal on all devices, and is returned once.
  """
  if mode == "vmap":
    return jax.jit(jax.vmap(fn, axis_name=AXIS))

  def local(x):
    out = fn(x[0])
    return out if equal else jax.tree.map(lambda a: a[None], out)

  out_specs = jax.P() if equal else jax.P(AXIS)
  specs = {"in_specs": jax.P(AXIS), "out_specs": out_specs, "check_vma": mode == "checked"}
  return jax.jit(jax.shard_map(local, mesh=make_mesh(n), **specs))


@pytest.fixture(name="on_devices")
def on_devices_fixture():
  return on_devices


@pytest.fixture(params=["checked", "unchecked", "vmap"])
def mode(request):
  return request.param


@pytest.fixture
def stacked():
  """Gaussian arrays, one per device: stacked(n, shape, seed=0, dtype="float32")."""

  def make(n, shape, seed=0, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), (n, *shape), dtype=jnp.dtype(dtype))

  return make
