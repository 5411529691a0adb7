"""Block-scaled signed integers: 8 bits, or 4 bits packed two per byte."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks
from jaxcomm.compressors._base import Payload, check_float


@dataclasses.dataclass(frozen=True)
class BlockInt:
  r"""Symmetric integers with one float32 scale per block of consecutive elements.

  With qmax = 2^(bits - 1) - 1, block B and scale s:

  .. math:: s = \max_B |x| / q_{max}, \quad c = round(x / s) \in [-q_{max}, q_{max}],
            \quad D(c) = c \cdot s

  s is rounded up to 17 significant bits (at most 2^-16 relative), which makes c * s exact in
  float32. Error per element: at most s / 2 (nearest, half to even), below s (stochastic,
  floor(x / s) plus one with the probability of the fraction: unbiased).

  Payload for d elements: `codes` int8[d] (8 bits) or uint8[ceil(d / 2)] (4 bits, two's
  complement nibbles, low nibble first), `scales` float32[ceil(d / block_size)]; in bytes
  ceil(d * bits / 8) + 4 * ceil(d / block_size).

  A block of zeros decodes to zeros. A block with NaN or Inf decodes to NaN everywhere. A block
  whose scale is below the smallest normal float32 (max |x| < 1.5e-36 at 8 bits, 8.3e-38 at 4)
  is sent as zeros, because XLA flushes subnormal numbers on some devices. A block whose maximum
  is within 2^-16 of the largest float32 may decode to Inf.

  Attributes:
    bits: 4 or 8.
    block_size: elements per scale, at least 8; even for 4 bits.
    rounding: "nearest" or "stochastic" (needs a key).

  Raises:
    ValueError: a field outside these rules, or `x` is not floating point.

  Sources: block scaling as in ZeRO++ (arXiv 2306.10209, section 3.1); stochastic rounding as in
  QSGD (arXiv 1610.02132, section 3.1) with the maximum norm.
  """

  bits: int
  block_size: int = 256
  rounding: _blocks.Rounding = "nearest"

  def __post_init__(self):
    if self.bits not in (4, 8):
      raise ValueError(f"`bits` must be 4 or 8, got {self.bits!r}.")
    _blocks.check_fields(self.block_size, self.rounding, packed=self.bits == 4)

  @property
  def qmax(self) -> int:
    return 2 ** (self.bits - 1) - 1

  @property
  def _spread(self) -> float:
    # block_size * s^2 / (4 max|x|^2), with what rounding the scale up may add.
    return self.block_size * (1 + 2**-16) ** 2 / (4 * self.qmax**2)

  @property
  def omega(self) -> float | None:
    """Of stochastic rounding: the root of omega (1 + omega) = block_size / (4 qmax^2).

    Below the usual block_size / (4 qmax^2): a small element x errs by at most x (s - x), so the
    worst block holds qmax * s once and s / (2 (1 + omega)) elsewhere.
    """
    if self.rounding == "nearest":
      return None
    return (math.sqrt(1 + 4 * self._spread) - 1) / 2

  @property
  def alpha(self) -> float | None:
    """1 / (1 + block_size / (4 qmax^2)) (nearest); 1 - omega (stochastic) if positive.

    The worst block for nearest holds qmax * s once and almost s / 2 elsewhere.
    """
    if self.omega is None:
      return 1 / (1 + self._spread)
    return 1 - self.omega if self.omega < 1 else None

  def compress(self, key: jax.Array | None, x: jax.Array) -> Payload:
    """Codes and scales of `x`, any shape and float dtype; see the class."""
    check_float(x)
    x_KB = _blocks.to_blocks(x.astype(jnp.float32), self.block_size)
    scale_K1 = _blocks.integer_scale(_blocks.block_absmax(x_KB), self.qmax)
    codes = _blocks.from_blocks(self._round(key, x_KB, scale_K1), x.size)
    scales = scale_K1.reshape(-1)[: _blocks.num_blocks(x.size, self.block_size)]
    if self.bits == 4:
      codes = _blocks.pack_nibbles(codes.astype(jnp.uint8) & 0xF)
    return {"codes": codes, "scales": scales}

  def _round(self, key: jax.Array | None, x_KB: jax.Array, scale_K1: jax.Array) -> jax.Array:
    """int8 codes; 0 in blocks whose scale is zero or NaN."""
    usable_K1 = scale_K1 > 0  # False for NaN
    # One reciprocal per block, which is what XLA makes of x / scale in some programs and not in
    # others.
    inverse_K1 = 1 / jnp.where(usable_K1, scale_K1, 1.0)
    ratio_KB = jnp.where(usable_K1, x_KB * inverse_K1, 0.0)
    if self.rounding == "nearest":
      return jnp.round(ratio_KB).astype(jnp.int8)
    # The exact floor: multiples of the scale are exact, the ratio is not.
    low_KB = jnp.floor(ratio_KB)
    low_KB += ((low_KB + 1) * scale_K1 <= x_KB).astype(jnp.float32)
    low_KB -= (low_KB * scale_K1 > x_KB).astype(jnp.float32)
    fraction_KB = (x_KB - low_KB * scale_K1) * inverse_K1
    up_KB = _blocks.uniform(key, x_KB.shape) < fraction_KB
    return jnp.where(usable_K1, low_KB + up_KB.astype(jnp.float32), 0.0).astype(jnp.int8)

  def decompress(
    self, payload: Payload, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    """The array of `shape` and `dtype` that the payload stands for."""
    size, codes = _blocks.num_elements(shape), payload["codes"]
    if size == 0:
      return jnp.zeros(shape, dtype)
    if self.bits == 4:
      nibbles = _blocks.unpack_nibbles(codes, size).astype(jnp.int8)
      codes = (nibbles ^ 8) - 8  # sign of a 4-bit two's complement number
    codes_KB = _blocks.to_blocks(codes, self.block_size).astype(jnp.float32)
    x_KB = codes_KB * payload["scales"][:, None]
    return _blocks.from_blocks(x_KB, size).reshape(shape).astype(dtype)

  def payload_bytes(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """ceil(d * bits / 8) + 4 * ceil(d / block_size), whatever the dtype."""
    del dtype
    size = _blocks.num_elements(shape)
    return -(-size * self.bits // 8) + 4 * _blocks.num_blocks(size, self.block_size)


def int8(block_size: int = 256, rounding: _blocks.Rounding = "nearest") -> BlockInt:
  """8-bit block integers: 1 + 4 / block_size bytes per element; see `BlockInt`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import int8
  >>> compressor = int8(block_size=8)
  >>> payload = compressor.compress(None, jnp.asarray([0.0, 1.0, -127.0]))
  >>> payload["codes"].tolist(), payload["scales"].tolist()
  ([0, 1, -127], [1.0])
  >>> compressor.decompress(payload, (3,)).tolist(), compressor.payload_bytes((3,))
  ([0.0, 1.0, -127.0], 7)
  """
  return BlockInt(8, block_size, rounding)


def int4(block_size: int = 256, rounding: _blocks.Rounding = "nearest") -> BlockInt:
  """4-bit block integers: 0.5 + 4 / block_size bytes per element; see `BlockInt`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import int4
  >>> payload = int4(block_size=8).compress(None, jnp.asarray([1.0, -2.0, 7.0]))
  >>> [hex(byte) for byte in payload["codes"].tolist()]
  ['0xe1', '0x7']
  """
  return BlockInt(4, block_size, rounding)
