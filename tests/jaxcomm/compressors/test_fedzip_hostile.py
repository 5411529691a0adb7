"""Bytes from elsewhere: a clear error with an offset, no crash, no hang, no memory to speak of."""

import re
import resource
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from jaxcomm.compressors import FedZipLeaf, fedzip_codec
from jaxcomm.compressors._fedzip_bits import METHODS
from jaxcomm.compressors.fedzip_codec import FedZipError

CENTROIDS = np.asarray([-1.0, 0.0, 2.0], np.float32)


def make_message(rng, method, size=None):
  size = int(rng.integers(0, 60)) if size is None else size
  labels = rng.choice(3, size, p=[0.1, 0.8, 0.1]).astype(np.uint8)
  return fedzip_codec.encode_tensor(labels, CENTROIDS, method=method)


def mutate(rng, data, reseal):
  """Changes, cuts, removes, repeats or adds bytes; `reseal` makes the checksum fit again."""
  out = bytearray(data)
  kind = rng.integers(6)
  at = int(rng.integers(len(out)))
  if kind == 0:
    out[at] ^= 1 << int(rng.integers(8))
  elif kind == 1:
    out[at] = int(rng.choice([0, 1, 127, 255]))
  elif kind == 2:
    del out[at:]
  elif kind == 3:
    del out[at : at + int(rng.integers(1, 5))]
  elif kind == 4:
    out[at:at] = rng.bytes(int(rng.integers(1, 5)))
  else:
    word = at & ~3
    out[word : word + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**16, 2**31, 2**32 - 1])))
  if reseal and len(out) > 4:
    out[-4:] = struct.pack("<I", zlib.crc32(out[:-4]))
  return bytes(out)


def attack(count, seed):
  """(kinds of errors, messages that decode, slowest): half have a good checksum."""
  rng = np.random.default_rng(seed)
  kinds, decoded, slowest, data = {}, 0, 0.0, b""
  for i in range(count):
    if i % 8 == 0:
      data = make_message(rng, METHODS[i // 8 % 6])
    forged = i % 2 == 1
    changed = mutate(rng, data, reseal=forged)
    start = time.perf_counter()
    error, values = decode(changed)
    slowest = max(slowest, time.perf_counter() - start)
    if error is not None:
      assert f"at byte {error.offset}: " in str(error)
      assert 0 <= error.offset <= len(changed)
      kind = re.sub(r"[\d.]+|b['\"].*['\"]|0x\w+", "#", error.why)
      kinds[kind] = kinds.get(kind, 0) + 1
      continue
    # Bytes that are another message, or the same one.
    assert changed.startswith(data) or forged
    assert values.size <= 10_000
    assert np.isfinite(values).all()
    decoded += 1
  return kinds, decoded, slowest


def decode(data):
  """(error, values), one of them None; any other exception ends the test."""
  try:
    return None, fedzip_codec.decode_tensor(data, max_elements=10_000)[0]
  except FedZipError as e:
    return e, None


def check_attack(count, seed):
  kinds, decoded, slowest = attack(count, seed)
  assert slowest < 5
  assert sum(kinds.values()) + decoded == count
  assert sum(kinds.values()) > 0.8 * count
  assert len(kinds) >= 20, kinds  # every check had something to do


def test_mutated_messages_raise():
  tracemalloc.start()
  check_attack(2_000, 0)
  assert tracemalloc.get_traced_memory()[1] < 2_000_000
  tracemalloc.stop()


@pytest.mark.slow
def test_a_hundred_thousand_mutated_messages_raise():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  check_attack(100_000, 1)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def make_tree(rng):
  """A message of two tensors, and what they are."""
  labels = [rng.choice(3, size, p=[0.1, 0.8, 0.1]).astype(np.uint8) for size in (50, 7)]
  like = {"b": np.zeros(7, np.float32), "w": np.zeros((5, 10), np.float32)}
  tree = {
    name: FedZipLeaf(x.reshape(like[name].shape), CENTROIDS, "float32", True)
    for name, x in zip(like, labels[::-1])
  }
  return fedzip_codec.encode(tree), like


def test_mutated_trees_raise():
  """No change goes unseen: every byte is under a checksum, or one itself."""
  rng = np.random.default_rng(2)
  data, like = make_tree(rng)
  for length in range(len(data)):
    with pytest.raises(FedZipError, match="at byte"):
      fedzip_codec.decode(data[:length], like)
  for _ in range(1_000):
    changed = mutate(rng, data, reseal=False)
    if changed == data:
      continue
    with pytest.raises(FedZipError, match="at byte"):
      fedzip_codec.decode(changed, like)


def sealed(method, counts, payload, *, size=None, centroids=None, head=None):
  """A message with a good checksum and whatever content."""
  counts = np.asarray(counts, "<u4")
  centroids = np.zeros(counts.size, "<f4") if centroids is None else np.asarray(centroids, "<f4")
  size = int(counts.sum()) if size is None else size
  head = head or (b"FZ01", METHODS.index(method), 1, 0, counts.size)
  data = struct.pack("<4s4BI", *head, size) + centroids.tobytes() + counts.tobytes()
  data += struct.pack("<I", len(payload)) + payload
  return data + struct.pack("<I", zlib.crc32(data))


HUGE = 2**31 - 1
BAD = {
  "version": (sealed("raw", [], b"", head=(b"FZ02", 0, 0, 0, 0)), "starts with b'FZ01', got", 0),
  "method": (sealed("raw", [], b"", head=(b"FZ01", 6, 0, 0, 0)), "unknown method 6", 4),
  "flags": (sealed("raw", [], b"", head=(b"FZ01", 0, 2, 0, 0)), "unknown flags 0x2", 5),
  "dtype": (sealed("raw", [], b"", head=(b"FZ01", 0, 0, 3, 0)), "unknown dtype 3", 6),
  "no_labels": (sealed("dat", [], b""), "K = 0 does not go with method dat", 7),
  "raw_labels": (sealed("raw", [1], b"\0" * 4), "K = 1 does not go with method raw", 7),
  "too_many": (sealed("dat", [HUGE], b""), "at most n=67108864 elements, got 2147483647", 8),
  "nan": (sealed("elias_gamma", [2], b"", centroids=[np.nan]), "centroids must be finite", 12),
  "counts": (sealed("elias_gamma", [2, 3], b"", size=6), "add up to 6, got 5", 20),
  "raw_length": (sealed("raw", [], b"\0" * 5, size=1), "1 float32 need 4 bytes, got 5", 16),
  "raw_nan": (sealed("raw", [], b"\xff" * 4, size=1), "values must be finite", 16),
  "no_parameters": (sealed("huffman", [2, 3], b"\1"), "2 parameters needed, got 1 bytes", 32),
  "no_bits": (sealed("dat", [HUGE // 64, HUGE // 64], b"\0" * 9), "bits needed for these", 33),
  "lengths": (sealed("huffman", [2, 3], b"\1\2\0"), "not those of a prefix code", 34),
  "alone": (sealed("huffman", [0, 3], b"\1\1\0"), "not those of a prefix code", 34),
  "width": (sealed("position", [2, 8], b"\3\0"), "positions must be 4 bits wide, got 3", 33),
  "descend": (sealed("position", [2, 8], b"\4\x21"), "positions of label 0 do not ascend", 34),
  "beyond": (sealed("position", [1, 8], b"\4\xf0"), "position 15 is beyond the 9 elements", 33),
  "rice": (sealed("dat", [1, 3], b"\x20\x80"), "a Rice parameter is at most 31, got 32", 33),
  "overlap": (sealed("elias_gamma", [1, 1, 3], b"\xc0"), "do not occur as often", 40),
  "padding": (sealed("elias_gamma", [1, 3], b"\x81"), "the payload must end here", 32),
  "unary": (sealed("elias_gamma", [1, 3], b"\0"), "1 unary numbers needed, 0 left", 32),
  "long_gap": (sealed("elias_gamma", [1, 3], b"\0\0\0\0\1"), "a gap of 39", 37),
  "far_gap": (sealed("dat", [1, 3], b"\0\0\x80"), "a gap of more than 4 elements", 34),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name):
  data, message, offset = BAD[name]
  with pytest.raises(FedZipError, match=re.escape(message)) as info:
    fedzip_codec.decode_tensor(data)
  assert info.value.offset == offset


def test_announced_sizes_allocate_nothing():
  """A tiny message that announces 2^26 elements of several labels is refused at once."""
  half = 2**25
  tracemalloc.start()
  for method in METHODS[1:]:
    with pytest.raises(FedZipError):
      fedzip_codec.decode_tensor(sealed(method, [half, half], b"\1" * 20))
  assert tracemalloc.get_traced_memory()[1] < 200_000
  tracemalloc.stop()


def test_random_bytes():
  rng = np.random.default_rng(3)
  for size in range(200):
    data = rng.bytes(size)
    for garbage in (data, b"FZ01" + data, b"FZT1\1\0\0\0\0\0\0\0FZ01" + data):
      with pytest.raises(FedZipError, match="at byte"):
        fedzip_codec.decode(garbage)
      with pytest.raises(FedZipError, match="at byte"):
        fedzip_codec.decode_tensor(garbage)
