"""Nibble packing, block layout and the choice of integer scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import _blocks


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 255])
def test_unpack_inverts_pack(size):
  codes = np.random.default_rng(size).integers(0, 16, size).astype(np.uint8)
  packed = _blocks.pack_nibbles(jnp.asarray(codes))
  assert packed.dtype == jnp.uint8
  assert packed.shape == (-(-size // 2),)
  np.testing.assert_array_equal(_blocks.unpack_nibbles(packed, size), codes)


def test_low_nibble_comes_first():
  assert _blocks.pack_nibbles(jnp.asarray([1, 2, 3], jnp.uint8)).tolist() == [0x21, 0x03]


@pytest.mark.parametrize(("size", "rows", "width"), [(0, 0, 1), (3, 1, 3), (8, 1, 8), (17, 3, 8)])
def test_blocks_are_rows_of_consecutive_elements(size, rows, width):
  x = jnp.arange(1.0, size + 1)
  x_KB = _blocks.to_blocks(x, 8)
  assert x_KB.shape == (rows, width)
  np.testing.assert_array_equal(_blocks.from_blocks(x_KB, size), x)
  assert not np.any(np.asarray(x_KB).reshape(-1)[size:])  # the tail is zeros


@settings(max_examples=60, deadline=None)
@given(
  absmax=st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
  qmax=st.sampled_from([7, 127]),
)
def test_integer_scale_is_the_smallest_with_17_bits(absmax, qmax):
  scale = float(jax.jit(_blocks.integer_scale, static_argnums=1)(np.float32(absmax), qmax))
  mantissa, exponent = np.frexp(absmax / qmax)
  want = np.ldexp(np.ceil(mantissa * 2**17) / 2**17, exponent)  # float64 throughout
  assert scale == want
  assert qmax * scale >= absmax
  for code in range(1, qmax + 1):
    assert np.float32(code) * np.float32(scale) == code * scale  # exact in float32


@pytest.mark.parametrize("qmax", [7, 127])
def test_integer_scale_is_exact_on_multiples_of_qmax(qmax):
  scales = np.arange(1, 5000, dtype=np.float32)
  got = jax.jit(_blocks.integer_scale, static_argnums=1)(jnp.asarray(scales * qmax), qmax)
  np.testing.assert_array_equal(got, scales)


def test_integer_scale_below_the_normal_range_is_zero_and_nan_stays():
  tiny = np.finfo(np.float32).tiny
  absmax = jnp.asarray([0.0, 126 * tiny, 128 * tiny, np.nan], jnp.float32)
  scale = np.asarray(jax.jit(_blocks.integer_scale, static_argnums=1)(absmax, 127))
  assert scale[0] == scale[1] == 0
  assert scale[2] >= tiny
  assert np.isnan(scale[3])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 15])
def test_absmax_of_a_block_with_a_bad_element_is_nan(bad, place):
  x_KB = np.ones((2, 16), np.float32)
  x_KB[1, place] = bad
  absmax_K1 = np.asarray(jax.jit(_blocks.block_absmax)(x_KB))
  assert absmax_K1[0, 0] == 1
  assert np.isnan(absmax_K1[1, 0])
