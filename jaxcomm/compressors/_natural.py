"""Natural compression: sign and exponent, the mantissa rounded to a power of two at random."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors import _packing
from jaxcomm.compressors._base import Compressor, Key, Payload

_MANTISSA = np.uint32(0x7FFFFF)


@dataclasses.dataclass(frozen=True)
class Natural(Compressor):
  r"""Rounds to one of the two neighbouring powers of two, so that the mean is x: unbiased.

  .. math:: C(x) = sign(x)\, 2^{\lfloor \log_2 |x| \rfloor} (1 + Bern(|x| 2^{-\lfloor \log_2 |x|
            \rfloor} - 1)), \quad \omega = 1/8

  omega is reached at |x| = 4/3 of a power of two. Powers of two pass unchanged.

  Payload for d elements: `codes` uint8[ceil(d / 8) + d], 9 bits each (`_packing`): first the lowest
  bits of the exponents, eight per byte, then a byte per element with the other seven bits and the
  sign on top.

  Zeros and numbers below the smallest normal float32 are sent as zero. NaN and Inf decode to NaN,
  and so does an element above 2^127 that is rounded up to 2^128.

  Raises:
    ValueError: no key, or `x` is not floating point.

  Source: Horvath et al., natural compression (arXiv 1905.10988), section 2.
  """

  @property
  def unbiased(self) -> bool:
    return True

  @property
  def needs_key(self) -> bool:
    return True

  def _omega(self, size: float) -> float:
    del size
    return 1 / 8

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    bits = jax.lax.bitcast_convert_type(x_D, jnp.uint32)
    exponent, mantissa = (bits >> 23) & 0xFF, bits & _MANTISSA
    up = (jax.random.bits(key, x_D.shape) & _MANTISSA) < mantissa  # exact: both have 23 bits
    normal = (exponent > 0) & (exponent < 255)
    exponent = exponent + (up & normal).astype(jnp.uint32)
    negative = (bits >> 31) & (exponent > 0).astype(jnp.uint32)  # one code for zero
    return {"codes": _packing.pack(exponent | (negative << 8), 9)}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    codes = _packing.unpack(payload["codes"], size, 9)
    bits = ((codes & 0xFF) << 23) | ((codes >> 8) << 31)
    x_D = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(x_D), x_D, jnp.nan)

  def _num_bytes(self, size: int) -> int:
    """d + ceil(d / 8)."""
    return _packing.packed_bytes(size, 9)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """The sum of (|x| - p) (2 p - |x|) with p the power of two below."""
    bits = jax.lax.bitcast_convert_type(x_D, jnp.uint32) & ~_MANTISSA
    below = jnp.abs(x_D) - jnp.abs(jax.lax.bitcast_convert_type(bits, jnp.float32))
    return jnp.sum(below * (jnp.abs(x_D) - 2 * below))


def natural() -> Natural:
  """Powers of two: 9 bits per element; see `Natural`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import natural
  >>> payload = natural().compress(jax.random.key(0), jnp.asarray([0.5, -8.0, 0.0]))
  >>> natural().decompress(payload, (3,)).tolist(), natural().payload_bytes((3,))
  ([0.5, -8.0, 0.0], 4)
  """
  return Natural()
