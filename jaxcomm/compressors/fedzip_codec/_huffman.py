"""Canonical Huffman codes, written plane by plane: all first bits, all second bits, and so on."""

import heapq

import numpy as np

from jaxcomm.compressors.fedzip_codec._bits import BitReader, BitWriter

# No word of a Huffman code of n symbols is longer than log(n) / log(1.618): 46 for 2^32 symbols.
MAX_LENGTH = 48


def code_lengths(counts: np.ndarray) -> np.ndarray:
  """uint8[K]: lengths of an optimal prefix code; 0 for what does not occur or is alone."""
  lengths = np.zeros(counts.size, np.uint8)
  # Of equal weights the shallower tree first: the longest word is then as short as can be.
  heap = [(int(c), 0, i, [i]) for i, c in enumerate(counts) if c]
  heapq.heapify(heap)
  while len(heap) > 1:
    one, other = heapq.heappop(heap), heapq.heappop(heap)
    members = one[3] + other[3]
    lengths[members] += 1
    heapq.heappush(heap, (one[0] + other[0], max(one[1], other[1]) + 1, members[0], members))
  return lengths


def is_complete(lengths: np.ndarray) -> bool:
  """Whether words of these lengths form a code without gaps (Kraft's sum is 1); no words do."""
  used = [int(n) for n in lengths if n]
  if not used:
    return True
  return max(used) <= MAX_LENGTH and sum(2 ** (MAX_LENGTH - n) for n in used) == 2**MAX_LENGTH


def write(writer: BitWriter, labels: np.ndarray, lengths: np.ndarray) -> None:
  """Appends the words of `labels` in the canonical code of `lengths`."""
  order, first, _ = _canonical(lengths)
  words = np.zeros(lengths.size, np.int64)
  rank = np.arange(order.size) - np.searchsorted(lengths[order], lengths[order])
  words[order] = first[lengths[order]] + rank
  for depth in range(int(lengths.max(initial=0))):
    labels = labels[lengths[labels] > depth]
    writer.bits(words[labels] >> (lengths[labels].astype(np.int64) - 1 - depth) & 1)


def read(reader: BitReader, count: int, lengths: np.ndarray) -> np.ndarray:
  """uint8[count]: what `write` wrote; `lengths` must be complete."""
  order, first, numbers = _canonical(lengths)
  if not lengths.any():  # at most one label, which takes no bits
    return np.zeros(count, np.uint8)
  labels = np.zeros(count, np.uint8)
  left, words, before = np.arange(count), np.zeros(count, np.int64), 0
  for length in range(1, int(lengths.max()) + 1):
    words = words << 1 | reader.bits(left.size)
    rank = words - first[length]
    done = rank < numbers[length]  # words of this length come before prefixes of longer ones
    labels[left[done]] = order[before + rank[done]]
    left, words, before = left[~done], words[~done], before + numbers[length]
  return labels


def _canonical(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Symbols by length and value; the first word and the number of words of each length."""
  numbers = np.bincount(lengths, minlength=MAX_LENGTH + 1)
  numbers[0] = 0
  first = np.zeros(numbers.size, np.int64)
  for length in range(1, numbers.size):
    first[length] = (first[length - 1] + numbers[length - 1]) << 1
  order = np.argsort(lengths, kind="stable")
  return order[lengths[order] > 0], first, numbers
