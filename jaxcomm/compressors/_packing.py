"""Codes of any width as bytes.

A code of b bits is cut into parts whose widths are the powers of two in b, from the low bits up
(7 = 1 + 2 + 4, 9 = 1 + 8). Each part is packed for itself, elements in order from the low bits of
each byte up, and the parts follow each other. So 8 bits are the bytes, 4 bits are nibbles, 1 bit is
a plane of bits, and no width needs more than a byte per part beyond b d / 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def packed_bytes(size: int, bits: int) -> int:
  """Bytes of `size` codes of `bits` bits: the sum of ceil(size * w / 8) over the parts w."""
  return sum(-(-size * width // 8) for _, width in _parts(bits))


def pack(codes: jax.Array, bits: int) -> jax.Array:
  """Unsigned integers of d codes below 2^bits -> uint8[packed_bytes(d, bits)]; bits in 0..32."""
  parts = [_pack_part(codes >> shift, width) for shift, width in _parts(bits)]
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def pack_columns(
  code: Callable[[int, int], jax.Array], shape: tuple[int, ...], bits: int, size: int
) -> jax.Array:
  """`pack` of the first `size` of [K, B] codes, given by columns; bits in 1..8.

  code(i, step) makes the columns i::step, as integers of 8 bits, zeros beyond `size`. Making all
  codes and packing them then is ten times slower on a CPU: XLA merges the two loops into one of
  single bytes.
  """
  if shape[1] % (8 // min(width for _, width in _parts(bits))):
    return pack(code(0, 1).reshape(-1)[:size], bits)
  parts = []
  for shift, width in _parts(bits):
    count, byte = 8 // width, jnp.uint8(0)
    for i in range(count):
      column = code(i, count).astype(jnp.uint8) >> shift
      byte |= (column & np.uint8(2**width - 1)) << (i * width)
    parts.append(byte.reshape(-1)[: packed_bytes(size, width)])
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def unpack(packed: jax.Array, size: int, bits: int) -> jax.Array:
  """The inverse of `pack`: uint8[size] for up to 8 bits, uint32[size] for more."""
  dtype = jnp.uint8 if bits <= 8 else jnp.uint32
  codes, start = jnp.zeros(size, dtype), 0
  for shift, width in _parts(bits):
    end = start + packed_bytes(size, width)
    codes |= _unpack_part(packed[start:end], size, width).astype(dtype) << shift
    start = end
  return codes


def _parts(bits: int) -> list[tuple[int, int]]:
  """(shift, width): powers of two up to 8 that make up `bits`; one empty part for 0 bits."""
  widths = [w for w in (1, 2, 4) if bits & w] + [8] * (bits // 8)
  shifts = [sum(widths[:i]) for i in range(len(widths))]
  return list(zip(shifts, widths)) or [(0, 0)]


def _pack_part(codes: jax.Array, width: int) -> jax.Array:
  if width == 0:
    return jnp.zeros(0, jnp.uint8)
  codes = codes.astype(jnp.uint8) & np.uint8(2**width - 1)
  count = 8 // width  # codes per byte
  groups = jnp.pad(codes, (0, -codes.size % count)).reshape(-1, count)
  byte = groups[:, 0]
  for i in range(1, count):
    byte |= groups[:, i] << (i * width)
  return byte


def _unpack_part(packed: jax.Array, size: int, width: int) -> jax.Array:
  if width == 0:
    return jnp.zeros(size, jnp.uint8)
  shifts = np.arange(0, 8, width, dtype=np.uint8)[None]
  return ((packed[:, None] >> shifts) & np.uint8(2**width - 1)).reshape(-1)[:size]
