"""Running a function of one device's array on N devices, in the three ways that must agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

AXIS = "replica"
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def make_mesh(n):
  return jax.make_mesh((n,), (AXIS,), (AUTO,), devices=jax.devices()[:n])


def on_devices(fn, mode, n, *, equal=False):
  """jit of `fn(local) -> tree` over stacked arrays [n, ...]; results stacked as well.

  `mode` is "checked" or "unchecked" (shard_map with and without replication checks) or "vmap".
  With `equal`, a checked result must be typed as equal on all devices, and is returned once.
  """
  if mode == "vmap":
    return jax.jit(jax.vmap(fn, axis_name=AXIS))

  def local(x):
    out = fn(jax.tree.map(lambda a: a[0], x))
    return out if equal else jax.tree.map(lambda a: a[None], out)

  out_specs = jax.P() if equal else jax.P(AXIS)
  specs = {"in_specs": jax.P(AXIS), "out_specs": out_specs, "check_vma": mode == "checked"}
  return jax.jit(jax.shard_map(local, mesh=make_mesh(n), **specs))


@pytest.fixture(name="on_devices")
def on_devices_fixture():
  return on_devices


def on_nodes(fn, sizes, axis_type=AUTO, *, check_vma=True):
  """jit of `fn(local) -> tree` over arrays [nodes, gpus, ...] on a mesh (node, gpu)."""
  num = sizes[0] * sizes[1]
  mesh = jax.make_mesh(sizes, ("node", "gpu"), (axis_type,) * 2, devices=jax.devices()[:num])

  def local(x):
    return jax.tree.map(lambda a: a[None, None], fn(jax.tree.map(lambda a: a[0, 0], x)))

  specs = {"in_specs": jax.P("node", "gpu"), "out_specs": jax.P("node", "gpu")}
  return jax.jit(jax.shard_map(local, mesh=mesh, **specs, check_vma=check_vma)), mesh


@pytest.fixture(name="on_nodes")
def on_nodes_fixture():
  return on_nodes


@pytest.fixture(params=["checked", "unchecked", "vmap"])
def mode(request):
  return request.param


@pytest.fixture
def stacked():
  """Gaussian arrays, one per device: stacked(n, shape, seed=0, dtype="float32")."""

  def make(n, shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(jnp.dtype(dtype))

  return make


@functools.cache
def _roundtrip(compressor):
  def roundtrip(key, x):
    return compressor.decompress(compressor.compress(key, x), x.shape)

  return jax.jit(roundtrip)


def coded(compressor, x, key=None):
  """D(C(x)) as a program of its own."""
  return np.asarray(_roundtrip(compressor)(key, x))


@pytest.fixture(name="coded")
def coded_fixture():
  return coded


def bits_of(tree):
  """The arrays as integers: equal only if every bit is."""
  return jax.tree.map(lambda a: np.asarray(a, np.float32).view(np.uint32), tree)


@pytest.fixture(name="bits_of")
def bits_of_fixture():
  return bits_of


def is_checked():
  """Whether the types of the surrounding shard_map record variation over `replica`."""
  if AXIS not in jax.sharding.get_abstract_mesh().manual_axes:
    return False
  return AXIS in jax.typeof(jax.lax.pcast(0.0, AXIS, to="varying")).manual_axis_type.varying


def vjp_of(fn):
  """(x, ct) -> (fn(x), cotangent of x), for a cotangent that may differ between devices."""

  def local(x, ct):
    out, pull = jax.vjp(fn, x)
    if AXIS not in jax.typeof(out).manual_axis_type.varying and is_checked():
      ct = jax.lax.pmean(ct, AXIS)  # the only cotangents that the types allow
    return out, pull(ct)[0]

  return local


@pytest.fixture(name="vjp_of")
def vjp_of_fixture():
  return vjp_of
