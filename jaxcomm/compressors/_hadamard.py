"""A rotation before rounding: the Walsh-Hadamard transform of short groups."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import Compressor, Key, Payload


@dataclasses.dataclass(frozen=True)
class Hadamard(Compressor):
  r"""`compressor` applied to the Walsh-Hadamard transform of groups of `size` elements.

  .. math:: D(c) = \tfrac1{size} H\, D'(C'(H x)), \qquad H H = size \cdot I

  H has entries of plus and minus one. The transform spreads an outlier over its group, so that the
  block maximum, and with it the rounding step, falls; it scales every norm by sqrt(size), so
  `omega` and `alpha` are those of `compressor`.

  Payload: that of `compressor` for the flattened array, padded with zeros to a multiple of `size`.
  An element that is NaN or Inf spoils its group, and with it the block.

  Attributes:
    compressor: what rounds the transform.
    size: elements per group, a power of two, at least 2.

  Raises:
    ValueError: `size` is not a power of two.

  Source: SDP4Bit (arXiv 2410.15526), with size 32.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import Hadamard, int8
  >>> compressor = Hadamard(int8(), size=4)
  >>> payload = compressor.compress(None, jnp.asarray([127.0, 0.0, 0.0]))
  >>> payload["codes"].tolist(), compressor.decompress(payload, (3,)).tolist()
  ([127, 127, 127, 127], [127.0, 0.0, 0.0])
  """

  compressor: Compressor
  size: int = 32

  def __post_init__(self):
    if not isinstance(self.size, int) or self.size < 2 or self.size & (self.size - 1):
      raise ValueError(f"`size` of the Hadamard transform must be 2, 4, 8, ..., got {self.size!r}.")

  @property
  def unbiased(self) -> bool:
    return self.compressor.unbiased

  @property
  def needs_key(self) -> bool:
    return self.compressor.needs_key

  @property
  def shared_key(self) -> bool:
    return self.compressor.shared_key

  @property
  def block_size(self) -> int:
    """Elements after which neither a group nor a block of the inner compressor continues."""
    return math.lcm(self.size, getattr(self.compressor, "block_size", 1))

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    padded = jnp.pad(x_D, (0, -x_D.size % self.size))
    return self.compressor.compress(key, _transform(padded, self.size))

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    shape = (int(self._padded(size)),)
    rotated = self.compressor.decompress(payload, shape, key=key)
    return _transform(rotated, self.size)[:size] * (1 / self.size)

  def _num_bytes(self, size: int) -> int:
    """Of `compressor`, for the size rounded up to whole groups."""
    return self.compressor.payload_bytes((int(self._padded(size)),))

  def _omega(self, size: float) -> float:
    return self.compressor._omega(self._padded(size))

  def _alpha(self, size: float) -> float:
    return self.compressor._alpha(self._padded(size))

  def _variance(self, x_D: jax.Array) -> jax.Array:
    if x_D.size % self.size:  # what falls on the padding is cut off
      return super()._variance(x_D)
    return self.compressor._variance(_transform(x_D, self.size)) * (1 / self.size)

  def _padded(self, size: float) -> float:
    return size if math.isinf(size) else math.ceil(size / self.size) * self.size


def hadamard(compressor: Compressor, size: int = 32) -> Hadamard:
  """`compressor` after a rotation of groups of `size` elements; see `Hadamard`."""
  return Hadamard(compressor, size)


def _transform(x_D: jax.Array, size: int) -> jax.Array:
  """H times each group of `size` consecutive elements, by additions in a fixed order."""
  half = 1
  while half < size:
    pairs = x_D.reshape(-1, 2, half)
    left, right = pairs[:, 0], pairs[:, 1]
    x_D = jnp.stack([left + right, left - right], axis=1).reshape(-1)
    half *= 2
  return x_D
