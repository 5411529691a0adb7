"""FedZip: keep the largest values of each tensor, replace them by a few centroids, then encode."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import check_float
from jaxcomm.compressors._kmeans import check_clusters, kmeans_1d

DTYPES = ("float32", "bfloat16", "float16")
MAX_SIZE = 2**26  # elements of a leaf: sizes in bits fit an unsigned 32-bit integer


@flax.struct.dataclass
class FedZipLeaf:
  """A tensor as labels of centroids.

  Attributes:
    labels: uint8, of the tensor's shape, below K.
    centroids: float32[K].
    dtype: name of the tensor's dtype.
    pin_zero: whether zeros decode to zero.
  """

  labels: jax.Array
  centroids: jax.Array
  dtype: str = flax.struct.field(pytree_node=False)
  pin_zero: bool = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class RawLeaf:
  """A tensor as it is: float32 on the wire.

  Attributes:
    values: float32, of the tensor's shape.
    dtype: name of the tensor's dtype.
  """

  values: jax.Array
  dtype: str = flax.struct.field(pytree_node=False)


def top_z(x: jax.Array, z: float) -> tuple[jax.Array, jax.Array]:
  """Keeps the largest share `z` of x by magnitude.

  Exactly m = n - round(n (1 - z)) of n elements are kept, at least one; of equal magnitudes those
  that come first. NaN counts as largest.

  Args:
    x: any shape, floating point.
    z: share to keep, in (0, 1].

  Returns:
    x with zeros elsewhere, in its dtype; and the mask of what was kept, bool.

  Raises:
    ValueError: `z` is outside (0, 1], or `x` is not floating point.

  Source: FedZip, arXiv 2102.01593 (Top-z sparsification), there with ties kept beyond m.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import top_z
    >>> top_z(jnp.asarray([1.0, -3.0, 2.0, 0.5]), 0.5)[0].tolist()
    [0.0, -3.0, 2.0, 0.0]
  """
  check_float(x)
  kept = num_kept(x.size, z)
  if kept == x.size:
    return x, jnp.ones(x.shape, bool)
  _, index = jax.lax.top_k(jnp.abs(x.reshape(-1)), kept)
  mask = jnp.zeros(x.size, bool).at[index].set(True).reshape(x.shape)
  return jnp.where(mask, x, jnp.zeros((), x.dtype)), mask


def num_kept(size: int, z: float) -> int:
  """How many of `size` elements `top_z` keeps."""
  if isinstance(z, bool) or not isinstance(z, int | float) or not 0 < z <= 1:
    raise ValueError(f"`z` must be a number in (0, 1], got {z!r}.")
  return max(size - round(size * (1 - z)), min(size, 1))


def fedzip_compress(
  delta: Any,
  z: Any = 0.2,
  num_clusters: int = 3,
  *,
  num_iters: int = 4,
  pin_zero: bool = True,
  min_size: int = 16,
) -> Any:
  """The lossy half of FedZip, leaf by leaf, under `jax.jit`: Top-z, then k-means of all values.

  What crosses the wire is what `fedzip_codec.encode` makes of the result; `encoded_bits` and
  `fedzip_bytes` predict its size inside jit. Nothing is sent here.

  Args:
    delta: a client's change of the parameters (or its gradient): float32, bfloat16 or float16.
    z: share of each leaf to keep, in (0, 1]; or a tree of shares like a prefix of `delta` (the
      paper's code prunes no biases: 1.0 there).
    num_clusters: K, 1 to 255.
    num_iters: of k-means.
    pin_zero: pruned elements decode to exactly 0; False as in the paper, where the cluster of the
      zeros also holds small values and decodes to their mean.
    min_size: leaves with fewer elements stay raw float32.

  Returns:
    A tree like `delta` of `FedZipLeaf` and `RawLeaf`. Leaves with NaN or Inf have NaN centroids:
    `encode` refuses them, and a round must drop such a client (`fedzip_finite`).

  Raises:
    ValueError: an argument outside these rules, another dtype, or a leaf of more than 2^26
      elements.

  Source: Malekijoo et al., FedZip, arXiv 2102.01593.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import fedzip_compress, fedzip_decompress
    >>> delta = {"w": jnp.asarray([0.1, -2.0, 0.2, 3.0, 0.0, 3.5, 0.1, 0.0])}
    >>> small = fedzip_compress(delta, z=0.375, min_size=2)
    >>> fedzip_decompress(small)["w"].tolist()
    [0.0, -2.0, 0.0, 3.25, 0.0, 3.25, 0.0, 0.0]
  """
  check_clusters(num_clusters, num_iters)
  check_min_size(min_size)

  def compress(path, x, share):
    check_leaf(path, x)
    num_kept(x.size, share)
    if x.size < min_size:
      return RawLeaf(x.astype(jnp.float32), x.dtype.name)
    values, _ = top_z(x.astype(jnp.float32), share)
    labels, centroids = kmeans_1d(values, num_clusters, num_iters, pin_zero=pin_zero)
    return FedZipLeaf(labels, centroids, x.dtype.name, pin_zero)

  shares = jax.tree.broadcast(z, delta)
  return jax.tree_util.tree_map_with_path(compress, delta, shares)


def fedzip_decompress(tree: Any) -> Any:
  """What the server reads: a tree of arrays in the shapes and dtypes that were compressed.

  Args:
    tree: from `fedzip_compress`.
  """

  def decompress(leaf):
    if isinstance(leaf, RawLeaf):
      return leaf.values.astype(leaf.dtype)
    return leaf.centroids[leaf.labels].astype(leaf.dtype)

  return jax.tree.map(decompress, tree, is_leaf=is_compressed)


def fedzip_finite(tree: Any) -> jax.Array:
  """bool[]: whether no leaf of a compressed tree holds NaN or Inf.

  A federated round gives a client the weight 0 where this is False, and goes on with the others.
  """
  leaves = jax.tree.leaves(tree, is_leaf=is_compressed)
  numbers = [leaf.values if isinstance(leaf, RawLeaf) else leaf.centroids for leaf in leaves]
  return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in numbers]))


def is_compressed(leaf: Any) -> bool:
  return isinstance(leaf, FedZipLeaf | RawLeaf)


def check_min_size(min_size: int) -> None:
  """Raises ValueError unless `min_size` is a count."""
  if isinstance(min_size, bool) or not isinstance(min_size, int) or min_size < 0:
    raise ValueError(f"`min_size` must be an integer of at least 0, got {min_size!r}.")


def check_leaf(path: Any, x: Any) -> None:
  """Raises ValueError for a leaf that no message can hold."""
  dtype, size = jnp.result_type(x), math.prod(jnp.shape(x))
  where = jax.tree_util.keystr(path, simple=True, separator="/") or "the root"
  if dtype.name not in DTYPES:
    raise ValueError(f"`delta` must be of dtype {', '.join(DTYPES)}, got {dtype} at {where}.")
  if size > MAX_SIZE:
    raise ValueError(f"`delta` leaves must have at most 2**26 elements, got {size} at {where}.")
