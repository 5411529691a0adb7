"""E3M0: 4-bit floats with a sign, three exponent bits and no mantissa, scaled by block."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks, _norms, _packing
from jaxcomm.compressors._base import Compressor, Key, Payload

# Magnitudes relative to the scale; a code's low three bits are the index into this list.
LEVELS = (0.0, *(2.0**e for e in range(-6, 1)))

# The least threshold, 2^-7 times this, is the smallest normal float32.
_SMALLEST_SCALE = 2.0**-119


@dataclasses.dataclass(frozen=True)
class E3M0(Compressor):
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
  def unbiased(self) -> bool:
    return self.rounding == "stochastic"

  @property
  def needs_key(self) -> bool:
    return self.rounding == "stochastic"

  def _omega(self, size: float) -> float:
    """Of stochastic rounding, the exact supremum over blocks.

    One element sits at s without error. Each of the other n is best placed either between 0 and
    2^-6 (variance x (2^-6 - x)) or between 1/2 and 1 (variance (x - 1/2) (1 - x)); in units of s.
    """
    if self.rounding == "nearest":
      return math.inf
    n = min(self.block_size, max(size, 1)) - 1
    low = (math.sqrt(1 + n * 2.0**-12) - 1) / 2
    high = (math.sqrt((1 + n / 2) ** 2 + n / 4) - (1 + n / 2)) / 2
    return max(low, high)

  def _alpha(self, size: float) -> float:
    """1 - (largest relative squared error of a block).

    For nearest, one element sits at s without error and the other n either at 3/4 s (error
    1/4 s) or at 2^-7 s (error 2^-7 s); for stochastic, 1 - omega if positive.
    """
    if self.rounding == "stochastic":
      return super()._alpha(size)
    n = min(self.block_size, max(size, 1)) - 1
    return 1 - max(n / (16 + 9 * n), n / (2**14 + n))

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    x_KB, scale_K1 = self._scaled(x_D)
    stochastic = self.rounding == "stochastic"
    noise = _blocks.column_noise(key, x_KB.shape) if stochastic else None

    def code(i, step):
      x = x_KB[:, i::step]
      index = _index(jnp.abs(x), scale_K1, noise and noise(i, step))
      negative = (x < 0) & (index > 0)  # one code for zero
      return index | (negative.astype(jnp.uint8) << 3)

    codes = _packing.pack_columns(code, x_KB.shape, 4, x_D.size)
    return {"codes": codes, "scales": scale_K1[:, 0]}

  def _scaled(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_KB = _blocks.to_blocks(x_D, self.block_size)
    absmax_K1 = _norms.absmax(x_KB)
    return x_KB, jnp.where(absmax_K1 < _SMALLEST_SCALE, 0.0, absmax_K1)

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    codes_KB = _blocks.to_blocks(_packing.unpack(payload["codes"], size, 4), self.block_size)
    magnitude_KB = _level(codes_KB & 7) * payload["scales"][:, None]
    return _blocks.from_blocks(jnp.where(codes_KB >= 8, -magnitude_KB, magnitude_KB), size)

  def _num_bytes(self, size: int) -> int:
    """ceil(d / 2) + 4 * ceil(d / block_size)."""
    return -(-size // 2) + 4 * _blocks.num_blocks(size, self.block_size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """The sum of (x - low) (high - x), with x between two levels."""
    if self.rounding == "nearest":
      return super()._variance(x_D)
    x_KB, scale_K1 = self._scaled(x_D)
    _, low_KB, gap_KB = _neighbours(jnp.abs(x_KB), scale_K1)
    below_KB = jnp.abs(x_KB) - low_KB
    lost_KB = jnp.where(scale_K1 == 0, jnp.square(x_KB), below_KB * (gap_KB - below_KB))
    return jnp.sum(lost_KB)


def _index(x_KB: jax.Array, scale_K1: jax.Array, noise_KB: jax.Array | None) -> jax.Array:
  """Index into LEVELS of the magnitudes x; 0 in blocks whose scale is zero or NaN.

  To nearest without noise; with noise that is uniform in [0, 1) the mean is x.
  """
  scale_K1 = jnp.where(scale_K1 > 0, scale_K1, jnp.nan)  # no comparison with NaN is true
  if noise_KB is None:
    middles = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]
    return _count_reached(x_KB, scale_K1, middles)
  index_KB, low_KB, gap_KB = _neighbours(x_KB, scale_K1)
  # At the top level the gap is zero, and 0 < 0 keeps it there.
  return index_KB + (noise_KB * gap_KB < x_KB - low_KB).astype(jnp.uint8)


def _neighbours(x_KB: jax.Array, scale_K1: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(index of the level at or below x, this level, the gap to the next), the last two times s."""
  index_KB = _count_reached(x_KB, scale_K1, LEVELS[1:])
  low_KB = _level(index_KB) * scale_K1
  return index_KB, low_KB, _level(jnp.minimum(index_KB + 1, 7)) * scale_K1 - low_KB


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
