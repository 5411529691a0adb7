"""Blocks, block scales and rounding: shared by all block-scaled compressors.

Letters: K blocks, B elements per block. A block is a row of consecutive elements of the flattened
array. The last block is padded with zeros for the computation only: no padding is ever sent.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Rounding = Literal["nearest", "stochastic"]

# XLA flushes numbers below the smallest normal float32 to zero on some back ends and keeps them on
# others, so a smaller scale counts as zero everywhere.
TINY = float(np.finfo(np.float32).tiny)


def check_fields(block_size: int, rounding: str, *, packed: bool) -> None:
  """Raises ValueError for a bad `block_size` or `rounding`; `packed` means two codes per byte."""
  check_block_size(block_size)
  if packed and block_size % 2:
    raise ValueError(f"`block_size` must be even for 4-bit codes, got {block_size}.")
  if rounding not in ("nearest", "stochastic"):
    raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {rounding!r}.")


def check_block_size(block_size: int, name: str = "block_size") -> None:
  """Raises ValueError unless `block_size` is an integer of at least 8."""
  if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 8:
    raise ValueError(f"`{name}` must be an integer of at least 8, got {block_size!r}.")


def num_blocks(size: int, block_size: int) -> int:
  return -(-size // block_size)


def to_blocks(x: jax.Array, block_size: int) -> jax.Array:
  """x, flattened, as rows x_KB; zeros fill the last row, and short arrays get a short row."""
  flat = x.reshape(-1)
  width = min(block_size, max(flat.size, 1))
  return jnp.pad(flat, (0, -flat.size % width)).reshape(-1, width)


def from_blocks(x_KB: jax.Array, size: int) -> jax.Array:
  """The inverse of `to_blocks`: the first `size` elements, flat."""
  return x_KB.reshape(-1)[:size]


def integer_scale(top: jax.Array, qmax: int) -> jax.Array:
  """The smallest float32 of 17 significant bits whose product with `qmax` <= 127 reaches `top`.

  The product of such a scale with an integer of up to 7 bits is exact in float32. Decoded values
  then do not depend on whether the compiler fuses multiply and add, nor the scale on how it
  divides by a constant: every program computes the same bits.
  NaN stays NaN; a scale below the smallest normal float32 becomes 0, and one whose inverse would
  be, above 2^126, NaN.
  """
  step = 1 << 7  # 24 - 17 bits
  bits = jax.lax.bitcast_convert_type(top / qmax, jnp.uint32) & ~np.uint32(step - 1)
  scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  for _ in range(2):  # once for the cut, once more if the quotient was rounded down
    bits = jnp.where(scale * qmax < top, bits + step, bits)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  scale = jnp.where(scale > 2.0**126, jnp.nan, scale)
  return jnp.where(scale < TINY, 0.0, scale)


def nearest_multiples(x_KB: jax.Array, scale_K1: jax.Array) -> jax.Array:
  """int8 codes c with c * scale nearest to x, half to even; 0 where the scale is zero or NaN."""
  return jnp.round(_ratio(x_KB, _inverse(scale_K1))).astype(jnp.int8)


def stochastic_multiples(x_KB: jax.Array, noise_KB: jax.Array, scale_K1: jax.Array) -> jax.Array:
  """int8 codes c of a neighbour c * scale of x, 0 where the scale is zero or NaN.

  The mean is x if `noise_KB` is uniform in [0, 1).
  """
  inverse_K1 = _inverse(scale_K1)
  low_KB = _floor_multiple(x_KB, scale_K1, inverse_K1)
  fraction_KB = (x_KB - low_KB * scale_K1) * inverse_K1
  up_KB = (noise_KB < fraction_KB).astype(jnp.float32)
  return jnp.where(inverse_K1 > 0, low_KB + up_KB, 0.0).astype(jnp.int8)


def column_noise(key: jax.Array, shape: tuple[int, ...]) -> Callable[[int, int], jax.Array]:
  """noise(i, step): float32 for the columns i::step of [K, B], uniform in [0, 1).

  Random bits are most of the cost of stochastic rounding, so two neighbours share 32 of them: each
  has 16 of its own on top and the other's below. Every number alone is uniform on the multiples of
  2^-23; the two have a correlation of 2^-15.
  """
  num, width = shape
  words_KH = jax.random.bits(key, (num, -(-width // 2)), jnp.uint32)
  words_KH = jax.lax.optimization_barrier(words_KH)  # else drawn again for every use

  def noise(i, step):
    if step % 2:
      both = jnp.stack([words_KH, _swap_halves(words_KH)], axis=2).reshape(num, width + width % 2)
      return _unit(both[:, i:width:step])
    words = words_KH[:, i // 2 :: step // 2]
    return _unit(_swap_halves(words) if i % 2 else words)

  return noise


def _swap_halves(words: jax.Array) -> jax.Array:
  return (words << 16) | (words >> 16)


def _unit(words: jax.Array) -> jax.Array:
  """float32 in [0, 1) of the upper 23 bits, written as the fraction of a number in [1, 2).

  Not by a factor of 2^-24: XLA may apply it to what the noise is multiplied with, which underflows.
  """
  return jax.lax.bitcast_convert_type((words >> 9) | np.uint32(0x3F800000), jnp.float32) - 1


def multiples_variance(x_KB: jax.Array, scale_K1: jax.Array) -> jax.Array:
  """E||c scale - x||^2 of `stochastic_multiples`: the sum of s^2 f (1 - f), float32[]."""
  inverse_K1 = _inverse(scale_K1)
  below_KB = x_KB - _floor_multiple(x_KB, scale_K1, inverse_K1) * scale_K1
  variance_KB = jnp.where(inverse_K1 > 0, below_KB * (scale_K1 - below_KB), jnp.square(x_KB))
  return jnp.sum(jnp.where(jnp.isnan(scale_K1), jnp.nan, variance_KB))


def _inverse(scale_K1: jax.Array) -> jax.Array:
  """1 / scale, and 0 where the scale is zero or NaN.

  One reciprocal per block, which is what XLA makes of x / scale in some programs and not in others.
  """
  usable_K1 = scale_K1 > 0  # False for NaN
  return jnp.where(usable_K1, 1 / jnp.where(usable_K1, scale_K1, 1.0), 0.0)


def _ratio(x_KB: jax.Array, inverse_K1: jax.Array) -> jax.Array:
  """x / scale, and 0 where that means nothing."""
  return jnp.where(inverse_K1 > 0, x_KB * inverse_K1, 0.0)


def _floor_multiple(x_KB: jax.Array, scale_K1: jax.Array, inverse_K1: jax.Array) -> jax.Array:
  """The exact floor of x / scale: multiples of the scale are exact, the ratio is not."""
  low_KB = jnp.floor(_ratio(x_KB, inverse_K1))
  low_KB += ((low_KB + 1) * scale_K1 <= x_KB).astype(jnp.float32)
  low_KB -= (low_KB * scale_K1 > x_KB).astype(jnp.float32)
  return low_KB
