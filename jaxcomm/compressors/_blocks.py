"""Blocks, block scales, rounding and nibble packing: shared by all block-scaled compressors.

Letters: K blocks, B elements per block. A block is a row of consecutive elements of the flattened
array. The last block is padded with zeros for the computation only: no padding is ever sent.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Rounding = Literal["nearest", "stochastic"]

# XLA flushes numbers below the smallest normal float32 to zero on some back ends and keeps them on
# others, so a smaller scale counts as zero everywhere.
_TINY = float(np.finfo(np.float32).tiny)


def check_fields(block_size: int, rounding: str, *, packed: bool) -> None:
  """Raises ValueError for a bad `block_size` or `rounding`; `packed` means two codes per byte."""
  if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 8:
    raise ValueError(f"`block_size` must be an integer of at least 8, got {block_size!r}.")
  if packed and block_size % 2:
    raise ValueError(f"`block_size` must be even for 4-bit codes, got {block_size}.")
  if rounding not in ("nearest", "stochastic"):
    raise ValueError(f"`rounding` must be 'nearest' or 'stochastic', got {rounding!r}.")


def uniform(key: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
  """Noise in [0, 1) for stochastic rounding. Raises ValueError when there is no key."""
  if key is None:
    raise ValueError("`key` must be a jax.random key for stochastic rounding, got None.")
  return jax.random.uniform(key, shape)


def num_elements(shape: tuple[int, ...]) -> int:
  return math.prod(shape)


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


def block_absmax(x_KB: jax.Array) -> jax.Array:
  """Largest magnitude of each block, [K, 1]; NaN for a block that holds NaN or Inf."""
  m_K1 = jnp.max(jnp.abs(x_KB), axis=1, keepdims=True, initial=0.0)
  return jnp.where(jnp.isfinite(m_K1), m_K1, jnp.nan)


def integer_scale(absmax: jax.Array, qmax: int) -> jax.Array:
  """The smallest float32 of 17 significant bits whose product with `qmax` reaches `absmax`.

  The product of such a scale with an integer of up to 7 bits is exact in float32. Decoded values
  then do not depend on whether the compiler fuses multiply and add, nor the scale on how it
  divides by a constant: every program computes the same bits.
  NaN stays NaN; a scale below the smallest normal float32 becomes 0.
  """
  step = 1 << 7  # 24 - 17 bits
  bits = jax.lax.bitcast_convert_type(absmax / qmax, jnp.uint32) & ~np.uint32(step - 1)
  scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  for _ in range(2):  # once for the cut, once more if the quotient was rounded down
    bits = jnp.where(scale * qmax < absmax, bits + step, bits)
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(scale < _TINY, 0.0, scale)


def pack_nibbles(codes: jax.Array) -> jax.Array:
  """uint8[d] with values below 16 -> uint8[ceil(d / 2)]; two per byte, low nibble first."""
  pairs = jnp.pad(codes, (0, codes.size % 2)).reshape(-1, 2)
  return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_nibbles(packed: jax.Array, size: int) -> jax.Array:
  """The inverse of `pack_nibbles`: uint8[size]."""
  return jnp.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[:size]
