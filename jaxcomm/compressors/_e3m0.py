"""E3M0: 4-bit floats with a sign, three exponent bits and no mantissa, scaled by block."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks
from jaxcomm.compressors._base import Payload, check_float

# Magnitudes relative to the scale; a code's low three bits are the index into this list.
LEVELS = (0.0, *(2.0**e for e in range(-6, 1)))

# The least threshold, 2^-7 times this, is the smallest normal float32.
_SMALLEST_SCALE = 2.0**-119


@dataclasses.dataclass(frozen=True)
class E3M0:
  r"""Signed powers of two times one float32 scale s = max |x| per block.

  Codes stand for sign x {0, 2^-6, 2^-5, ..., 2^0} * s. "nearest" rounds to the nearest magnitude
  in the linear domain, ties up: relative error at most 1/3 where |x| >= 2^-6 s, absolute error at
  most 2^-7 s below. "stochastic" rounds to one of the two neighbours so that the mean is x.
  Decoding is exact in float32 and compressing a decoded array gives it back.

  Payload for d elements: `codes` uint8[ceil(d / 2)] (sign in bit 3, index of the magnitude in
  bits 0-2, low nibble first), `scales` float32[ceil(d / block_size)]; in bytes
  ceil(d / 2) + 4 * ceil(d / block_size).

  A block of zeros decodes to zeros; one with NaN or Inf decodes to NaN everywhere. A block with
  max |x| < 2^-119 (1.5e-36) is sent as zeros, because XLA flushes subnormal numbers on some
  devices.

  Attributes:
    block_size: elements per scale, even and at least 8.
    rounding: "nearest" or "stochastic" (needs a key).

  Raises:
    ValueError: a field outside these rules, or `x` is not floating point.

  Source: the wire format of Streaming DiLoCo (arXiv 2501.18512, section 2.4). The paper fixes
  sign, exponent and mantissa bits; scale, zero and rounding are ours.
  """

  block_size: int = 256
  rounding: _blocks.Rounding = "nearest"

  def __post_init__(self):
    _blocks.check_fields(self.block_size, self.rounding, packed=True)

  @property
  def omega(self) -> float | None:
    """Of stochastic rounding, the exact supremum over blocks; None for nearest.

    One element sits at s without error. Each of the other n is best placed either between 0 and
    2^-6 (variance x (2^-6 - x)) or between 1/2 and 1 (variance (x - 1/2) (1 - x)); in units of s.
    """
    if self.rounding == "nearest":
      return None
    n = self.block_size - 1
    low = (math.sqrt(1 + n * 2.0**-12) - 1) / 2
    high = (math.sqrt((1 + n / 2) ** 2 + n / 4) - (1 + n / 2)) / 2
    return max(low, high)

  @property
  def alpha(self) -> float | None:
    """1 - (largest relative squared error of a block).

    For nearest, one element sits at s without error and the other n either at 3/4 s (error
    1/4 s) or at 2^-7 s (error 2^-7 s); for stochastic, 1 - omega if positive.
    """
    if self.omega is not None:
      return 1 - self.omega if self.omega < 1 else None
    n = self.block_size - 1
    return 1 - max(n / (16 + 9 * n), n / (2**14 + n))

  def compress(self, key: jax.Array | None, x: jax.Array) -> Payload:
    """Codes and scales of `x`, any shape and float dtype; see the class."""
    check_float(x)
    x_KB = _blocks.to_blocks(x.astype(jnp.float32), self.block_size)
    absmax_K1 = _blocks.block_absmax(x_KB)
    scale_K1 = jnp.where(absmax_K1 < _SMALLEST_SCALE, 0.0, absmax_K1)
    index_KB = self._round(key, jnp.abs(x_KB), scale_K1)
    negative_KB = (x_KB < 0) & (index_KB > 0)  # one code for zero
    codes_KB = index_KB | (negative_KB.astype(jnp.uint8) << 3)
    codes = _blocks.pack_nibbles(_blocks.from_blocks(codes_KB, x.size))
    scales = scale_K1.reshape(-1)[: _blocks.num_blocks(x.size, self.block_size)]
    return {"codes": codes, "scales": scales}

  def _round(self, key: jax.Array | None, x_KB: jax.Array, scale_K1: jax.Array) -> jax.Array:
    """Index into LEVELS of the magnitudes x; 0 in blocks whose scale is zero or NaN."""
    scale_K1 = jnp.where(scale_K1 > 0, scale_K1, jnp.nan)  # no comparison with NaN is true
    if self.rounding == "nearest":
      middles = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]
      return _count_reached(x_KB, scale_K1, middles)
    index_KB = _count_reached(x_KB, scale_K1, LEVELS[1:])
    low_KB = _level(index_KB) * scale_K1
    gap_KB = _level(jnp.minimum(index_KB + 1, 7)) * scale_K1 - low_KB
    # At the top level the gap is zero, and 0 < 0 keeps it there.
    up_KB = _blocks.uniform(key, x_KB.shape) * gap_KB < x_KB - low_KB
    return index_KB + up_KB.astype(jnp.uint8)

  def decompress(
    self, payload: Payload, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    """The array of `shape` and `dtype` that the payload stands for."""
    size = _blocks.num_elements(shape)
    if size == 0:
      return jnp.zeros(shape, dtype)
    codes = _blocks.unpack_nibbles(payload["codes"], size)
    codes_KB = _blocks.to_blocks(codes, self.block_size)
    magnitude_KB = _level(codes_KB & 7) * payload["scales"][:, None]
    x_KB = jnp.where(codes_KB >= 8, -magnitude_KB, magnitude_KB)
    return _blocks.from_blocks(x_KB, size).reshape(shape).astype(dtype)

  def payload_bytes(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """ceil(d / 2) + 4 * ceil(d / block_size), whatever the dtype."""
    del dtype
    size = _blocks.num_elements(shape)
    return -(-size // 2) + 4 * _blocks.num_blocks(size, self.block_size)


def _count_reached(x_KB: jax.Array, scale_K1: jax.Array, thresholds) -> jax.Array:
  """How many of thresholds * scale each x has reached: products, since division is less exact."""
  reached = jnp.zeros(x_KB.shape, jnp.uint8)
  for threshold in thresholds:
    reached += (x_KB >= threshold * scale_K1).astype(jnp.uint8)
  return reached


def _level(index: jax.Array) -> jax.Array:
  """LEVELS[index], by writing the exponent field (127 stands for 2^0, which is index 7)."""
  bits = (index.astype(jnp.uint32) + 120) << 23
  return jnp.where(index > 0, jax.lax.bitcast_convert_type(bits, jnp.float32), 0.0)


def e3m0(block_size: int = 256, rounding: _blocks.Rounding = "nearest") -> E3M0:
  """4-bit powers of two: 0.5 + 4 / block_size bytes per element; see `E3M0`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import e3m0
  >>> compressor = e3m0()
  >>> payload = compressor.compress(None, jnp.asarray([8.0, -3.0, 0.1, 0.0]))
  >>> compressor.decompress(payload, (4,)).tolist(), compressor.payload_bytes((4,))
  ([8.0, -4.0, 0.125, 0.0], 6)
  """
  return E3M0(block_size, rounding)
