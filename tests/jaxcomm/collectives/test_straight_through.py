"""Derivatives are those of the exact collectives, in both conventions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import (
  allgather_pmean,
  compressed_pmean,
  quantized_all_gather,
  quantized_all_to_all,
  quantized_pmean,
  quantized_pmean_bytes,
  quantized_psum,
  quantized_psum_scatter,
)
from jaxcomm.compressors import identity, int8
from jaxcomm.inspect import collective_bytes

AXIS, N = "replica", 4
KEY = jax.random.key(5)


def exact(x):
  return jax.lax.pmean(x, AXIS)


@pytest.mark.parametrize("n", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))])
def test_identity_compressor_has_the_derivative_of_pmean(n, mode, on_devices, stacked, vjp_of):
  x = stacked(n, (2, 7, 3))

  def local(x):
    means = [lambda v, make=make: make(v, AXIS, identity()) for make in MEANS]
    return [vjp_of(mean)(x[0], x[1])[1] for mean in (exact, *means)]

  want, *got = on_devices(local, mode, n)(x)
  for cotangent in got:
    np.testing.assert_allclose(cotangent, want, rtol=1e-6, atol=1e-7)


MEANS = (compressed_pmean, allgather_pmean)


def pairs(**options):
  """name -> (quantized collective of float[8, 3], that of `jax.lax`, its transpose of a cotangent).

  The transpose is what a user would write: the quantized collective of the opposite direction.
  """
  gather = functools.partial(quantized_all_gather, axis_name=AXIS, **options)
  scatter = functools.partial(quantized_psum_scatter, axis_name=AXIS, **options)
  exchange = functools.partial(quantized_all_to_all, axis_name=AXIS, **options)
  return {
    "all_gather": (
      gather,
      lambda v: jax.lax.all_gather(v, AXIS, tiled=True),
      scatter,
    ),
    "all_gather untiled": (
      functools.partial(gather, tiled=False, axis=1),
      lambda v: jax.lax.all_gather(v, AXIS, axis=1),
      functools.partial(scatter, tiled=False, scatter_dimension=1),
    ),
    "psum_scatter": (
      scatter,
      lambda v: jax.lax.psum_scatter(v, AXIS, tiled=True),
      gather,
    ),
    "ring": (
      functools.partial(scatter, algorithm="ring"),
      lambda v: jax.lax.psum_scatter(v, AXIS, tiled=True),
      gather,
    ),
    "all_to_all": (
      functools.partial(exchange, split_axis=0, concat_axis=1),
      lambda v: jax.lax.all_to_all(v, AXIS, 0, 1, tiled=True),
      functools.partial(exchange, split_axis=1, concat_axis=0),
    ),
    "psum": (
      functools.partial(quantized_psum, axis_name=AXIS, **options),
      lambda v: jax.lax.psum(v, AXIS),
      functools.partial(quantized_psum, axis_name=AXIS, **options),
    ),
  }


def test_exact_backward_is_that_of_lax_under_a_rounded_forward(mode, on_devices, stacked, vjp_of):
  def local(x, ct):
    got, want = {}, {}
    for name, (ours, lax, _) in pairs(bits=8, backward_bits=None).items():
      c = jnp.resize(ct, jax.eval_shape(lax, x).shape)
      (_, got[name]), (_, want[name]) = vjp_of(ours)(x, c), vjp_of(lax)(x, c)
    return got, want

  x, ct = stacked(N, (8, 3)), stacked(N, (32, 3), seed=1)
  got, want = on_devices(lambda args: local(*args), mode, N)((x, ct))
  for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  "names",
  [
    ("all_gather", "ring", "all_to_all"),
    pytest.param(("all_gather untiled", "psum_scatter", "psum"), marks=pytest.mark.slow),
  ],
  ids=["three", "others"],
)
def test_rounded_backward_is_the_opposite_collective(names, on_devices, stacked, vjp_of, bits_of):
  def local(x, ct):
    got, want = {}, {}
    for name in names:
      ours, lax, _ = pairs(bits=None, backward_bits=4, block_size=16)[name]
      transpose = pairs(bits=4, block_size=16)[name][2]
      c = jnp.resize(ct, jax.eval_shape(lax, x).shape)
      (_, got[name]), want[name] = vjp_of(ours)(x, c), transpose(c)
    return got, want

  x, ct = stacked(N, (8, 3)), stacked(N, (32, 3), seed=1)
  got, want = bits_of(on_devices(lambda args: local(*args), "unchecked", N)((x, ct)))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_padded_scatter_and_equal_gather(on_devices, stacked, vjp_of):
  """Nine rows on four devices; and a gather typed as equal, whose cotangent is sliced."""
  x, ct = stacked(N, (9, 3)), stacked(N, (36, 3), seed=1)
  backward = {"bits": 8, "backward_bits": None}

  def local(args):
    x, ct = args
    scatter = functools.partial(quantized_psum_scatter, axis_name=AXIS, **backward)
    gather = functools.partial(quantized_all_gather, axis_name=AXIS, to="invarying", bits=8)
    return vjp_of(scatter)(x, ct[:3])[1], vjp_of(gather)(x, ct)[1]

  scattered, gathered = on_devices(local, "checked", N)((x, ct))
  whole = np.asarray(ct[:, :3]).reshape(12, 3)[:9]
  np.testing.assert_array_equal(scattered, np.broadcast_to(whole, (N, 9, 3)))
  # The gather's backward sends nothing, so nothing is rounded.
  np.testing.assert_allclose(gathered, np.asarray(ct).mean(0).reshape(N, 9, 3), rtol=1e-6)
  equal = on_devices(
    lambda v: quantized_all_gather(v, AXIS, to="invarying"), "checked", N, equal=True
  )
  assert equal(x).shape == (36, 3)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_pmean_has_the_derivative_of_pmean(bits, mode, on_devices, stacked, vjp_of):
  x = stacked(N, (2, 7, 3))

  def local(x):
    mean = lambda v: quantized_pmean(v, AXIS, bits=bits)  # noqa: E731
    return vjp_of(mean)(x[0], x[1])[1], vjp_of(exact)(x[0], x[1])[1], mean(x[1])

  got, want, again = map(np.asarray, on_devices(local, mode, N)(x))
  if mode == "checked":  # nothing is rounded on the way back
    np.testing.assert_allclose(got, want, rtol=1e-6)
  else:
    step = np.abs(x[:, 1]).max() / (2 ** (bits - 1) - 1)
    assert np.abs(got - want).max() <= 1.001 * step
    np.testing.assert_array_equal(got, np.stack([got[0]] * N))
    # It is the quantized mean of the cotangents, no other approximation of the mean.
    np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("mode", ["checked", "unchecked"])
def test_wire_of_the_backward_pass(mode, on_devices, stacked, vjp_of):
  x = stacked(8, (2, 512))
  mean = vjp_of(lambda v: quantized_pmean(v, AXIS, bits=8))
  fn = on_devices(lambda x: mean(x[0], x[1])[1], mode, 8)
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
  for op in (lambda v: compressed_pmean(v, AXIS, identity()), lambda v: quantized_psum(v, AXIS)):
    fn = on_devices(op, "vmap", 4)
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      jax.grad(lambda x, fn=fn: fn(x).sum())(stacked(4, (9,)))


@pytest.mark.slow
def test_stochastic_backward_noise_is_its_own(on_devices, stacked, vjp_of):
  """Equal values forward and backward are rounded with different noise."""
  row = stacked(4, (64,))

  def mean(v):
    return quantized_pmean(v, AXIS, bits=4, rounding="stochastic", key=KEY)

  forward, backward = on_devices(lambda x: vjp_of(mean)(x, x), "unchecked", 4)(row)
  assert np.any(forward != backward)
  np.testing.assert_allclose(forward, backward, atol=2 * np.abs(row).max() * 2 / 7)


def test_derivatives_of_derivatives(on_devices, stacked):
  """Of a linear map there are none; of a square there is that of the exact collective."""
  x = stacked(4, (9,))

  def local(x):
    def gradient(x, power):
      return jax.grad(lambda v: (compressed_pmean(v, AXIS, int8()) ** power).sum())(x)

    linear = jax.grad(lambda x: gradient(x, 1).sum())(x)

    def square(gather):
      return jax.grad(lambda x: jax.grad(lambda v: (gather(v) ** 2).sum())(x).sum())(x)

    ours = square(lambda v: quantized_all_gather(v, AXIS, backward_bits=None))
    return linear, ours, square(lambda v: jax.lax.all_gather(v, AXIS, tiled=True))

  linear, ours, lax = on_devices(local, "unchecked", 4)(x)
  assert not np.any(linear)
  np.testing.assert_allclose(ours, lax, rtol=0.02)
