"""QSGD: random dithering to a few levels of a bucket's norm."""

import dataclasses
import math
from typing import Literal

import jax

from jaxcomm.compressors import _blocks, _norms, _packing
from jaxcomm.compressors._base import Compressor, Key, Payload
from jaxcomm.compressors._block_int import decode_multiples, encode_multiples

Norm = Literal["l2", "linf"]


@dataclasses.dataclass(frozen=True)
class QSGD(Compressor):
  r"""Stochastic rounding to `levels` multiples of a bucket's norm over `levels`: unbiased.

  .. math:: n = \|x\|, \quad a = levels |x_i| / n, \quad
            D(C(x))_i = \frac{n}{levels} sign(x_i) (\lfloor a \rfloor + Bern(a - \lfloor a \rfloor))

  n / levels is sent as one float32 per bucket of consecutive elements, rounded up to 17
  significant bits. With the norm "linf" and levels = 2^(b - 1) - 1 this is
  `BlockInt(b, bucket_size, "stochastic")`, bit for bit. Codes have a fixed width of
  b = ceil(log2(2 levels + 1)) bits (the paper's variable-length code has no static size).

  .. math:: \omega \le \min(B / (4\,levels^2), \sqrt{B} / levels) \text{ for "l2"}

  (the paper states B / levels^2); for "linf" that of `BlockInt`.

  Payload for d elements: `codes` as in `BlockInt` with b bits, `scales`
  float32[ceil(d / bucket_size)].

  A bucket of zeros decodes to zeros, one with NaN or Inf to NaN everywhere. A bucket whose scale is
  below the smallest normal float32 is sent as zeros; one whose scale is above 2^126 decodes to NaN.

  Attributes:
    levels: s, 1 to 127.
    bucket_size: elements per norm, at least 8.
    norm: "l2" or "linf".

  Raises:
    ValueError: a field outside these rules, no key, or `x` is not floating point.

  Source: Alistarh et al. (arXiv 1610.02132), section 3.
  """

  levels: int
  bucket_size: int = 128
  norm: Norm = "l2"

  def __post_init__(self):
    if type(self.levels) is not int or not 1 <= self.levels <= 127:
      raise ValueError(f"`levels` must be in 1..127, got {self.levels!r}.")
    _blocks.check_block_size(self.bucket_size, "bucket_size")
    if self.norm not in ("l2", "linf"):
      raise ValueError(f"`norm` must be 'l2' or 'linf', got {self.norm!r}.")

  @property
  def bits(self) -> int:
    """Width of a code."""
    return (2 * self.levels).bit_length()

  @property
  def unbiased(self) -> bool:
    return True

  @property
  def needs_key(self) -> bool:
    return True

  def _omega(self, size: float) -> float:
    """From f (1 - f) <= 1/4 and f (1 - f) <= a; "linf" as `BlockInt`."""
    num, up = min(self.bucket_size, size), 1 + 2**-16  # what rounding the scale up may add
    spread = num * up**2 / (4 * self.levels**2)
    if self.norm == "linf":
      return (math.sqrt(1 + 4 * spread) - 1) / 2
    return min(spread, math.sqrt(num) * up / self.levels)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    x_KB, scale_K1 = self._scaled(x_D)
    return encode_multiples(key, x_KB, scale_K1, x_D.size, self.bits)

  def _scaled(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_KB = _blocks.to_blocks(x_D, self.bucket_size)
    norm = _norms.l2_norm if self.norm == "l2" else _norms.absmax
    return x_KB, _blocks.integer_scale(norm(x_KB), self.levels)

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    return decode_multiples(payload, size, self.bits, self.bucket_size)

  def _num_bytes(self, size: int) -> int:
    codes = _packing.packed_bytes(size, self.bits)
    return codes + 4 * _blocks.num_blocks(size, self.bucket_size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    return _blocks.multiples_variance(*self._scaled(x_D))


def qsgd(levels: int, bucket_size: int = 128, norm: Norm = "l2") -> QSGD:
  """Random dithering: ceil(log2(2 levels + 1)) / 8 + 4 / bucket_size bytes each; see `QSGD`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import qsgd
  >>> compressor, x = qsgd(levels=5), jnp.asarray([3.0, -4.0, 0.0])
  >>> payload = compressor.compress(jax.random.key(0), x)  # norm 5: on the grid
  >>> compressor.decompress(payload, x.shape).tolist(), compressor.payload_bytes(x.shape)
  ([3.0, -4.0, 0.0], 6)
  """
  return QSGD(levels, bucket_size, norm)
