"""What every compressor is: a value with static fields that turns an array into a message."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Payload = dict[str, jax.Array]


@runtime_checkable
class Compressor(Protocol):
  """A map from arrays to messages (payloads) and back, with its constants.

  The two classes of convergence theory, for every finite array x:

  - unbiased, U(omega): E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2;
  - contractive, B(alpha): E||C(x) - x||^2 <= (1 - alpha) ||x||^2, with 0 < alpha <= 1.

  Implementations are frozen dataclasses whose fields are static, so they hash and compare by
  value and may be closed over by `jax.jit`. All arithmetic is float32. An instance holds no
  state; what a method carries between calls (error feedback) belongs to the method.
  """

  @property
  def omega(self) -> float | None:
    """Variance constant of an unbiased compressor; None when it is biased."""
    ...

  @property
  def alpha(self) -> float | None:
    """Contraction constant; None when no sound constant is known."""
    ...

  def compress(self, key: jax.Array | None, x: jax.Array) -> Payload:
    """The message for `x` (any shape, float dtype): exactly the arrays that cross the wire.

    `key` is a `jax.random` key; None is allowed where the compressor draws nothing.
    """
    ...

  def decompress(
    self, payload: Payload, shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> jax.Array:
    """The array of `shape` and `dtype` that `payload` stands for."""
    ...

  def payload_bytes(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """Exact size in bytes of the payload of an array of `shape` and `dtype`."""
    ...


def check_float(x: jax.Array) -> None:
  """Raises ValueError unless `x` has a floating-point dtype."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")
