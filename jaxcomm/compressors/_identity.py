"""No compression: float32 on the wire."""

import dataclasses

import jax

from jaxcomm.compressors._base import Compressor, Key, Payload


@dataclasses.dataclass(frozen=True)
class Identity(Compressor):
  """Sends `x` in float32: the baseline, and the check that a method is right without rounding.

  Payload for d elements: `values` float32[d], 4 d bytes. `key` is not used.

  Raises:
    ValueError: `x` is not floating point.
  """

  @property
  def unbiased(self) -> bool:
    return True

  def _omega(self, size: float) -> float:
    del size
    return 0.0

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    del key
    return {"values": x_D}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del size, key
    return payload["values"]

  def _num_bytes(self, size: int) -> int:
    return 4 * size


def identity() -> Identity:
  """float32 on the wire; see `Identity`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import identity
  >>> identity().compress(None, jnp.ones((1, 2)))["values"].tolist()
  [1.0, 1.0]
  """
  return Identity()
