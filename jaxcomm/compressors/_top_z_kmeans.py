"""FedZip's lossy half with a payload of fixed shape, for collectives."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _packing
from jaxcomm.compressors._base import Compressor, Key, Payload
from jaxcomm.compressors._fedzip import num_kept, top_z
from jaxcomm.compressors._kmeans import check_clusters, kmeans_1d


@dataclasses.dataclass(frozen=True)
class TopZKMeans(Compressor):
  """Keeps the largest share z of the values, as labels of K centroids.

  The array decodes to exactly what `fedzip_compress` makes of it. Bytes of variable length, which
  `fedzip_codec` makes, have no place between the devices of a mesh: here the m survivors are sent
  as positions and labels of fixed width, and the label of all pruned elements once.

  Payload for d elements, m kept: `indices` uint8[about m ceil(log2 d) / 8], `labels` uint8[about
  (m + 1) ceil(log2 K) / 8] (both packed, see `_packing`), `centroids` float32[K].

  No constants are claimed: biased, and how close the centroids come depends on the values. Use
  error feedback. An array with NaN or Inf decodes to NaN everywhere.

  Attributes:
    z: share to keep, in (0, 1].
    num_clusters: K, 1 to 255.
    num_iters: of k-means.
    pin_zero: pruned elements decode to exactly 0.

  Raises:
    ValueError: a field outside these rules, or `x` is not floating point.

  Source: Malekijoo et al., FedZip (arXiv 2102.01593).
  """

  z: float = 0.2
  num_clusters: int = 3
  num_iters: int = 4
  pin_zero: bool = True

  def __post_init__(self):
    num_kept(1, self.z)
    check_clusters(self.num_clusters, self.num_iters)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    del key
    values_D, mask_D = top_z(x_D, self.z)
    labels_D, centroids = kmeans_1d(
      values_D, self.num_clusters, self.num_iters, pin_zero=self.pin_zero
    )
    kept = num_kept(x_D.size, self.z)
    (indices,) = jnp.nonzero(mask_D, size=kept)
    if kept < x_D.size:  # one more: the first of those that are pruned, which all have one label
      pruned = jnp.argmin(mask_D)[None]
      sent = jnp.concatenate([indices, pruned.astype(indices.dtype)])
    else:
      sent = indices
    return {
      "indices": _packing.pack(indices.astype(jnp.uint32), _index_bits(x_D.size)),
      "labels": _packing.pack(labels_D[sent], self._label_bits),
      "centroids": centroids,
    }

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    kept, num_labels = num_kept(size, self.z), self._num_labels(size)
    indices = _packing.unpack(payload["indices"], kept, _index_bits(size))
    labels = _packing.unpack(payload["labels"], num_labels, self._label_bits)
    values = payload["centroids"][labels]
    filled = jnp.broadcast_to(values[-1], (size,))
    return filled.at[indices].set(values[:kept], unique_indices=True)

  def _num_bytes(self, size: int) -> int:
    kept, num_labels = num_kept(size, self.z), self._num_labels(size)
    indices = _packing.packed_bytes(kept, _index_bits(size))
    return indices + _packing.packed_bytes(num_labels, self._label_bits) + 4 * self.num_clusters

  def _num_labels(self, size: int) -> int:
    """Those of the survivors, and one for the others if there are any."""
    kept = num_kept(size, self.z)
    return kept + (kept < size)

  @property
  def _label_bits(self) -> int:
    return (self.num_clusters - 1).bit_length()


def _index_bits(size: int) -> int:
  return max(size - 1, 0).bit_length()


def top_z_kmeans(
  z: float = 0.2, num_clusters: int = 3, num_iters: int = 4, *, pin_zero: bool = True
) -> TopZKMeans:
  """The largest share z as labels of K centroids: about z d (log2 d + log2 K) / 8 bytes.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import top_z_kmeans
  >>> x = jnp.asarray([0.1, -2.0, 0.2, 3.0, 0.0, 3.5, 0.1, 0.0])
  >>> compressor = top_z_kmeans(0.375)
  >>> payload = compressor.compress(None, x)
  >>> compressor.decompress(payload, (8,)).tolist(), compressor.payload_bytes((8,))
  ([0.0, -2.0, 0.0, 3.25, 0.0, 3.25, 0.0, 0.0], 15)
  """
  return TopZKMeans(z, num_clusters, num_iters, pin_zero)
