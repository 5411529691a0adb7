"""The encodings of labels: payload bytes of each, their exact sizes, and back."""

import numpy as np

from jaxcomm.compressors._fedzip_bits import MAX_RICE, METHODS
from jaxcomm.compressors.fedzip_codec import _huffman
from jaxcomm.compressors.fedzip_codec._bits import BitReader, BitWriter, FedZipError

LABEL_METHODS = METHODS[1:]  # "raw" holds numbers, not labels


def encode_labels(labels: np.ndarray, num_labels: int, method: str) -> bytes:
  """The payload of flat uint8 labels below `num_labels`; any method but "raw"."""
  counts = np.bincount(labels, minlength=num_labels)
  writer = BitWriter()
  parameters = _WRITERS[method](writer, labels, counts)
  return bytes(parameters) + writer.tobytes()


def decode_labels(payload: bytes, counts: np.ndarray, method: str, offset: int) -> np.ndarray:
  """The labels, uint8[counts.sum()].

  What is allocated, but for the labels themselves, is a small multiple of the payload.

  Args:
    payload: of the message.
    counts: int64[K], how often each label occurs.
    method: any but "raw".
    offset: of the payload in the message, for errors.

  Raises:
    FedZipError: the payload is not what `encode_labels` makes of labels with these counts.
  """
  num = num_parameters(method, counts.size)
  if len(payload) < num:
    raise FedZipError(f"{num} parameters needed, got {len(payload)} bytes", offset)
  _check_enough_bits(len(payload) - num, counts, method, offset + num)
  reader = BitReader(payload[num:], offset + num)
  labels = _READERS[method](reader, payload[:num], counts)
  reader.finish()
  if not np.array_equal(np.bincount(labels, minlength=counts.size), counts):
    raise FedZipError("labels do not occur as often as the header says", offset)
  return labels


def payload_bits(labels: np.ndarray, num_labels: int) -> dict[str, int]:
  """Bits of every payload before the last byte is filled: `encoded_bits` on the host."""
  counts = np.bincount(labels, minlength=num_labels)
  implicit, rest = _split(counts)
  lists = [_gaps(np.flatnonzero(labels == k)) for k in _others(counts)]
  rice = sum(_best_rice(gaps)[1] for gaps in lists)
  merged = _best_rice(_gaps(np.flatnonzero(labels != implicit)))[1] if labels.size else 0
  bits = {
    "huffman": _huffman_bits(counts),
    "position": _width(labels.size) * int(rest.sum()),
    "dat": rice,
    "merged": merged + _huffman_bits(rest),
    "elias_gamma": sum(int((2 * _log2(gaps) + 1).sum()) for gaps in lists),
  }
  return {method: b + 8 * num_parameters(method, num_labels) for method, b in bits.items()}


def num_parameters(method: str, num_labels: int) -> int:
  """Bytes before the bits of a payload."""
  return {
    "huffman": num_labels,
    "position": 1,
    "dat": num_labels - 1,
    "merged": num_labels + 1,
    "elias_gamma": 0,
  }[method]


def _check_enough_bits(size: int, counts: np.ndarray, method: str, offset: int) -> None:
  """Before anything is allocated: every label but the implicit one takes at least a bit."""
  _, rest = _split(counts)
  total, others = int(counts.sum()), int(rest.sum())
  if method == "position":
    others *= _width(total)
  elif method == "huffman":
    others = total if others else 0
  if others > 8 * size:
    raise FedZipError(f"at least {others} bits needed for these counts, got {8 * size}", offset)


# -- huffman


def _write_huffman(writer: BitWriter, labels: np.ndarray, counts: np.ndarray):
  lengths = _huffman.code_lengths(counts)
  _huffman.write(writer, labels, lengths)
  return lengths


def _read_huffman(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  return _read_words(reader, parameters, counts)


def _read_words(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  lengths, occurs = np.frombuffer(parameters, np.uint8), counts > 0
  expected = occurs if occurs.sum() > 1 else np.zeros_like(occurs)
  if not np.array_equal(lengths > 0, expected) or not _huffman.is_complete(lengths):
    raise reader.error("the code lengths are not those of a prefix code of these labels")
  if expected.any():
    return _huffman.read(reader, int(counts.sum()), lengths)
  return np.full(int(counts.sum()), np.argmax(counts), np.uint8)


def _huffman_bits(counts: np.ndarray) -> int:
  return int(counts @ _huffman.code_lengths(counts).astype(np.int64))


# -- position


def _write_position(writer: BitWriter, labels: np.ndarray, counts: np.ndarray):
  for k in _others(counts):
    writer.fixed(np.flatnonzero(labels == k), _width(labels.size))
  return [_width(labels.size)]


def _read_position(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  width = _width(int(counts.sum()))
  if parameters[0] != width:
    raise reader.error(f"positions must be {width} bits wide, got {parameters[0]}")
  labels = _implicit_labels(counts)
  for k in _others(counts):
    positions = reader.fixed(int(counts[k]), width)
    if np.any(np.diff(positions) <= 0):
      raise reader.error(f"positions of label {k} do not ascend")
    _put(reader, labels, positions, k)
  return labels


# -- lists of gaps


def _write_dat(writer: BitWriter, labels: np.ndarray, counts: np.ndarray):
  lists = [_gaps(np.flatnonzero(labels == k)) for k in _others(counts)]
  return [_write_rice(writer, gaps) for gaps in lists]


def _read_dat(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  labels = _implicit_labels(counts)
  for k, r in zip(_others(counts), parameters):
    _put(reader, labels, _read_rice(reader, int(counts[k]), r, labels.size), k)
  return labels


def _write_merged(writer: BitWriter, labels: np.ndarray, counts: np.ndarray):
  implicit, rest = _split(counts)
  positions = np.flatnonzero(labels != implicit)
  r = _write_rice(writer, _gaps(positions))
  return [r, *_write_huffman(writer, labels[positions], rest)]


def _read_merged(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  _, rest = _split(counts)
  labels = _implicit_labels(counts)
  positions = _read_rice(reader, int(rest.sum()), parameters[0], labels.size)
  _put(reader, labels, positions, _read_words(reader, parameters[1:], rest))
  return labels


def _write_elias_gamma(writer: BitWriter, labels: np.ndarray, counts: np.ndarray):
  for k in _others(counts):
    gaps = _gaps(np.flatnonzero(labels == k))
    writer.unary(_log2(gaps))
    writer.low_bits(gaps, _log2(gaps))
  return []


def _read_elias_gamma(reader: BitReader, parameters: bytes, counts: np.ndarray) -> np.ndarray:
  del parameters
  labels = _implicit_labels(counts)
  for k in _others(counts):
    widths = reader.unary(int(counts[k]))
    if widths.max(initial=0) > MAX_RICE:
      raise reader.error(f"a gap of {widths.max()} + 1 bits")
    gaps = reader.low_bits(widths) + (np.int64(1) << widths)
    _put(reader, labels, np.cumsum(gaps) - 1, k)
  return labels


def _write_rice(writer: BitWriter, gaps: np.ndarray) -> int:
  """Writes gaps in the Rice code that suits them best, and returns its parameter."""
  r, _ = _best_rice(gaps)
  writer.unary((gaps - 1) >> r)
  writer.fixed(gaps - 1, r)
  return r


def _read_rice(reader: BitReader, count: int, r: int, size: int) -> np.ndarray:
  """Positions, int64[count]."""
  if r > MAX_RICE:
    raise reader.error(f"a Rice parameter is at most {MAX_RICE}, got {r}")
  quotients = reader.unary(count)
  if quotients.max(initial=0) > size >> r:
    raise reader.error(f"a gap of more than {size} elements")
  return np.cumsum((quotients << r) + reader.fixed(count, r) + 1) - 1


def _best_rice(gaps: np.ndarray) -> tuple[int, int]:
  """The parameter in 0..31 with the fewest bits, the least of several, and the bits."""
  sizes = [int(((gaps - 1) >> r).sum()) + gaps.size * (r + 1) for r in range(MAX_RICE + 1)]
  best = int(np.argmin(sizes))
  return best, sizes[best]


# -- what they share


def _split(counts: np.ndarray) -> tuple[int, np.ndarray]:
  """The implicit label (the lowest of the most frequent), and the counts without it."""
  implicit = int(np.argmax(counts))
  rest = counts.copy()
  rest[implicit] = 0
  return implicit, rest


def _others(counts: np.ndarray) -> list[int]:
  implicit = int(np.argmax(counts))
  return [k for k in range(counts.size) if k != implicit]


def _implicit_labels(counts: np.ndarray) -> np.ndarray:
  return np.full(int(counts.sum()), np.argmax(counts), np.uint8)


def _put(reader: BitReader, labels: np.ndarray, positions: np.ndarray, values) -> None:
  """Writes values at ascending positions."""
  if positions.size and positions[-1] >= labels.size:
    raise reader.error(f"position {positions[-1]} is beyond the {labels.size} elements")
  labels[positions] = values


def _gaps(positions: np.ndarray) -> np.ndarray:
  return np.diff(positions, prepend=-1)


def _log2(gaps: np.ndarray) -> np.ndarray:
  """floor(log2 gap), exact below 2^53."""
  return np.frexp(gaps.astype(np.float64))[1].astype(np.int64) - 1


def _width(size: int) -> int:
  """ceil(log2 size)."""
  return max(size - 1, 0).bit_length()


_WRITERS = {
  "huffman": _write_huffman,
  "position": _write_position,
  "dat": _write_dat,
  "merged": _write_merged,
  "elias_gamma": _write_elias_gamma,
}
_READERS = {
  "huffman": _read_huffman,
  "position": _read_position,
  "dat": _read_dat,
  "merged": _read_merged,
  "elias_gamma": _read_elias_gamma,
}
