"""Norms of blocks that neither overflow nor depend on the order the compiler would choose.

Letters: K blocks, B elements per block. NaN for a block that holds NaN or Inf.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def absmax(x_KB: jax.Array) -> jax.Array:
  """Largest magnitude of each block, [K, 1]; 0 for an empty one.

  Bit patterns of floats are ordered like their magnitudes, NaN above all; so this is a maximum of
  integers, exact in any order.
  """
  num, width = x_KB.shape
  if width > 32 and width % 32 == 0:
    # XLA's loop over a long row is 20 times slower on a CPU than 32 columns side by side.
    rows = x_KB.reshape(-1, 256 if width % 256 == 0 else width)
    parts = [_magnitude_bits(part) for part in jnp.split(rows, rows.shape[1] // 32, axis=1)]
    bits_KB = functools.reduce(jnp.maximum, parts).max(axis=1).reshape(num, -1)
  else:
    bits_KB = _magnitude_bits(x_KB)
  bits_K1 = jnp.max(bits_KB, axis=1, keepdims=True, initial=0)
  finite_K1 = bits_K1 < np.uint32(0x7F800000)
  return jnp.where(finite_K1, jax.lax.bitcast_convert_type(bits_K1, jnp.float32), jnp.nan)


def _magnitude_bits(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0x7FFFFFFF)


def mean_abs(x_KB: jax.Array) -> jax.Array:
  """||x||_1 / B of each block, [K, 1]."""
  unit_K1, y_KB = _scaled(x_KB)
  return _sum_in_pairs(y_KB) * (1 / x_KB.shape[1]) * unit_K1


def l2_norm(x_KB: jax.Array) -> jax.Array:
  """||x||_2 of each block, [K, 1]; never below the largest magnitude."""
  unit_K1, y_KB = _scaled(x_KB)
  return jnp.maximum(jnp.sqrt(_sum_in_pairs(_square(y_KB))) * unit_K1, absmax(x_KB))


def rms(x_KB: jax.Array) -> jax.Array:
  """||x||_2 / sqrt(B) of each block, [K, 1]."""
  unit_K1, y_KB = _scaled(x_KB)
  return jnp.sqrt(_sum_in_pairs(_square(y_KB)) * (1 / x_KB.shape[1])) * unit_K1


def _scaled(x_KB: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(unit, |x| / unit): the unit is a power of two near the largest magnitude, so this is exact."""
  top_K1 = absmax(x_KB)
  bits_K1 = jax.lax.bitcast_convert_type(top_K1, jnp.uint32)
  # Neither the unit nor its inverse may leave the normal numbers.
  exponent_K1 = jnp.clip(bits_K1 >> 23, 1, 253)
  unit_K1 = jax.lax.bitcast_convert_type(exponent_K1 << 23, jnp.float32)
  inverse_K1 = jax.lax.bitcast_convert_type((254 - exponent_K1) << 23, jnp.float32)
  unit_K1 = jnp.where(jnp.isnan(top_K1), jnp.nan, unit_K1)
  return unit_K1, jnp.abs(x_KB) * inverse_K1


def _square(y: jax.Array) -> jax.Array:
  """y^2 by products that are exact, so that fusing multiply and add changes nothing."""
  bits = jax.lax.bitcast_convert_type(y, jnp.uint32) & np.uint32(0xFFFFF000)
  high = jax.lax.bitcast_convert_type(bits, jnp.float32)
  low = y - high
  return high * high + (2 * high * low + low * low)


def _sum_in_pairs(x_KB: jax.Array) -> jax.Array:
  """Sum of each row, [K, 1], first half plus second half until one column is left."""
  while x_KB.shape[1] > 1:
    half = -(-x_KB.shape[1] // 2)
    x_KB = x_KB[:, :half] + jnp.pad(x_KB[:, half:], ((0, 0), (0, x_KB.shape[1] % 2)))
  return x_KB
