"""Bernoulli sparsification: every value is kept with probability p, in a message of fixed size."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import Compressor, Key, Payload, split_key, squared_norm
from jaxcomm.compressors._sparse import (
  Index,
  check_index,
  index_bytes,
  pack_indices,
  unpack_indices,
)

# Room beyond the mean number of values: this many standard deviations, and this many more.
_SIGMAS = 6
_SPARE = 5


@dataclasses.dataclass(frozen=True)
class Bernoulli(Compressor):
  r"""Keeps every value with probability p, divided by p: unbiased.

  .. math:: E\|C(x) - x\|^2 = (1 / p - 1) \|x\|^2

  The number m of kept values is random, the message is not: it has room for
  capacity = min(d, ceil(p d + 6 sqrt(p (1 - p) d)) + 5) values, and says how many there are. Where
  m > capacity (less than once in 10^6 messages), a part of that size is sent, from a random place
  on and around the end, times m / capacity: still unbiased. `omega` counts that in (less than 1 %
  of 1 / p); `variance` does not (less than 10^-6).

  Payload for d elements: `values` float32[capacity], `indices` uint8[about capacity
  ceil(log2 d) / 8] (packed, see `_packing`) or int32[capacity] (plain), `count` int32[1]. Unused
  places hold zeros.

  An array with NaN or Inf decodes to NaN wherever a value is kept, and at least at one place.

  Attributes:
    p: probability, in (0, 1].
    index: "packed" or "plain".

  Raises:
    ValueError: a field outside these rules, no key, or `x` is not floating point.

  Source: Khirirat et al. (arXiv 1806.06573), random sparsification; the fixed size is ours.
  """

  p: float
  index: Index = "packed"

  def __post_init__(self):
    if not 0 < self.p <= 1:
      raise ValueError(f"`p` must be in (0, 1], got {self.p!r}.")
    check_index(self.index)

  def capacity(self, size: int) -> int:
    """Number of values that a message of `size` elements has room for."""
    sigma = math.sqrt(self.p * (1 - self.p) * size)
    return min(size, math.ceil(self.p * size + _SIGMAS * sigma) + _SPARE)

  @property
  def unbiased(self) -> bool:
    return True

  @property
  def needs_key(self) -> bool:
    return True

  def _omega(self, size: float) -> float:
    """E max(1, (1 + M) / capacity) / p - 1, with M of the other d - 1 values kept.

    E max(0, M - a) <= (sqrt(var + (a - mean)^2) - (a - mean)) / 2 for any M; with
    a - mean >= 6 sqrt(var) and capacity >= 6 sqrt(var) that is at most capacity / 144 at any size.
    """
    del size
    return (1 + 1 / (4 * _SIGMAS**2)) / self.p - 1 if self.p < 1 else 0.0

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    size, capacity = x_D.size, self.capacity(x_D.size)
    if size == 0:
      empty = jnp.zeros(0, jnp.int32)
      indices = pack_indices(empty, 0, self.index)
      return {"values": x_D, "indices": indices, "count": jnp.zeros(1, jnp.int32)}
    keep_key, start_key = split_key(key)
    keep_D = jax.random.uniform(keep_key, (size,)) < self.p
    # From a random place on: if not all fit, no place is less likely to be sent than another.
    start = jax.random.randint(start_key, (), 0, size)
    (places_C,) = jnp.nonzero(jnp.roll(keep_D, -start), size=capacity, fill_value=0)
    places_C = places_C.astype(jnp.int32) + start - jnp.where(places_C < size - start, 0, size)
    count = jnp.sum(keep_D, dtype=jnp.int32)
    used_C = jnp.arange(capacity) < count
    values_C = jnp.where(used_C, x_D[places_C], 0.0)
    values_C = jnp.where(jnp.isfinite(x_D).all(), values_C, jnp.nan)
    indices = pack_indices(jnp.where(used_C, places_C, 0), size, self.index)
    return {"values": values_C, "indices": indices, "count": count[None]}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    capacity = self.capacity(size)
    places_C = unpack_indices(payload["indices"], capacity, size, self.index)
    left_out = jnp.maximum(payload["count"].astype(jnp.float32) / capacity, 1.0)
    scaled_C = payload["values"] * (left_out / jnp.float32(self.p))
    return jnp.zeros(size, jnp.float32).at[places_C].add(scaled_C)

  def _num_bytes(self, size: int) -> int:
    capacity = self.capacity(size)
    return 4 * capacity + index_bytes(capacity, size, self.index) + 4

  def _variance(self, x_D: jax.Array) -> jax.Array:
    return (1 / self.p - 1) * squared_norm(x_D)


def bernoulli(p: float, index: Index = "packed") -> Bernoulli:
  """Each value with probability p: about p d (4 + ceil(log2 d) / 8) bytes; see `Bernoulli`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import bernoulli
  >>> compressor = bernoulli(0.25)
  >>> payload = compressor.compress(jax.random.key(0), jnp.ones(1000))
  >>> x = compressor.decompress(payload, (1000,))
  >>> sorted(set(x.tolist())), int(payload["count"][0]) == int((x > 0).sum())
  ([0.0, 4.0], True)
  >>> compressor.capacity(1000), compressor.payload_bytes((1000,))
  (338, 1779)
  """
  return Bernoulli(p, index)
