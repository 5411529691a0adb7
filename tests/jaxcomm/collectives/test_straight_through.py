"""The derivative of compressed means is that of lax.pmean, in both conventions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import (
  allgather_pmean,
  compressed_pmean,
  quantized_pmean,
  quantized_pmean_bytes,
)
from jaxcomm.compressors import identity, int8
from jaxcomm.inspect import collective_bytes

AXIS = "replica"
KEY = jax.random.key(5)


def exact(x):
  return jax.lax.pmean(x, AXIS)


def vjp_of(mean):
  """(x, ct) -> cotangent of x, for a cotangent that may differ between devices."""

  def local(x_and_ct):
    x, ct = x_and_ct
    out, pull = jax.vjp(mean, x)
    if AXIS not in jax.typeof(out).manual_axis_type.varying and _is_checked():
      ct = jax.lax.pmean(ct, AXIS)  # the only cotangents that the types allow
    return pull(ct)[0]

  return local


def _is_checked():
  if AXIS not in jax.sharding.get_abstract_mesh().manual_axes:
    return False
  return AXIS in jax.typeof(jax.lax.pcast(0.0, AXIS, to="varying")).manual_axis_type.varying


@pytest.mark.parametrize("make", [compressed_pmean, allgather_pmean])
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_identity_compressor_has_the_derivative_of_pmean(make, n, mode, on_devices, stacked):
  x = stacked(2 * n, (7, 3)).reshape(n, 2, 7, 3)
  got = on_devices(vjp_of(lambda v: make(v, AXIS, identity())), mode, n)(x)
  want = on_devices(vjp_of(exact), mode, n)(x)
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8, None])
def test_quantized_pmean_has_the_derivative_of_pmean(bits, mode, on_devices, stacked):
  n = 4
  x = stacked(2 * n, (7, 3)).reshape(n, 2, 7, 3)
  mean = vjp_of(lambda v: quantized_pmean(v, AXIS, bits=bits))
  got = np.asarray(on_devices(mean, mode, n)(x))
  want = np.asarray(on_devices(vjp_of(exact), mode, n)(x))
  if mode == "checked" or bits is None:  # nothing is rounded on the way back
    np.testing.assert_allclose(got, want, rtol=1e-6)
  else:
    step = np.abs(x[:, 1]).max() / (2 ** (bits - 1) - 1)
    assert np.abs(got - want).max() <= 1.001 * step
    np.testing.assert_array_equal(got, np.stack([got[0]] * n))
    # It is the quantized mean of the cotangents, no other approximation of the mean.
    again = on_devices(lambda v: quantized_pmean(v, AXIS, bits=bits), mode, n)(x[:, 1])
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
def test_wire_of_the_backward_pass(mode, on_devices, stacked):
  x = stacked(8, (2, 512))
  fn = on_devices(vjp_of(lambda v: quantized_pmean(v, AXIS, bits=8)), mode, 8)
  ops = collective_bytes(fn.lower(x).compile()).ops
  sent = [(op.kind, op.dtype) for op in ops if op.kind != "all-reduce"]  # the test's own mean
  if mode == "checked":
    assert not sent  # the forward value is unused here, and backward sends nothing
  else:
    assert sent == [("all-to-all", "u8"), ("all-gather", "u8")]
    assert sum(op.bytes for op in ops) == quantized_pmean_bytes((512,), 8, bits=8)


def test_derivative_of_an_equal_value(on_devices):
  """pmean of a value that is equal on all devices is the identity, its derivative as well."""

  def local(x):
    w = jnp.arange(5.0)
    gradient = jax.grad(lambda w: (quantized_pmean(w, AXIS, bits=8) * jnp.arange(5.0)).sum())(w)
    return gradient + 0 * x

  got = on_devices(local, "checked", 4)(jnp.zeros((4, 5)))
  np.testing.assert_allclose(got, np.stack([np.arange(5.0)] * 4), rtol=1e-6)


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
def test_gradient_outside_of_shard_map(mode, on_devices, stacked):
  x, w = stacked(4, (9,)), stacked(4, (9,), seed=1)

  def gradient(mean):
    def loss(x):
      return (on_devices(mean, mode, 4)(x) * w).sum()

    return jax.jit(jax.grad(loss))(x)

  got = gradient(lambda v: compressed_pmean(v, AXIS, identity()))
  np.testing.assert_allclose(got, gradient(exact), rtol=1e-5, atol=1e-7)


def test_gradient_outside_of_vmap_is_refused(on_devices, stacked):
  fn = on_devices(lambda v: compressed_pmean(v, AXIS, identity()), "vmap", 4)
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    jax.grad(lambda x: fn(x).sum())(stacked(4, (9,)))


def test_stochastic_backward_noise_is_its_own(on_devices, stacked):
  """Equal values forward and backward are rounded with different noise."""
  row = stacked(4, (64,))
  x = jnp.stack([row, row], axis=1)

  def mean(v):
    return quantized_pmean(v, AXIS, bits=4, rounding="stochastic", key=KEY)

  forward = np.asarray(on_devices(mean, "unchecked", 4)(row))
  backward = np.asarray(on_devices(vjp_of(mean), "unchecked", 4)(x))
  assert np.any(forward != backward)
  np.testing.assert_allclose(forward, backward, atol=2 * np.abs(row).max() * 2 / 7)


def test_second_derivative_is_zero(on_devices, stacked):
  x = stacked(4, (9,))

  def local(x):
    def gradient(x):
      return jax.grad(lambda v: compressed_pmean(v, AXIS, int8()).sum())(x).sum()

    return jax.grad(gradient)(x)

  assert not np.any(on_devices(local, "unchecked", 4)(x))
