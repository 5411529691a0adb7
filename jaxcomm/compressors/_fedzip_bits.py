"""How long each encoding of FedZip will be, computed inside jit without making any bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors._fedzip import MAX_SIZE, RawLeaf, is_compressed

METHODS = ("raw", "huffman", "position", "dat", "merged", "elias_gamma")
"""Encodings of labels, in the order of their numbers on the wire."""

MAX_RICE = 31
"""Largest parameter of a Rice code."""

TREE_HEADER_BYTES = 12
"""Of `fedzip_codec.encode`: magic, number of leaves, checksum of their names and shapes."""

_NONE = np.uint32(0xFFFFFFFF)  # weight of a symbol that does not occur


def encoded_bits(labels: jax.Array, num_clusters: int, method: str = "auto") -> jax.Array:
  """Bits of the payload that `fedzip_codec` makes of `labels`, before the last byte is filled.

  With n elements, n_max of the most frequent (implicit) label, and gaps g between the positions of
  a label (the first one counted from -1):

  - raw: 32 n
  - huffman: 8 K + the cost of an optimal prefix code, 0 for one label
  - position: 8 + ceil(log2 n) (n - n_max)
  - dat: 8 (K - 1) + for every other label the least over r of sum of floor((g - 1) / 2^r) + 1 + r
  - merged: 8 (K + 1) + one such sum over all other labels + a Huffman code of these labels
  - elias_gamma: sum of 2 floor(log2 g) + 1

  Args:
    labels: uint8, any shape, at most 2^26 elements, all below `num_clusters`.
    num_clusters: K, static.
    method: one of `METHODS`, or "auto": that with the shortest message.

  Returns:
    uint32[].

  Raises:
    ValueError: unknown `method`, or too many elements.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import encoded_bits
    >>> labels = jnp.asarray([1, 0, 0, 0, 2, 0, 0, 0], jnp.uint8)
    >>> {m: int(encoded_bits(labels, 3, m)) for m in ("huffman", "position", "elias_gamma")}
    {'huffman': 34, 'position': 14, 'elias_gamma': 6}
  """
  check_method(method)
  bits = all_encoded_bits(labels, num_clusters)
  if method != "auto":
    return bits[method]
  sizes = [message_bytes(bits[m], 0 if m == "raw" else num_clusters) for m in METHODS]
  return jnp.stack([bits[m] for m in METHODS])[jnp.argmin(jnp.stack(sizes))]


def all_encoded_bits(labels: jax.Array, num_clusters: int) -> dict[str, jax.Array]:
  """`encoded_bits` of every method."""
  flat, num = labels.reshape(-1), labels.size
  if num > MAX_SIZE:
    raise ValueError(f"`labels` must have at most 2**26 elements, got {num}.")
  counts = jnp.sum(flat[None] == jnp.arange(num_clusters)[:, None], axis=1, dtype=jnp.uint32)
  implicit = jnp.argmax(counts)
  others = counts.at[implicit].set(0)

  def of_label(label):
    return _gap_bits((flat == label) & (label != implicit))

  rice, gamma = jax.lax.map(of_label, jnp.arange(num_clusters))
  merged, _ = _gap_bits(flat != implicit)
  width = max(num - 1, 0).bit_length()
  bits = {
    "raw": 32 * num,
    "huffman": 8 * num_clusters + _huffman_bits(counts),
    "position": 8 + width * jnp.sum(others, dtype=jnp.uint32),
    "dat": 8 * (num_clusters - 1) + jnp.sum(rice, dtype=jnp.uint32),
    "merged": 8 * (num_clusters + 1) + merged + _huffman_bits(others),
    "elias_gamma": jnp.sum(gamma, dtype=jnp.uint32),
  }
  return {method: jnp.asarray(b, jnp.uint32) for method, b in bits.items()}


def message_bytes(bits: Any, num_clusters: int) -> Any:
  """Bytes of a whole message with a payload of `bits`: header, centroids, counts and checksum."""
  return 20 + 8 * num_clusters + (bits + 7) // 8


def fedzip_bytes(tree: Any, method: str = "auto") -> jax.Array:
  """uint32[]: bytes of `fedzip_codec.encode(tree, method)`, inside jit: what a client uploads.

  Args:
    tree: from `fedzip_compress`.
    method: as in `encoded_bits`.
  """
  total = jnp.uint32(TREE_HEADER_BYTES)
  for leaf in jax.tree.leaves(tree, is_leaf=is_compressed):
    if isinstance(leaf, RawLeaf) or method == "raw":
      size = (leaf.values if isinstance(leaf, RawLeaf) else leaf.labels).size
      total += jnp.uint32(message_bytes(32 * size, 0))
      continue
    clusters = leaf.centroids.size
    bits = all_encoded_bits(leaf.labels, clusters)
    chosen = METHODS if method == "auto" else (check_method(method),)
    sizes = [message_bytes(bits[m], 0 if m == "raw" else clusters) for m in chosen]
    total += jnp.min(jnp.stack(sizes))
  return total


def check_method(method: str) -> str:
  """Raises ValueError unless `method` is known."""
  if method not in (*METHODS, "auto"):
    raise ValueError(f"`method` must be 'auto' or one of {METHODS}, got {method!r}.")
  return method


def _gap_bits(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(Rice, Elias gamma): bits of the gaps between the True of a flat mask."""
  if mask.size == 0:
    return jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32)
  position = jnp.arange(mask.size, dtype=jnp.int32)
  last = jax.lax.cummax(jnp.where(mask, position, -1))
  before = jnp.concatenate([jnp.full(1, -1, jnp.int32), last[:-1]])
  skipped = (position - before - 1).astype(jnp.uint32)  # gap - 1, where the mask is True

  def rice(r):
    return jnp.sum(jnp.where(mask, (skipped >> r) + 1 + r, 0), dtype=jnp.uint32)

  exponent = 31 - jax.lax.clz(skipped + 1)
  gamma = jnp.sum(jnp.where(mask, 2 * exponent + 1, 0), dtype=jnp.uint32)
  return jnp.min(jax.vmap(rice)(jnp.arange(MAX_RICE + 1, dtype=jnp.uint32))), gamma


def _huffman_bits(counts: jax.Array) -> jax.Array:
  """Cost of an optimal prefix code: the sum of all weights that merging the least two makes."""

  def merge(weights, _):
    first = jnp.argmin(weights)
    rest = weights.at[first].set(_NONE)
    second = jnp.argmin(rest)
    done = rest[second] == _NONE
    both = jnp.where(done, jnp.uint32(0), weights[first] + rest[second])
    return jnp.where(done, weights, rest.at[second].set(both)), both

  weights = jnp.where(counts > 0, counts, _NONE)
  _, made = jax.lax.scan(merge, weights, length=counts.size - 1)
  return jnp.sum(made, dtype=jnp.uint32)
