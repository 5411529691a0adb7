"""Top-k: the k values of largest magnitude."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _values
from jaxcomm.compressors._base import Key
from jaxcomm.compressors._sparse import Index, Sparse


@dataclasses.dataclass(frozen=True)
class TopK(Sparse):
  r"""Keeps the k values of largest magnitude of the whole array and drops the others.

  .. math:: \|C(x) - x\|^2 \le (1 - k / d) \|x\|^2, \quad \alpha = k / d

  with equality where all magnitudes are equal. With `ratio`, k = ceil(ratio d) and alpha >= ratio
  at every size; with `k` there is no alpha for all sizes, see `alpha_at`. Sharded leaves are
  compressed shard by shard: a Top-k of each shard, with the alpha of its size. Values as bfloat16
  (rounded to nearest) cost 2^-16 of alpha.

  Payload for d elements: `values` float32[k] (or uint16[k], the bits of bfloat16), `indices`
  uint8[about k ceil(log2 d) / 8] (packed, see `_packing`) or int32[k] (plain).

  NaN and Inf count as largest and are sent as they are.

  Attributes:
    k: how many values; or
    ratio: share of the values, in (0, 1].
    index: "packed" or "plain".
    value_dtype: "float32" or "bfloat16".

  Raises:
    ValueError: a field outside these rules, k > d, or `x` is not floating point.

  Source: Stich et al., Sparsified SGD with Memory (arXiv 1809.07599), definition 2.1.
  """

  def _alpha(self, size: float) -> float:
    """Of the dropped values, and of the rounding of those kept."""
    return self._share(size) * _values.alpha(self.value_dtype)

  def _support(self, key: Key, x_D: jax.Array) -> jax.Array:
    del key
    size_D = jnp.where(jnp.isnan(x_D), jnp.inf, jnp.abs(x_D))
    return jax.lax.top_k(size_D, self.num_kept(x_D.size))[1]


def top_k(
  k: int | None = None,
  ratio: float | None = None,
  index: Index = "packed",
  value_dtype: _values.ValueDtype = "float32",
) -> TopK:
  """The k largest values: 4 + ceil(log2 d) / 8 bytes per value kept; see `TopK`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import top_k
  >>> x = jnp.asarray([3.0, -5.0, 1.0, 4.0])
  >>> payload = top_k(2).compress(None, x)
  >>> top_k(2).decompress(payload, (4,)).tolist(), top_k(2).payload_bytes((4,))
  ([0.0, -5.0, 0.0, 4.0], 9)
  >>> top_k(2).alpha_at(4), float(top_k(2).variance(x))
  (0.5, 10.0)
  """
  return TopK(k, ratio, index, value_dtype)
