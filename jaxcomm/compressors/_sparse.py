"""What compressors that send k of d values share: the fields, the indices, and the two halves.

Letters: D elements of the array, K of them kept.
"""

import abc
import dataclasses
import fractions
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _packing, _values
from jaxcomm.compressors._base import Compressor, Key, Payload, split_key

Index = Literal["packed", "plain"]


@dataclasses.dataclass(frozen=True)
class Sparse(Compressor):
  """k of d values and where they stand; see `TopK` and `RandK`."""

  k: int | None = None
  ratio: float | None = None
  index: Index = "packed"
  value_dtype: _values.ValueDtype = "float32"

  def __post_init__(self):
    name = type(self).__name__
    if (self.k is None) == (self.ratio is None):
      raise ValueError(f"{name}: give `k` or `ratio`, got k={self.k!r} and ratio={self.ratio!r}.")
    if self.k is not None and (isinstance(self.k, bool) or not isinstance(self.k, int)):
      raise ValueError(f"{name}: `k` must be an integer, got {self.k!r}.")
    if self.k is not None and self.k < 1:
      raise ValueError(f"{name}: k={self.k} must be at least 1.")
    if self.ratio is not None and not 0 < self.ratio <= 1:
      raise ValueError(f"{name}: `ratio` must be in (0, 1], got {self.ratio!r}.")
    check_index(self.index)
    _values.check_dtype(self.value_dtype)

  def num_kept(self, size: int) -> int:
    """k for arrays of `size` elements: `k`, or ceil(ratio * size). Raises ValueError for k > d."""
    if self.ratio is not None:
      return math.ceil(fractions.Fraction(str(self.ratio)) * size)  # as it is written
    assert self.k is not None
    if size and self.k > size:
      raise ValueError(f"{type(self).__name__}: k={self.k} must be in 1..d={size}.")
    return min(self.k, size)

  def kept(self, size: float) -> float:
    """`num_kept`; if `size` is inf, one that bounds those of all sizes."""
    if math.isinf(size):
      return math.inf if self.k is None else self.k
    return self.num_kept(int(size))

  def _share(self, size: float) -> float:
    """k / d; for every size if it is inf, and then 0 if there is no bound."""
    if math.isinf(size):
      return self.ratio or 0.0
    return self.num_kept(int(size)) / size if size else 1.0

  @property
  def sends_indices(self) -> bool:
    """Whether the payload says where the values stand."""
    return True

  @property
  def rounds_up_and_down(self) -> bool:
    """Whether values are rounded to `value_dtype` stochastically, as an unbiased map needs."""
    return self.unbiased and self.value_dtype != "float32"

  @abc.abstractmethod
  def _support(self, key: Key, x_D: jax.Array) -> jax.Array:
    """Which elements of x_D are kept: int32[k], all different."""

  def gain(self, size: int) -> float:
    """What kept values are multiplied by."""
    del size
    return 1.0

  def values(self, x_D: jax.Array, support_K: jax.Array) -> jax.Array:
    """The kept values of x_D, before any scaling: float32[k]."""
    return x_D[support_K]

  def expand(self, values_K: jax.Array, support_K: jax.Array, size: int) -> jax.Array:
    """float32[size] with `gain` times the values on their support and zeros elsewhere."""
    scaled_K = values_K * jnp.float32(self.gain(size))
    return jnp.zeros(size, jnp.float32).at[support_K].set(scaled_K, unique_indices=True)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    support_key, value_key = split_key(key)
    support_K = self._support(support_key, x_D)
    rounding_key = value_key if self.rounds_up_and_down else None
    values_K = _values.encode(self.values(x_D, support_K), self.value_dtype, rounding_key)
    return {"values": values_K, **self.pack_support(support_K, x_D.size)}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    support_K = self.unpack_support(payload, size, split_key(key)[0])
    return self.expand(_values.decode(payload["values"], self.value_dtype), support_K, size)

  def _num_bytes(self, size: int) -> int:
    value_bytes = _values.num_bytes(self.value_dtype) * self.num_kept(size)
    return value_bytes + self.support_bytes(size)

  def pack_support(self, support_K: jax.Array, size: int) -> Payload:
    """{"indices": ...}, or {} if receivers know them."""
    return {"indices": pack_indices(support_K, size, self.index)} if self.sends_indices else {}

  def unpack_support(self, payload: Payload, size: int, key: Key) -> jax.Array:
    """The inverse of `pack_support`; `key` is that of `_support`."""
    del key
    return unpack_indices(payload["indices"], self.num_kept(size), size, self.index)

  def support_bytes(self, size: int) -> int:
    """Bytes of `pack_support`."""
    return index_bytes(self.num_kept(size), size, self.index) if self.sends_indices else 0


def check_index(index: str) -> None:
  """Raises ValueError for an unknown `index`."""
  if index not in ("packed", "plain"):
    raise ValueError(f"`index` must be 'packed' or 'plain', got {index!r}.")


def index_bits(size: int) -> int:
  """ceil(log2 d). Raises ValueError where int32 cannot count the elements."""
  if size > 2**31:
    raise ValueError(f"`x` must have at most 2**31 elements for int32 indices, got {size}.")
  return max(size - 1, 0).bit_length()


def pack_indices(indices: jax.Array, size: int, index: Index) -> jax.Array:
  """int32 as they are, or uint8 with ceil(log2 size) bits each (`_packing`)."""
  if index == "plain":
    return indices
  return _packing.pack(indices.astype(jnp.uint32), index_bits(size))


def unpack_indices(packed: jax.Array, num: int, size: int, index: Index) -> jax.Array:
  """The inverse of `pack_indices`: int32[num]."""
  if index == "plain":
    return packed
  return _packing.unpack(packed, num, index_bits(size)).astype(jnp.int32)


def index_bytes(num: int, size: int, index: Index) -> int:
  """Bytes of `num` packed or plain indices."""
  bits = index_bits(size)
  return 4 * num if index == "plain" else _packing.packed_bytes(num, bits)
