"""A tree of tensors as bytes, and back into a tree of the same structure."""

import math
import struct
import zlib
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxcomm.compressors._fedzip import FedZipLeaf, RawLeaf, is_compressed
from jaxcomm.compressors._fedzip_bits import TREE_HEADER_BYTES, check_method
from jaxcomm.compressors.fedzip_codec._bits import FedZipError
from jaxcomm.compressors.fedzip_codec._message import decode_tensor, encode_tensor, encode_values

_MAGIC = b"FZT1"
_HEAD = struct.Struct("<4sII")  # magic, number of leaves, CRC-32 of names and shapes
assert _HEAD.size == TREE_HEADER_BYTES


def encode(tree: Any, method: str = "auto") -> bytes:
  """What a client sends: all leaves of a compressed tree.

  Args:
    tree: from `fedzip_compress`, on any device.
    method: an encoding for all leaves of labels, or "auto": the shortest for each leaf.

  Returns:
    Bytes; `fedzip_bytes(tree, method)` of them.

  Raises:
    ValueError: unknown `method`, no compressed tree, NaN or Inf in a leaf, or a call under jit.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import fedzip_bytes, fedzip_codec, fedzip_compress
    >>> delta = {"w": jnp.zeros(1000).at[7].set(2.0).at[500].set(-1.0)}
    >>> small = fedzip_compress(delta, z=0.01)
    >>> data = fedzip_codec.encode(small)
    >>> len(data), int(fedzip_bytes(small))
    (59, 59)
    >>> fedzip_codec.decode(data, delta)["w"][[6, 7, 500]].tolist()
    [0.0, 2.0, -1.0]
  """
  check_method(method)
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed)
  parts = [_encode_leaf(_name(path), leaf, method) for path, leaf in leaves]
  shapes = [(_name(path), np.shape(_data(leaf))) for path, leaf in leaves]
  return b"".join([_HEAD.pack(_MAGIC, len(leaves), _checksum(shapes)), *parts])


def decode(data: bytes, like: Any = None, *, max_elements: int = 2**26) -> Any:
  """What the server reads.

  Args:
    data: from `encode`; anything else raises, with the offset where it fails.
    like: a tree of arrays or `jax.ShapeDtypeStruct`s: what the leaves must be. Memory is then
      bounded by it. None: anything.
    max_elements: without `like`, the most elements in all.

  Returns:
    A tree like `like` of numpy arrays, in the dtypes that were compressed; or without `like` a list
    of flat arrays.

  Raises:
    FedZipError: the bytes are no message, or that of another tree.
  """
  data = bytes(data)
  if len(data) < _HEAD.size or data[:4] != _MAGIC:
    raise FedZipError(f"a tree starts with {_MAGIC} and two numbers, got {data[:4]}", 0)
  _, num_leaves, checksum = _HEAD.unpack_from(data)
  if like is None:
    return _decode_all(data, num_leaves, max_elements)
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  if num_leaves != len(leaves):
    raise FedZipError(f"expected {len(leaves)} leaves, got {num_leaves}", 4)
  arrays, offset = [], _HEAD.size
  for path, leaf in leaves:
    shape = getattr(leaf, "shape", ())
    array, offset = _decode_leaf(data, offset, _name(path), math.prod(shape))
    arrays.append(array.reshape(shape))
  _check_end(data, offset)
  if checksum != _checksum([(_name(path), np.shape(a)) for (path, _), a in zip(leaves, arrays)]):
    raise FedZipError("the tree has the expected sizes, but other names or shapes", 8)
  return treedef.unflatten(arrays)


def _decode_all(data: bytes, num_leaves: int, max_elements: int) -> list[np.ndarray]:
  arrays, offset = [], _HEAD.size
  for _ in range(num_leaves):
    values, dtype, offset = decode_tensor(data, offset, max_elements=max_elements)
    max_elements -= values.size
    arrays.append(values.astype(jax.numpy.dtype(dtype)))
  _check_end(data, offset)
  return arrays


def _decode_leaf(data: bytes, offset: int, name: str, size: int) -> tuple[np.ndarray, int]:
  try:
    values, dtype, end = decode_tensor(data, offset, max_elements=size)
  except FedZipError as e:
    raise FedZipError(f"leaf {name!r}: {e.why}", e.offset) from None
  if values.size != size:
    raise FedZipError(f"leaf {name!r}: expected n={size}, got {values.size}", offset + 8)
  return values.astype(jax.numpy.dtype(dtype)), end


def _check_end(data: bytes, offset: int) -> None:
  if offset != len(data):
    raise FedZipError(f"the message must end here, {len(data) - offset} bytes are left", offset)


def _encode_leaf(name: str, leaf: Any, method: str) -> bytes:
  if not is_compressed(leaf):
    raise ValueError(f"`tree` must come from fedzip_compress, got {type(leaf).__name__} at {name}.")
  if any(isinstance(x, Tracer) for x in jax.tree.leaves(leaf)):
    raise ValueError("`encode` makes bytes on the host and cannot be called under jax.jit.")
  try:
    if isinstance(leaf, RawLeaf):
      return encode_values(_data(leaf).reshape(-1), dtype=leaf.dtype)
    centroids = np.asarray(leaf.centroids)
    labels = _data(leaf).reshape(-1)
    kwargs = {"dtype": leaf.dtype, "pin_zero": leaf.pin_zero}
    return encode_tensor(labels, centroids, method=method, **kwargs)
  except ValueError as e:
    raise ValueError(f"leaf {name!r}: {e} Drop a client with such a change (weight 0).") from e


def _data(leaf: FedZipLeaf | RawLeaf) -> np.ndarray:
  return np.asarray(leaf.values if isinstance(leaf, RawLeaf) else leaf.labels)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _checksum(shapes: list[tuple[str, tuple[int, ...]]]) -> int:
  """CRC-32 of names and shapes: two trees of equal sizes are not taken for each other."""
  return zlib.crc32("".join(f"{name}{list(shape)};" for name, shape in shapes).encode())
