"""Mean of a tree in few messages: small leaves share a bucket, but never a block."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.collectives._all_reduce import (
  Algorithm,
  all_reduce,
  all_reduce_bytes,
  check_algorithm,
  exact_reduce,
  reduce_with_error,
)
from jaxcomm.collectives._common import check_input
from jaxcomm.collectives._options import Wire
from jaxcomm.collectives._straight_through import as_differing
from jaxcomm.compressors import Compressor

BUCKET_SIZE = 2**22  # elements: 16 MiB of float32


@dataclasses.dataclass(frozen=True)
class _Bucket:
  """Leaves that travel together.

  Attributes:
    leaves: their numbers.
    widths: elements of each, padded to whole blocks.
    size: elements in all, padded so that every device's chunk is whole blocks.
    exact: averaged in float32.
  """

  leaves: tuple[int, ...]
  widths: tuple[int, ...]
  size: int
  exact: bool = False


def tree_compressed_pmean(
  tree: Any,
  axis_name: str,
  compressor: Compressor,
  *,
  algorithm: Algorithm = "two_hop",
  key: jax.Array | None = None,
  min_size: int = 0,
  bucket_size: int = BUCKET_SIZE,
) -> Any:
  """`compressed_pmean` of every leaf of `tree`, in one message per bucket instead of per leaf.

  Leaves are laid end to end in the order of the tree, each padded with zeros to whole blocks of the
  compressor, so that no scale is shared by two leaves. A bucket is closed before it would exceed
  `bucket_size`; a larger leaf is a bucket by itself. Leaves below `min_size` (biases, norms) stay
  in float32, all in one all-reduce, rounded by no compressor.

  Wire: `tree_compressed_pmean_bytes`. Padding is sent: on average half a block per leaf, and up to
  N blocks per bucket.

  Args:
    tree: arrays of floating-point dtype.
    axis_name: one bound axis.
    compressor: one with a `block_size`, e.g. `int8()`, `int4()`, `fp8()`, `e3m0()`.
    algorithm, key: as in `compressed_pmean`; each bucket folds in its number.
    min_size: leaves of fewer elements are averaged exactly, in float32.
    bucket_size: elements per bucket.

  Returns:
    The means, like `tree` in structure, shapes and dtypes; equal on all devices bit for bit.

  Raises:
    ValueError: as `compressed_pmean`; a compressor without blocks, or sizes that are negative.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import tree_compressed_pmean
  >>> from jaxcomm.compressors import int8
  >>> tree = {"w": jnp.asarray([[127.0, 1.0], [127.0, 3.0]]), "b": jnp.asarray([[1e-4], [3e-4]])}
  >>> mean = jax.jit(jax.vmap(lambda t: tree_compressed_pmean(t, "data", int8()), axis_name="data"))
  >>> f"{mean(tree)['b'][0, 0]:.4f}", mean(tree)["w"][0].tolist()
  ('0.0002', [127.0, 2.0])
  """

  def mean(flat, key):
    wire = Wire(compressor, compressor)
    return all_reduce(flat, axis_name, wire, key, mean=True, algorithm=algorithm), None

  layout = (compressor, algorithm, min_size, bucket_size)
  return _in_buckets(mean, tree, axis_name, key, *layout)[0]


def tree_compressed_pmean_with_error(
  tree: Any,
  axis_name: str,
  compressor: Compressor,
  *,
  algorithm: Algorithm = "two_hop",
  key: jax.Array | None = None,
  min_size: int = 0,
  bucket_size: int = BUCKET_SIZE,
) -> tuple[Any, Any]:
  """`tree_compressed_pmean` and what its roundings lost, as in `compressed_pmean_with_error`.

  Returns:
    (means, errors): trees like `tree`, float32. Errors of leaves below `min_size` are zero. Stops
    gradients.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import tree_compressed_pmean_with_error
  >>> from jaxcomm.compressors import int8
  >>> tree = {"w": jnp.asarray([[127.0, 1.25], [127.0, 3.0]])}
  >>> mean, error = jax.vmap(
  ...   lambda t: tree_compressed_pmean_with_error(t, "data", int8()), axis_name="data"
  ... )(tree)
  >>> bool(jnp.allclose(error["w"].mean(0), tree["w"].mean(0) - mean["w"][0], atol=1e-6))
  True
  """

  def mean(flat, key):
    return reduce_with_error(flat, axis_name, compressor, key, mean=True, algorithm=algorithm)

  tree = jax.tree.map(lambda x: jax.lax.stop_gradient(x).astype(jnp.float32), tree)
  layout = (compressor, algorithm, min_size, bucket_size)
  return _in_buckets(mean, tree, axis_name, key, *layout)


def _in_buckets(mean, tree, axis_name, key, compressor, algorithm, min_size, bucket_size):
  """(means, errors) of `mean(flat, key) -> (mean, error or None)`, bucket by bucket."""
  check_algorithm(algorithm)
  leaves, treedef = jax.tree.flatten(tree)
  sizes = [leaf.size for leaf in leaves]
  axis_size = max([check_input(leaf, axis_name) for leaf in leaves], default=1)
  leaves = [as_differing(leaf, axis_name) for leaf in leaves]
  means, errors = list(leaves), list(leaves)
  buckets = _plan(sizes, axis_size, compressor, algorithm, min_size, bucket_size)
  for number, bucket in enumerate(buckets):
    flat = _pack([leaves[i] for i in bucket.leaves], bucket)
    if bucket.exact:
      mean_D, error_D = exact_reduce(flat, axis_name, mean=True), jnp.zeros_like(flat)
    else:
      bucket_key = None if key is None else jax.random.fold_in(key, number)
      mean_D, error_D = mean(flat, bucket_key)
    _unpack(means, mean_D, bucket)
    if error_D is not None:
      _unpack(errors, error_D, bucket)
  return treedef.unflatten(means), treedef.unflatten(errors)


def _plan(
  sizes: list[int],
  axis_size: int,
  compressor: Any,
  algorithm: Algorithm,
  min_size: int,
  bucket_size: int,
) -> list[_Bucket]:
  block = getattr(compressor, "block_size", None)
  if block is None:
    raise ValueError(
      f"`compressor` must have a `block_size`, to keep leaves apart, got {compressor}."
    )
  for name, value in (("min_size", min_size), ("bucket_size", bucket_size)):
    if value < 0:
      raise ValueError(f"`{name}` must be a number of elements >= 0, got {value}.")
  small = tuple(i for i, size in enumerate(sizes) if size < min_size)
  groups: list[list[int]] = []
  room = 0
  for i, size in enumerate(sizes):
    if i in small:
      continue
    width = _rounded_up(size, block)
    if not groups or width > room:
      groups.append([])
      room = bucket_size
    groups[-1].append(i)
    room -= width
  multiple = block * (axis_size if algorithm == "two_hop" else 1)
  buckets = []
  for group in groups:
    widths = tuple(_rounded_up(sizes[i], block) for i in group)
    buckets.append(_Bucket(tuple(group), widths, _rounded_up(sum(widths), multiple)))
  if small:
    widths = tuple(sizes[i] for i in small)
    buckets.append(_Bucket(small, widths, sum(widths), exact=True))
  return buckets


def _rounded_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _pack(leaves: list[jax.Array], bucket: _Bucket) -> jax.Array:
  """float32[bucket.size]: the leaves of the bucket, each at the start of a block."""
  flat = [leaf.reshape(-1).astype(jnp.float32) for leaf in leaves]
  padded = [jnp.pad(x, (0, width - x.size)) for x, width in zip(flat, bucket.widths)]
  whole = jnp.concatenate(padded)
  return jnp.pad(whole, (0, bucket.size - whole.size))


def _unpack(leaves: list[jax.Array], flat: jax.Array, bucket: _Bucket) -> None:
  """Replaces the leaves of the bucket, keeping shapes and dtypes."""
  start = 0
  for i, width in zip(bucket.leaves, bucket.widths):
    like = leaves[i]
    part = flat[start : start + like.size]
    leaves[i] = part.reshape(like.shape).astype(like.dtype)
    start += width


def tree_compressed_pmean_bytes(
  tree: Any,
  axis_size: int,
  compressor: Compressor,
  *,
  algorithm: Algorithm = "two_hop",
  min_size: int = 0,
  bucket_size: int = BUCKET_SIZE,
) -> int:
  """Bytes that one device sends in `tree_compressed_pmean`: `compressed_pmean_bytes` per bucket.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s.
    axis_size, compressor, algorithm, min_size, bucket_size: as there.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.collectives import tree_compressed_pmean_bytes
  >>> from jaxcomm.compressors import int8
  >>> tree = {"w": jnp.zeros((64, 64)), "scale": jnp.zeros(64)}
  >>> [tree_compressed_pmean_bytes(tree, 8, int8(), min_size=size) for size in (0, 100)]
  [10920, 7728]
  """
  sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]
  buckets = _plan(sizes, axis_size, compressor, algorithm, min_size, bucket_size)
  return sum(
    all_reduce_bytes((b.size,), axis_size, None if b.exact else compressor, algorithm)
    for b in buckets
  )
