"""Scaled sign: one bit per element and one scale."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks, _norms, _packing
from jaxcomm.compressors._base import Compressor, Key, Payload

Scale = Literal["l1", "rms"]


@dataclasses.dataclass(frozen=True)
class ScaledSign(Compressor):
  r"""Signs times one float32 scale for the whole array; sign(0) = +1.

  .. math:: \text{"l1": } \frac{\|x\|_1}{d} sign(x), \qquad
            \text{"rms": } \frac{\|x\|_2}{\sqrt d} sign(x)

  "l1" is the best scale: the error is exactly 1 - ||x||_1^2 / (d ||x||_2^2) of ||x||^2, so
  alpha = 1 / d at size d, no constant for all sizes, and 2 / pi = 0.64 on Gaussian data. "rms"
  keeps the norm: its error is 2 (1 - ||x||_1 / (sqrt(d) ||x||_2)) of ||x||^2, which is above 1 for
  peaked x (up to 2 (1 - 1 / sqrt(d)), one element not zero, d > 4). It has no alpha; error feedback
  theory does not cover it.

  For a scale per block, and alpha = 1 / B: `blockwise(scaled_sign(), B)`.

  Payload for d elements: `signs` uint8[ceil(d / 8)], 1 for negative, low bits first, `scale`
  float32[1] (none for d = 0).

  Zeros decode to zeros. An array with NaN or Inf decodes to NaN everywhere.

  Attributes:
    scale: "l1" or "rms".

  Raises:
    ValueError: a field outside these rules, or `x` is not floating point.

  Sources: EF-signSGD (arXiv 1901.09847), "l1"; 1-bit Adam (arXiv 2102.02888, DeepSpeed), "rms".
  """

  scale: Scale = "l1"

  def __post_init__(self):
    if self.scale not in ("l1", "rms"):
      raise ValueError(f"`scale` must be 'l1' or 'rms', got {self.scale!r}.")

  def _alpha(self, size: float) -> float:
    if self.scale == "rms":
      return 0.0
    return 1 / max(size, 1)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    del key
    x_KB = _blocks.to_blocks(x_D, 256)  # rows of whole bytes
    negative = lambda i, step: (x_KB[:, i::step] < 0).astype(jnp.uint8)  # noqa: E731
    signs = _packing.pack_columns(negative, x_KB.shape, 1, x_D.size)
    if x_D.size == 0:
      return {"signs": signs, "scale": jnp.zeros(0, jnp.float32)}
    if self.scale == "l1":
      return {"signs": signs, "scale": _norms.mean_abs(x_D[None])[0]}
    return {"signs": signs, "scale": _norms.rms(x_D[None])[0]}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    negative = _packing.unpack(payload["signs"], size, 1) > 0
    return jnp.where(negative, -payload["scale"], payload["scale"])

  def _num_bytes(self, size: int) -> int:
    """ceil(d / 8) + 4."""
    return _packing.packed_bytes(size, 1) + (4 if size else 0)


def scaled_sign(scale: Scale = "l1") -> ScaledSign:
  """Signs times the mean magnitude: 1/8 byte per element; see `ScaledSign`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import scaled_sign
  >>> payload = scaled_sign().compress(None, jnp.asarray([3.0, -1.0, -2.0]))
  >>> scaled_sign().decompress(payload, (3,)).tolist(), scaled_sign().payload_bytes((3,))
  ([2.0, -2.0, -2.0], 5)
  """
  return ScaledSign(scale)
