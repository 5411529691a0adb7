"""One tensor as a message: header, payload, checksum."""

import struct
import zlib

import numpy as np

from jaxcomm.compressors._fedzip import DTYPES
from jaxcomm.compressors._fedzip_bits import METHODS, check_method
from jaxcomm.compressors.fedzip_codec._bits import FedZipError
from jaxcomm.compressors.fedzip_codec._labels import (
  LABEL_METHODS,
  decode_labels,
  encode_labels,
  payload_bits,
)

_MAGIC = b"FZ01"
_HEAD = struct.Struct("<4s4BI")  # magic, method, flags, dtype, K, n
_U32 = struct.Struct("<I")
_PIN_ZERO = 1


def encode_tensor(
  labels: np.ndarray,
  centroids: np.ndarray,
  *,
  method: str = "auto",
  dtype: str = "float32",
  pin_zero: bool = False,
) -> bytes:
  """The message of a tensor of labels; see the package for the format.

  Args:
    labels: uint8, flat, below K, fewer than 2^31.
    centroids: float32[K], finite, 1 <= K <= 255.
    method: an encoding, or "auto" for that with the shortest message.
    dtype: float32, bfloat16 or float16: of the tensor that labels stand for.
    pin_zero: a flag for the reader, which does not change the bytes otherwise.

  Raises:
    ValueError: an argument outside these rules.

  Example:
    >>> import numpy as np
    >>> from jaxcomm.compressors import fedzip_codec
    >>> labels = np.asarray([0, 0, 1, 0, 0, 0, 0, 0], np.uint8)
    >>> data = fedzip_codec.encode_tensor(labels, np.asarray([0.0, 2.5], np.float32))
    >>> len(data), fedzip_codec.decode_tensor(data)[0].tolist()
    (37, [0.0, 0.0, 2.5, 0.0, 0.0, 0.0, 0.0, 0.0])
  """
  check_method(method)
  labels, centroids = _checked(labels, centroids)
  clusters = centroids.size
  if method == "auto":
    sizes = {m: 8 * clusters + -(-b // 8) for m, b in payload_bits(labels, clusters).items()}
    method = min(sizes, key=sizes.__getitem__)
    if 4 * labels.size <= sizes[method]:
      method = "raw"
  if method == "raw":
    return encode_values(centroids[labels], dtype=dtype, pin_zero=pin_zero)
  numbers = centroids.tobytes() + np.bincount(labels, minlength=clusters).astype("<u4").tobytes()
  payload = encode_labels(labels, clusters, method)
  return _message(method, dtype, pin_zero, clusters, labels.size, numbers, payload)


def encode_values(values: np.ndarray, *, dtype: str = "float32", pin_zero: bool = False) -> bytes:
  """The message of a tensor as it is: 20 + 4 n bytes.

  Args:
    values: flat, finite, fewer than 2^31; float32 on the wire.
    dtype: of the tensor.
    pin_zero: as in `encode_tensor`.
  """
  values = np.asarray(values, "<f4")
  _check_finite(values, "values")
  return _message("raw", dtype, pin_zero, 0, values.size, b"", values.tobytes())


def decode_tensor(
  data: bytes, offset: int = 0, *, max_elements: int = 2**26
) -> tuple[np.ndarray, str, int]:
  """Reads the message at `offset`.

  Memory is at most 5 bytes per element announced, which `max_elements` bounds, and a small multiple
  of the bytes given.

  Returns:
    The elements, float32, flat; the dtype of the tensor; and the offset behind the message.

  Raises:
    FedZipError: the bytes are no such message: cut, changed, or of another version.
  """
  start, offset = offset, offset + _HEAD.size
  method, flags, dtype, clusters, size = _read_head(data, start)
  centroids = np.frombuffer(_take(data, offset, 4 * clusters, "centroids"), "<f4")
  offset += 4 * clusters
  counts = np.frombuffer(_take(data, offset, 4 * clusters, "counts"), "<u4").astype(np.int64)
  counts_at, offset = offset, offset + 4 * clusters
  (length,) = _U32.unpack(_take(data, offset, 4, "the payload's length"))
  offset += 4
  payload = _take(data, offset, length, "the payload")
  (checksum,) = _U32.unpack(_take(data, offset + length, 4, "the checksum"))
  if checksum != zlib.crc32(memoryview(data)[start : offset + length]):
    raise FedZipError("the checksum does not match", offset + length)
  _check_head(method, flags, dtype, clusters, start)
  if size > max_elements:
    raise FedZipError(f"expected at most n={max_elements} elements, got {size}", start + 8)
  if METHODS[method] == "raw":
    values = _read_values(payload, size, offset)
  else:
    if int(counts.sum()) != size:
      raise FedZipError(f"counts of labels must add up to {size}, got {counts.sum()}", counts_at)
    if not np.isfinite(centroids).all():
      raise FedZipError("centroids must be finite", start + _HEAD.size)
    values = centroids[decode_labels(payload, counts, METHODS[method], offset)]
  return values.astype(np.float32), DTYPES[dtype], offset + length + 4


def _checked(labels: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  labels, centroids = np.asarray(labels), np.asarray(centroids, "<f4")
  if labels.dtype != np.uint8 or labels.ndim != 1 or labels.size >= 2**31:
    raise ValueError(
      f"`labels` must be a flat uint8 array of fewer than 2**31 elements, got {labels.dtype} of"
      f" shape {labels.shape}."
    )
  if centroids.ndim != 1 or not 1 <= centroids.size <= 255:
    raise ValueError(f"`centroids` must be 1 to 255 numbers, got shape {centroids.shape}.")
  if labels.max(initial=0) >= centroids.size:
    raise ValueError(f"`labels` must be below {centroids.size}, got {labels.max()}.")
  _check_finite(centroids, "centroids")
  return labels, centroids


def _check_finite(values: np.ndarray, name: str) -> None:
  if not np.isfinite(values).all():
    raise ValueError(f"`{name}` must be finite, got NaN or Inf.")


def _message(method, dtype, pin_zero, clusters, size, numbers, payload) -> bytes:
  if dtype not in DTYPES:
    raise ValueError(f"`dtype` must be one of {DTYPES}, got {dtype!r}.")
  flags = _PIN_ZERO if pin_zero else 0
  head = _HEAD.pack(_MAGIC, METHODS.index(method), flags, DTYPES.index(dtype), clusters, size)
  message = head + numbers + _U32.pack(len(payload)) + payload
  return message + _U32.pack(zlib.crc32(message))


def _read_head(data: bytes, start: int) -> tuple[int, int, int, int, int]:
  if (magic := bytes(data[start : start + 4])) != _MAGIC:
    raise FedZipError(f"a tensor starts with {_MAGIC}, got {magic}", start)
  return _HEAD.unpack(_take(data, start, _HEAD.size, "the header"))[1:]


def _check_head(method: int, flags: int, dtype: int, clusters: int, start: int) -> None:
  if method >= len(METHODS):
    raise FedZipError(f"unknown method {method}", start + 4)
  if flags & ~_PIN_ZERO:
    raise FedZipError(f"unknown flags {flags:#x}", start + 5)
  if dtype >= len(DTYPES):
    raise FedZipError(f"unknown dtype {dtype}", start + 6)
  if (clusters > 0) != (METHODS[method] in LABEL_METHODS):
    raise FedZipError(f"K = {clusters} does not go with method {METHODS[method]}", start + 7)


def _take(data: bytes, offset: int, count: int, what: str) -> bytes:
  if offset + count > len(data):
    raise FedZipError(f"{what} needs {count} bytes, {max(len(data) - offset, 0)} are left", offset)
  return bytes(memoryview(data)[offset : offset + count])


def _read_values(payload: bytes, size: int, offset: int) -> np.ndarray:
  if len(payload) != 4 * size:
    raise FedZipError(f"{size} float32 need {4 * size} bytes, got {len(payload)}", offset)
  values = np.frombuffer(payload, "<f4")
  if not np.isfinite(values).all():
    raise FedZipError("values must be finite", offset)
  return values
