"""The induced compressor: a biased one first, an unbiased one for what it left."""

import dataclasses
import math

import jax

from jaxcomm.compressors._base import Compressor, Key, Payload, split_key
from jaxcomm.compressors._contractive import check_unbiased


@dataclasses.dataclass(frozen=True)
class Induced(Compressor):
  r"""C(x) + U(x - C(x)): unbiased, with omega = omega_U (1 - alpha_C).

  Payload: `biased` and `unbiased`, one payload of each.

  Attributes:
    biased: C, contractive.
    unbiased_part: U, unbiased.

  Raises:
    ValueError: `unbiased_part` is not unbiased.

  Source: Horvath and Richtarik, induced compressor (arXiv 2006.11077), section 3.
  """

  biased: Compressor
  unbiased_part: Compressor

  def __post_init__(self):
    check_unbiased("unbiased", self.unbiased_part)

  @property
  def unbiased(self) -> bool:
    return True

  @property
  def needs_key(self) -> bool:
    return self.biased.needs_key or self.unbiased_part.needs_key

  @property
  def shared_key(self) -> bool:
    return self.biased.shared_key or self.unbiased_part.shared_key

  def _omega(self, size: float) -> float:
    omega, alpha = self.unbiased_part._omega(size), self.biased._alpha(size)
    return math.inf if math.isinf(omega) or alpha == 0 else omega * (1 - alpha)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    biased_key, unbiased_key = split_key(key)
    biased = self.biased._encode(biased_key, x_D)
    left_D = x_D - self._decode_biased(biased, x_D.size, biased_key)
    return {"biased": biased, "unbiased": self.unbiased_part._encode(unbiased_key, left_D)}

  def _decode_biased(self, payload: Payload, size: int, key: Key):
    return self.biased._decode(payload, size, key) if size else 0.0

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    biased_key, unbiased_key = split_key(key)
    biased_D = self.biased._decode(payload["biased"], size, biased_key)
    return biased_D + self.unbiased_part._decode(payload["unbiased"], size, unbiased_key)

  def _num_bytes(self, size: int) -> int:
    return self.biased._num_bytes(size) + self.unbiased_part._num_bytes(size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """That of `unbiased` for x - C(x), if `biased` draws nothing."""
    if self.biased.needs_key:
      return super()._variance(x_D)
    return self.unbiased_part._variance(x_D - self.biased._roundtrip(None, x_D))


def induced(biased: Compressor, unbiased: Compressor) -> Induced:
  """`biased`, then `unbiased` for the rest: an unbiased compressor; see `Induced`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import induced, natural, top_k
  >>> compressor, x = induced(top_k(ratio=0.5), natural()), jnp.asarray([3.0, -0.5])
  >>> payload = compressor.compress(jax.random.key(0), x)
  >>> compressor.decompress(payload, (2,)).tolist(), compressor.omega
  ([3.0, -0.5], 0.0625)
  """
  return Induced(biased, unbiased)
