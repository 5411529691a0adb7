"""How small a tree became, beside the bound of information theory and the paper's counting."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxcomm.compressors._fedzip import RawLeaf, is_compressed
from jaxcomm.compressors.fedzip_codec._message import encode_tensor


class LeafReport(NamedTuple):
  """Sizes of one leaf, or of a whole tree.

  Attributes:
    size: elements.
    bytes: of the message, everything counted.
    ratio: 4 size / bytes.
    ratio_paper: 4 size / bytes as the paper's code counts them. That is no size of anything that
      can be decoded: see `paper_bits`.
    entropy_bytes: labels that are drawn independently need so many on average, given their counts;
      headers, centroids and parameters not included.
  """

  size: int
  bytes: int
  ratio: float
  ratio_paper: float
  entropy_bytes: float


def compression_report(tree: Any) -> dict[str, LeafReport]:
  """Sizes of every leaf of a compressed tree, by name, and of all of them under "total".

  Args:
    tree: from `fedzip_compress`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.compressors import fedzip_codec, fedzip_compress
    >>> delta = {"w": jax.random.normal(jax.random.key(0), (100, 1000))}
    >>> total = fedzip_codec.compression_report(fedzip_compress(delta, z=0.2))["total"]
    >>> 30 < total.ratio < 45 < total.ratio_paper
    True
  """
  rows, paper = {}, {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_compressed):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rows[name], paper[name] = _of_leaf(leaf)
  sizes = [
    sum(column) for column in zip(*((r.size, r.bytes, r.entropy_bytes) for r in rows.values()))
  ]
  size, total, entropy = sizes or (0, 0, 0.0)
  return rows | {"total": _report(size, total, sum(paper.values()), entropy)}


def paper_bits(labels: np.ndarray, num_clusters: int) -> dict[str, int]:
  """Bits as the paper's code counts them, for comparison only: none of these can be decoded.

  "huffman" gives the two most frequent of three labels one bit each, which no prefix code does;
  "position" takes 27 bits per address whatever the size; "dat" counts the significant bits of each
  gap and nothing that tells where one ends. Centroids are not counted.
  """
  counts = np.sort(np.bincount(labels, minlength=num_clusters))
  implicit = np.argmax(np.bincount(labels, minlength=num_clusters))
  gaps = [
    np.diff(np.flatnonzero(labels == k), prepend=-1) for k in range(num_clusters) if k != implicit
  ]
  return {
    "huffman": int(counts.sum() + counts[:-2].sum()),
    "position": 27 * int(counts[:-1].sum()),
    "dat": int(sum(np.frexp(g.astype(np.float64))[1].sum() for g in gaps)),
  }


def entropy_bits(counts: np.ndarray) -> float:
  """n times the entropy of the frequencies: the zeroth-order bound of labels and positions."""
  used = counts[counts > 0].astype(np.float64)
  return float((used * np.log2(used.sum() / used)).sum())


def _of_leaf(leaf: Any) -> tuple[LeafReport, float]:
  if isinstance(leaf, RawLeaf):
    size = leaf.values.size
    return _report(size, 20 + 4 * size, 4.0 * size, 4.0 * size), 4.0 * size
  labels, centroids = np.asarray(leaf.labels).reshape(-1), np.asarray(leaf.centroids)
  paper = min(paper_bits(labels, centroids.size).values()) / 8
  entropy = entropy_bits(np.bincount(labels, minlength=centroids.size)) / 8
  size = len(encode_tensor(labels, centroids))
  return _report(labels.size, size, paper, entropy), paper


def _report(size: int, total: int, paper: float, entropy: float) -> LeafReport:
  ratio_paper = 4 * size / paper if paper else math.inf
  return LeafReport(size, total, 4 * size / total if total else 1.0, ratio_paper, entropy)
