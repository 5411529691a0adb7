"""No compression: float32 on the wire."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import Payload, check_float


@dataclasses.dataclass(frozen=True)
class Identity:
  """Sends `x` in float32: the baseline, and the check that a method is right without rounding.

  Payload for d elements: `values` float32[d], 4 d bytes. `key` is not used.

  Raises:
    ValueError: `x` is not floating point.
  """

  @property
  def omega(self) -> float | None:
    return 0.0

  @property
  def alpha(self) -> float | None:
    return 1.0

  def compress(self, key: jax.Array | None, x: jax.Array) -> Payload:
    """`x` flat in float32."""
    del key
    check_float(x)
    return {"values": x.reshape(-1).astype(jnp.float32)}

  def decompress(
    self, payload: Payload, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    """The array of `shape` and `dtype` that the payload stands for."""
    return payload["values"].reshape(shape).astype(dtype)

  def payload_bytes(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """4 d, whatever the dtype."""
    del dtype
    return 4 * math.prod(shape)


def identity() -> Identity:
  """float32 on the wire; see `Identity`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import identity
  >>> identity().compress(None, jnp.ones((1, 2)))["values"].tolist()
  [1.0, 1.0]
  """
  return Identity()
