"""The checks that every compressor must pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import Compressor, e3m0, identity, int4, int8

NEAREST = [identity(), int8(16), int4(16), e3m0(16), int8(), e3m0()]
STOCHASTIC = [f(16, rounding="stochastic") for f in (int8, int4, e3m0)]
ALL = [*NEAREST, *STOCHASTIC]
SHAPES = [(), (0,), (7,), (17,), (3, 0), (2, 8, 16)]
KEY = jax.random.key(0)


@functools.cache
def _both(compressor, dtype):
  def both(key, x):
    return compressor.decompress(compressor.compress(key, x), x.shape, dtype)

  return jax.jit(both)


def roundtrip(compressor, x, key=KEY, dtype=jnp.float32):
  return np.asarray(_both(compressor, dtype)(key, x))


def normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blocks(x, size):
  """Rows of `size` elements of a float32 array, zeros in the last."""
  flat = np.asarray(x, np.float32).reshape(-1)
  return np.pad(flat, (0, -flat.size % size)).reshape(-1, size)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_is_a_value(compressor):
  assert isinstance(compressor, Compressor)
  assert compressor == dataclasses.replace(compressor)
  assert hash(compressor) == hash(dataclasses.replace(compressor))
  field = next((f.name for f in dataclasses.fields(compressor)), "omega")
  with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
    setattr(compressor, field, 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_payload_bytes_shape_and_dtype(compressor, shape):
  for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    x = jnp.asarray(normal(shape), dtype)
    payload = jax.eval_shape(compressor.compress, KEY, x)
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(payload)]
    assert compressor.payload_bytes(shape, dtype) == sum(sizes)
    back = jax.eval_shape(lambda p, d=dtype: compressor.decompress(p, shape, d), payload)
    assert back.shape == shape
    assert back.dtype == dtype


@pytest.mark.parametrize(
  ("compressor", "want"),
  [(int8(16), 33 + 4 * 3), (int4(16), 17 + 4 * 3), (e3m0(16), 17 + 4 * 3), (identity(), 132)],
  ids=str,
)
def test_payload_bytes_by_hand(compressor, want):
  assert compressor.payload_bytes((3, 11)) == want


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_payload_bytes_of_a_run(compressor):
  payload = jax.jit(compressor.compress)(KEY, normal((5, 7)))
  assert sum(a.nbytes for a in jax.tree.leaves(payload)) == compressor.payload_bytes((5, 7))


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_compressing_again_changes_nothing(compressor):
  once = roundtrip(compressor, normal((5, 77)))
  again = roundtrip(compressor, once, jax.random.key(1))
  np.testing.assert_array_equal(again.view(np.uint32), once.view(np.uint32))


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_zeros_stay_zeros_and_carry_zero_codes(compressor):
  x = jnp.asarray([0.0, -0.0] * 20)
  payload = jax.jit(compressor.compress)(KEY, x)
  assert all(not np.any(a) for a in jax.tree.leaves(payload))
  assert not np.any(roundtrip(compressor, x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 39])
@pytest.mark.parametrize("compressor", [c for c in ALL if c != identity()], ids=str)
def test_bad_numbers_spoil_their_block_only(compressor, place, bad):
  compressor = dataclasses.replace(compressor, block_size=16)
  x = normal(40)
  clean = roundtrip(compressor, x)
  x[place] = bad
  got = roundtrip(compressor, x)
  block = np.arange(40) // 16 == place // 16
  assert np.all(np.isnan(got[block]))
  np.testing.assert_array_equal(got[~block], clean[~block])


def test_identity_hands_bad_numbers_on():
  x = np.asarray([np.nan, np.inf, -np.inf, -0.0, 3e38], np.float32)
  np.testing.assert_array_equal(roundtrip(identity(), x).view(np.uint32), x.view(np.uint32))


@settings(max_examples=40, deadline=None)
@given(
  index=st.integers(0, len(ALL) - 1),
  size=st.sampled_from([1, 33]),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
  exponent=st.integers(-30, 30),
  outlier=st.sampled_from([1.0, 1e3, 1e6]),
  seed=st.integers(0, 9),
)
@example(index=1, size=33, dtype="float32", exponent=-30, outlier=1.0, seed=0)
@example(index=3, size=33, dtype="float32", exponent=30, outlier=1e6, seed=0)
def test_error_per_element_is_bounded(index, size, dtype, exponent, outlier, seed):
  compressor = ALL[index]
  if dtype == "float16":
    exponent, outlier = exponent / 10, min(outlier, 10.0)
  x = normal(size, seed) * 10.0**exponent
  x[seed % size] *= outlier
  x = jnp.asarray(x.astype(np.float32), dtype)
  error = np.abs(roundtrip(compressor, x) - np.asarray(x, np.float32))
  assert np.all(error <= bound(compressor, x)), (error, x)


def bound(compressor, x):
  """Largest error of each element, from the definitions; float64."""
  x = np.asarray(x, np.float64)
  if compressor == identity():
    return np.zeros_like(x)
  absmax = np.abs(blocks(x, compressor.block_size)).max(1).astype(np.float64)
  absmax = np.repeat(absmax, compressor.block_size)[: x.size]
  stochastic = compressor.rounding == "stochastic"
  if not hasattr(compressor, "qmax"):
    if stochastic:  # the gap between the neighbours, which is the lower one or 2^-6
      return np.maximum(np.abs(x), 2.0**-6 * absmax) * (1 + 1e-6)
    return np.maximum(np.abs(x) / 3, 2.0**-7 * absmax) * (1 + 1e-6)
  step = absmax / compressor.qmax * (1 + 2.0**-16)
  return (step if stochastic else step / 2) * (1 + 1e-6)


@pytest.mark.parametrize("compressor", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_unbiased_with_the_stated_variance(compressor):
  x = normal(48, 3)
  num_keys = 2000

  def draw(key):
    return compressor.decompress(compressor.compress(key, x), x.shape)

  draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, num_keys)), np.float64)
  variance = exact_variance(compressor, x)
  sigma = np.sqrt(variance / num_keys)
  assert np.all(np.abs(draws.mean(0) - x) <= 5 * sigma + 1e-6 * np.abs(x))
  total = ((draws - x) ** 2).mean(0).sum()
  assert total == pytest.approx(variance.sum(), rel=0.05)
  assert total <= compressor.omega * (x.astype(np.float64) ** 2).sum()


def exact_variance(compressor, x):
  """(upper - x) (x - lower) for the two neighbours of x; for integers s^2 f (1 - f)."""
  x = np.abs(np.asarray(x, np.float64))
  scale = np.asarray(jax.jit(compressor.compress)(KEY, np.asarray(x, np.float32))["scales"])
  scale = np.repeat(scale.astype(np.float64), compressor.block_size)[: x.size]
  if hasattr(compressor, "qmax"):
    fraction = x / scale - np.floor(x / scale)
    return scale**2 * fraction * (1 - fraction)
  levels = np.asarray([0.0, *2.0 ** np.arange(-6, 1), 1.0])
  low = np.searchsorted(levels[1:-1], x / scale, side="right")
  return (levels[low + 1] * scale - x) * (x - levels[low] * scale)


@pytest.mark.parametrize("compressor", STOCHASTIC, ids=str)
def test_stochastic_rounding_depends_on_the_key_only(compressor):
  x = normal(300)
  np.testing.assert_array_equal(roundtrip(compressor, x), roundtrip(compressor, x))
  assert np.any(roundtrip(compressor, x) != roundtrip(compressor, x, jax.random.key(1)))


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_vmap_and_scan_equal_one_row_at_a_time(compressor):
  x = normal((3, 5, 7))
  keys = jax.random.split(KEY, 3)

  def both(key, x):
    return compressor.decompress(compressor.compress(key, x), x.shape)

  want = np.stack([roundtrip(compressor, row, key) for key, row in zip(keys, x)])
  np.testing.assert_array_equal(jax.jit(jax.vmap(both))(keys, x), want)
  _, got = jax.jit(lambda k, x: jax.lax.scan(lambda c, kx: (c, both(*kx)), 0, (k, x)))(keys, x)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_shard_map_equals_one_row_at_a_time(compressor, check_vma):
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  x = normal((2, 5, 7))
  common = normal((5, 7), 1)

  def both(x, common):
    one = compressor.decompress(compressor.compress(KEY, x[0]), common.shape)
    return one[None], compressor.decompress(compressor.compress(KEY, common), common.shape)

  specs = {"in_specs": (jax.P("data"), jax.P()), "out_specs": (jax.P("data"), jax.P())}
  got = jax.jit(jax.shard_map(both, mesh=mesh, check_vma=check_vma, **specs))(x, common)
  np.testing.assert_array_equal(got[0], np.stack([roundtrip(compressor, row) for row in x]))
  np.testing.assert_array_equal(got[1], roundtrip(compressor, common))


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_low_precision_in_and_out(compressor):
  x = jnp.asarray(normal(50), jnp.bfloat16)
  wide = roundtrip(compressor, x.astype(jnp.float32))
  narrow = roundtrip(compressor, x, dtype=jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow, np.asarray(jnp.asarray(wide).astype(jnp.bfloat16)))


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_rejects_what_is_not_floating_point(compressor, dtype):
  with pytest.raises(ValueError, match=f"`x` must have a floating-point dtype, got {dtype}"):
    compressor.compress(KEY, jnp.zeros(3, dtype))


@pytest.mark.parametrize("compressor", STOCHASTIC, ids=str)
def test_stochastic_rounding_needs_a_key(compressor):
  with pytest.raises(ValueError, match=r"`key` must be a jax\.random key"):
    compressor.compress(None, jnp.zeros(3))


@pytest.mark.parametrize("make", [int8, int4, e3m0])
def test_rejects_bad_fields(make):
  for block_size in (7, 0, -8, 8.0, True, None):
    with pytest.raises(ValueError, match="`block_size` must be an integer of at least 8, got"):
      make(block_size)
  with pytest.raises(ValueError, match="`rounding` must be 'nearest' or 'stochastic', got 'up'"):
    make(rounding="up")


@pytest.mark.parametrize("make", [int4, e3m0])
def test_packed_codes_need_an_even_block(make):
  with pytest.raises(ValueError, match="`block_size` must be even for 4-bit codes, got 9"):
    make(9)
