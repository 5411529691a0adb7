"""One compressor after another."""

import dataclasses

import jax

from jaxcomm.compressors._base import Compressor, Key, Payload, split_key, squared_norm
from jaxcomm.compressors._sparse import Sparse


@dataclasses.dataclass(frozen=True)
class Chain(Compressor):
  r"""`outer` applied to what `inner` leaves: C(x) = outer(inner(x)).

  After a compressor that keeps k of d values (`top_k`, `rand_k`), `outer` gets these k values as
  an array of their own: quantized values with their indices. After any other it gets the decoded
  array, and the payload is its payload.

  Constants, with a1 or w1 of `inner` and a2 or w2 of `outer` (at size k if k values are kept):

  - unbiased after unbiased: omega = (1 + w1) (1 + w2) - 1;
  - after values kept as they are (`top_k`, `rand_k(scaled=False)`), where the two errors never
    meet at one element: alpha = a1 a2. So alpha = a1 (1 - w2) for an unbiased `outer` with w2 < 1,
    and a1 / (1 + w2) for `contractive(outer)` with any w2;
  - otherwise none: Top-k after an unbiased compressor, for one, is not contractive in general.

  Payload: `values`, the payload of `outer`, and `indices` as in `inner`.

  Attributes:
    outer: applied last.
    inner: applied first; values kept must be float32, since `outer` says how they travel.

  Raises:
    ValueError: `inner` has another `value_dtype`.

  Source: Qsparse-local-SGD (arXiv 1906.02367), section 2, for quantized sparse messages.
  """

  outer: Compressor
  inner: Compressor

  def __post_init__(self):
    if isinstance(self.inner, Sparse) and self.inner.value_dtype != "float32":
      raise ValueError(
        "`inner` must keep float32 values, which `outer` compresses,"
        f" got value_dtype={self.inner.value_dtype!r}."
      )

  @property
  def unbiased(self) -> bool:
    return self.outer.unbiased and self.inner.unbiased

  @property
  def needs_key(self) -> bool:
    return self.outer.needs_key or self.inner.needs_key

  @property
  def shared_key(self) -> bool:
    return self.outer.shared_key or self.inner.shared_key

  def _outer_size(self, size: float) -> float:
    return self.inner.kept(size) if isinstance(self.inner, Sparse) else size

  def _omega(self, size: float) -> float:
    inner, outer = self.inner._omega(size), self.outer._omega(self._outer_size(size))
    return (1 + inner) * (1 + outer) - 1

  def _alpha(self, size: float) -> float:
    if isinstance(self.inner, Sparse) and not self.inner.unbiased:
      return self.inner._alpha(size) * self.outer._alpha(self._outer_size(size))
    return super()._alpha(size)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    inner_key, outer_key = split_key(key)
    if not isinstance(self.inner, Sparse):
      y_D = self.inner._roundtrip(inner_key, x_D)
      return {"values": self.outer._encode(outer_key, y_D)}
    support_K = self.inner._support(inner_key, x_D)
    values = self.outer._encode(outer_key, self.inner.values(x_D, support_K))
    return {"values": values, **self.inner.pack_support(support_K, x_D.size)}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    inner_key, outer_key = split_key(key)
    if not isinstance(self.inner, Sparse):
      return self.outer._decode(payload["values"], size, outer_key)
    values_K = self.outer._decode(payload["values"], self.inner.num_kept(size), outer_key)
    support_K = self.inner.unpack_support(payload, size, inner_key)
    return self.inner.expand(values_K, support_K, size)

  def _num_bytes(self, size: int) -> int:
    if not isinstance(self.inner, Sparse):
      return self.outer._num_bytes(size)
    return self.outer._num_bytes(self.inner.num_kept(size)) + self.inner.support_bytes(size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """||x - inner(x)||^2 plus that of `outer`, where `inner` draws nothing and they do not mix."""
    if self.inner.needs_key:
      return super()._variance(x_D)
    inner_D = self.inner._roundtrip(None, x_D)
    lost = squared_norm(x_D - inner_D)
    if isinstance(self.inner, Sparse):  # errors at different elements
      kept_K = self.inner.values(x_D, self.inner._support(None, x_D))
      return lost + self.outer._variance(kept_K)
    if self.outer.unbiased:
      return lost + self.outer._variance(inner_D)
    return super()._variance(x_D)


def chain_compressors(outer: Compressor, inner: Compressor) -> Chain:
  """`outer` after `inner`, with the constant of the two where there is one; see `Chain`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import chain_compressors, int8, top_k
  >>> compressor = chain_compressors(int8(), top_k(ratio=0.25))
  >>> payload = compressor.compress(None, jnp.asarray([1.0, 0.5, -127.0, 2.0] * 2))
  >>> compressor.decompress(payload, (8,)).tolist(), compressor.payload_bytes((8,))
  ([0.0, 0.0, -127.0, 0.0, 0.0, 0.0, -127.0, 0.0], 8)
  >>> compressor.alpha_at(8) == 0.25 * int8().alpha_at(2)
  True
  >>> print(chain_compressors(top_k(ratio=0.25), int8(rounding="stochastic")).alpha)
  None
  """
  return Chain(outer, inner)
