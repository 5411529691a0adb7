"""Block layout, the choice of integer scales, and norms of blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import _blocks, _norms


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


def test_noise_of_columns_is_uniform_and_the_same_in_all_layouts():
  @jax.jit
  def draw(key):
    noise = _blocks.column_noise(key, (1000, 40))
    odd = _blocks.column_noise(key, (3, 7))(0, 1)
    return noise(0, 1), {(i, step): noise(i, step) for step in (2, 4, 8) for i in range(step)}, odd

  whole, columns, odd = draw(jax.random.key(0))
  whole = np.asarray(whole, np.float64)
  for (i, step), part in columns.items():
    np.testing.assert_array_equal(part, whole[:, i::step])
  assert odd.shape == (3, 7)
  assert 0 <= whole.min() < 1e-4
  assert 1 - 1e-4 < whole.max() < 1
  np.testing.assert_array_equal(whole * 2**23 % 1, 0)
  # Every bit, from the first to the 23rd, and no two columns move together.
  ones = np.stack([np.floor(whole * 2**b) % 2 for b in range(1, 24)])
  assert np.abs(ones.mean((1, 2)) - 0.5).max() < 5 * 0.5 / np.sqrt(whole.size)
  correlation = np.corrcoef(whole.T)[np.triu_indices(40, 1)]
  assert np.abs(correlation).max() < 5.5 / np.sqrt(len(whole))


def test_integer_scale_below_the_normal_range_is_zero_and_nan_stays():
  tiny = np.finfo(np.float32).tiny
  absmax = jnp.asarray([0.0, 126 * tiny, 128 * tiny, np.nan], jnp.float32)
  scale = np.asarray(jax.jit(_blocks.integer_scale, static_argnums=1)(absmax, 127))
  assert scale[0] == scale[1] == 0
  assert scale[2] >= tiny
  assert np.isnan(scale[3])


NORMS = {
  _norms.absmax: lambda x: np.abs(x).max(1),
  _norms.mean_abs: lambda x: np.abs(x).mean(1),
  _norms.l2_norm: lambda x: np.sqrt(np.square(x).sum(1)),
  _norms.rms: lambda x: np.sqrt(np.square(x).mean(1)),
}


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_norms_over_the_whole_range_of_float32(norm):
  x_KB = np.random.default_rng(0).normal(size=(6, 37)).astype(np.float32)
  x_KB[4, 5] = 1e6
  x_KB[5] = 0
  compiled = jax.jit(norm)
  for factor in (2.0**-100, 1e-30, 1.0, 1e30, 2.0**104):
    scaled_KB = x_KB * np.float32(factor)
    want = NORMS[norm](scaled_KB.astype(np.float64))
    np.testing.assert_allclose(compiled(scaled_KB)[:, 0], want, rtol=3e-7)
  for bad in (np.nan, np.inf, -np.inf):
    x_KB[2, 36] = bad
    np.testing.assert_array_equal(np.isnan(compiled(x_KB)[:, 0]), np.arange(6) == 2)


@pytest.mark.parametrize("norm", [_norms.mean_abs, _norms.l2_norm])
def test_norms_have_the_same_bits_in_every_program(norm):
  x_KB = np.random.default_rng(0).normal(size=(300, 37)).astype(np.float32)
  want = np.asarray(jax.jit(norm)(x_KB))

  @jax.jit
  def by_row(x_KB):
    rows = jax.vmap(lambda row: norm(row[None])[0])(x_KB)
    return rows, jax.lax.scan(lambda c, row: (c, norm(row[None])[0]), 0, x_KB)[1]

  for got in by_row(x_KB):
    np.testing.assert_array_equal(got, want)
