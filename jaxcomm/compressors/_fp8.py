"""8-bit floats scaled by block, as bytes."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors import _blocks, _norms
from jaxcomm.compressors._base import Compressor, Key, Payload

Format = Literal["e4m3", "e5m2"]


@dataclasses.dataclass(frozen=True)
class _Float8:
  """dtype, mantissa bits, exponents of the largest and of the smallest normal number."""

  dtype: jnp.dtype
  mantissa: int
  top: int
  bottom: int


_FORMATS = {
  "e4m3": _Float8(jnp.dtype(jnp.float8_e4m3fn), 3, 8, -6),
  "e5m2": _Float8(jnp.dtype(jnp.float8_e5m2), 2, 15, -14),
}
# The largest number of both formats is this times a power of two.
_LARGEST = 1.75


@dataclasses.dataclass(frozen=True)
class FP8(Compressor):
  r"""8-bit floats times one power of two s per block of consecutive elements.

  .. math:: s = 2^{\lceil \log_2(\max_B |x| / 1.75) \rceil - t}, \quad c = fp8(x / s),
            \quad D(c) = c \cdot s

  with t = 8, largest number 448 and 3 mantissa bits for e4m3, t = 15, 57344 and 2 for e5m2. As s
  is a power of two, x / s and c s are exact, and only fp8 rounds: "nearest" (half to even), or
  "stochastic" to one of the two neighbours so that the mean is x. Relative error at most 2^-4
  (e4m3) or 2^-3 (e5m2) where x / s is a normal number, that is for |x| >= 2^-13 max |x| or
  2^-28 max |x|; below, the absolute error is that at this limit.

  Payload for d elements: `codes` uint8[d], the bits of the 8-bit floats, `scales`
  float32[ceil(d / block_size)]; in bytes d + 4 ceil(d / block_size). Bytes, because some back ends
  widen 8-bit floats in collectives.

  A block of zeros decodes to zeros, one with NaN or Inf to NaN everywhere. A block whose scale is
  below the smallest normal float32 (max |x| < 3e-36 for e4m3, 4e-34 for e5m2) is sent as zeros. A
  block whose maximum rounds to 2^128 decodes to Inf there.

  Attributes:
    format: "e4m3" (float8_e4m3fn) or "e5m2".
    block_size: elements per scale, at least 8.
    rounding: "nearest" or "stochastic" (needs a key).

  Raises:
    ValueError: a field outside these rules, no key, or `x` is not floating point.

  Source: formats of Micikevicius et al. (arXiv 2209.05433); power-of-two block scales as in OCP
  Microscaling Formats 1.0, here with float32 scales.
  """

  format: Format = "e4m3"
  block_size: int = 256
  rounding: _blocks.Rounding = "nearest"

  def __post_init__(self):
    if self.format not in _FORMATS:
      raise ValueError(f"`format` must be 'e4m3' or 'e5m2', got {self.format!r}.")
    _blocks.check_fields(self.block_size, self.rounding, packed=False)

  @property
  def _float8(self) -> _Float8:
    return _FORMATS[self.format]

  @property
  def unbiased(self) -> bool:
    return self.rounding == "stochastic"

  @property
  def needs_key(self) -> bool:
    return self.rounding == "stochastic"

  def _below(self, size: float) -> float:
    """(elements) * (spacing of subnormal numbers / the least possible maximum of a block)^2."""
    spacing = 2.0 ** (self._float8.bottom - self._float8.mantissa)
    return min(self.block_size, size) * (spacing / (_LARGEST * 2.0 ** (self._float8.top - 1))) ** 2

  def _omega(self, size: float) -> float:
    """Between neighbours a and b the variance is at most (b - a)^2 / (4 a b) x^2."""
    if self.rounding == "nearest":
      return math.inf
    gap = 2.0**-self._float8.mantissa
    return gap**2 / (4 * (1 + gap)) + self._below(size) / 4

  def _alpha(self, size: float) -> float:
    """From the relative error u / (1 + u), u half a spacing, and half a subnormal spacing."""
    if self.rounding == "stochastic":
      return super()._alpha(size)
    half = 2.0 ** -(self._float8.mantissa + 1)
    return 1 - (half / (1 + half)) ** 2 - self._below(size) / 4

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    x_KB, scale_K1 = self._scaled(x_D)
    steps_KB, step_KB = self._steps(x_KB, scale_K1)
    if self.rounding == "nearest":
      steps_KB = jnp.round(steps_KB)
    else:
      low_KB = jnp.floor(steps_KB)
      up_KB = _blocks.column_noise(key, x_KB.shape)(0, 1) < steps_KB - low_KB
      steps_KB = low_KB + up_KB.astype(jnp.float32)
    floats = _blocks.from_blocks(steps_KB * step_KB, x_D.size).astype(self._float8.dtype)
    codes = jax.lax.bitcast_convert_type(floats, jnp.uint8)
    return {"codes": jnp.where(codes == 0x80, np.uint8(0), codes), "scales": scale_K1[:, 0]}

  def _scaled(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks, and their powers of two; 0 for zeros, NaN for NaN or Inf."""
    x_KB = _blocks.to_blocks(x_D, self.block_size)
    absmax_K1 = _norms.absmax(x_KB)
    bits_K1 = jax.lax.bitcast_convert_type(absmax_K1, jnp.int32)
    above_K1 = (bits_K1 & 0x7FFFFF) > 0x600000  # the mantissa of 1.75
    exponent_K1 = (bits_K1 >> 23) + above_K1.astype(jnp.int32) - self._float8.top
    scale_K1 = jax.lax.bitcast_convert_type(jnp.maximum(exponent_K1, 0) << 23, jnp.float32)
    return x_KB, jnp.where(jnp.isnan(absmax_K1), jnp.nan, scale_K1)

  def _steps(self, x_KB: jax.Array, scale_K1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x / scale in steps of the spacing of 8-bit floats there, and that spacing; both exact."""
    usable_K1 = scale_K1 > 0  # False for NaN
    y_KB = jnp.where(usable_K1, x_KB * (1 / jnp.where(usable_K1, scale_K1, 1.0)), 0.0)
    exponent_KB = (jax.lax.bitcast_convert_type(y_KB, jnp.int32) >> 23) & 0xFF
    exponent_KB = jnp.maximum(exponent_KB, 127 + self._float8.bottom) - self._float8.mantissa
    step_KB = jax.lax.bitcast_convert_type(exponent_KB << 23, jnp.float32)
    inverse_KB = jax.lax.bitcast_convert_type((254 - exponent_KB) << 23, jnp.float32)
    return y_KB * inverse_KB, step_KB

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    floats = jax.lax.bitcast_convert_type(payload["codes"], self._float8.dtype)
    y_KB = _blocks.to_blocks(floats.astype(jnp.float32), self.block_size)
    return _blocks.from_blocks(y_KB * payload["scales"][:, None], size)

  def _num_bytes(self, size: int) -> int:
    """d + 4 ceil(d / block_size)."""
    return size + 4 * _blocks.num_blocks(size, self.block_size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """The sum of (spacing)^2 f (1 - f)."""
    if self.rounding == "nearest":
      return super()._variance(x_D)
    x_KB, scale_K1 = self._scaled(x_D)
    steps_KB, step_KB = self._steps(x_KB, scale_K1)
    fraction_KB = steps_KB - jnp.floor(steps_KB)
    rounded_KB = jnp.square(step_KB * scale_K1) * fraction_KB * (1 - fraction_KB)
    return jnp.sum(jnp.where(scale_K1 == 0, jnp.square(x_KB), rounded_KB))


def fp8(
  format: Format = "e4m3", block_size: int = 256, rounding: _blocks.Rounding = "nearest"
) -> FP8:
  """8-bit floats: 1 + 4 / block_size bytes per element; see `FP8`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import fp8
  >>> compressor = fp8()
  >>> payload = compressor.compress(None, jnp.asarray([448.0, 1.0, -1.3, 0.001]))
  >>> compressor.decompress(payload, (4,)).tolist(), payload["scales"].tolist()
  ([448.0, 1.0, -1.25, 0.001953125], [1.0])
  """
  return FP8(format, block_size, rounding)
