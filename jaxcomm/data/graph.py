"""Graphs for node classification: the synsets of WordNet 3.0."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxcomm.data._extract import WORDNET_FILES
from jaxcomm.data._fetch import fetch, read_source
from jaxcomm.data.documents import SPLITS

_DERIVATION = "+"  # pointer between words of different parts of speech


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
  """An undirected graph with features and labels on its nodes: N nodes, E edges, F features.

  Attributes:
    senders: int32[2 * E], in `[0, N)`; every edge stands in both directions, sorted by receiver.
    receivers: int32[2 * E].
    x: float32[N, F], rows of length 1.
    y: int32[N], the labels.
    masks: bool[N] for each of "train", "validation" and "test": 60, 20 and 20 % of the nodes.
    source: name of the set.
    licence: of the data.
  """

  senders: np.ndarray
  receivers: np.ndarray
  x: np.ndarray
  y: np.ndarray
  masks: dict[str, np.ndarray]
  source: str
  licence: str

  def __post_init__(self):
    ends = np.concatenate([self.senders, self.receivers])
    if ends.size and not 0 <= ends.min() <= ends.max() < len(self.y):
      raise ValueError(
        f"`senders` and `receivers` must be in [0, {len(self.y)}), got ids from {ends.min()} to"
        f" {ends.max()}."
      )


@dataclasses.dataclass(frozen=True)
class _Synset:
  key: str  # part of speech and offset
  label: int  # its lexicographer file
  pointers: tuple[tuple[str, str], ...]  # symbol, and key of the synset pointed to
  gloss: str


def load_graph(
  source: str = "wordnet",
  *,
  num_features: int = 256,
  derivations: bool = True,
  cache_dir: str | os.PathLike[str] | None = None,
) -> Graph:
  """The synsets of WordNet, fetched before by `python -m jaxcomm.data fetch wordnet`.

  Version 3.0 has 117,659 nodes and 183,789 edges: the pointers between synsets, without direction,
  repetition and the nine from a synset to itself. The label is the lexicographer file (45 of them:
  noun.artifact, verb.motion, ...), which agrees with the neighbours' by construction; without
  derivations the task is harder. Features are a hashed bag of the words in the gloss. A hash of a
  node's key gives its split.

  Args:
    source: "wordnet" (version 3.0) or "wordnet-3.1".
    num_features: F, the length of the bag.
    derivations: False drops the pointers between words of different parts of speech.
    cache_dir: where `fetch` put the set; default as there.

  Raises:
    ValueError: `source` is unknown, or `num_features` is below 1.
    FileNotFoundError: the set was not fetched.
  """
  if source not in ("wordnet", "wordnet-3.1"):
    raise ValueError(f"`source` must be one of wordnet, wordnet-3.1, got {source!r}.")
  if num_features < 1:
    raise ValueError(f"`num_features` must be at least 1, got {num_features}.")
  folder = fetch(source, cache_dir=cache_dir, offline=True)
  synsets = [s for name in WORDNET_FILES for s in _read_synsets(folder / name)]
  senders, receivers = _edges(synsets, derivations)
  splits = np.array([_split_of(s.key) for s in synsets])
  return Graph(
    senders,
    receivers,
    _bags([s.gloss for s in synsets], num_features),
    np.array([s.label for s in synsets], np.int32),
    {split: splits == split for split in SPLITS},
    source,
    read_source(folder)["licence"],
  )


def _read_synsets(path: Path) -> Iterator[_Synset]:
  """Lines `offset lex_filenum ss_type w_cnt word lex_id ... p_cnt pointer ... | gloss`: wndb(5)."""
  for line in path.read_text(encoding="ascii").splitlines():
    if line[0] == " ":  # the licence
      continue
    fields, _, gloss = line.partition(" | ")
    parts = fields.split(" ")
    at = 4 + 2 * int(parts[3], 16)
    pointers = tuple(
      (parts[i], _key(parts[i + 2], parts[i + 1]))
      for i in range(at + 1, at + 1 + 4 * int(parts[at]), 4)
    )
    yield _Synset(_key(parts[2], parts[0]), int(parts[1]), pointers, gloss)


def _key(part_of_speech: str, offset: str) -> str:
  return part_of_speech.replace("s", "a") + offset  # satellites lie among the adjectives


def _edges(synsets: list[_Synset], derivations: bool) -> tuple[np.ndarray, np.ndarray]:
  """Both directions of every pair of synsets that points one to the other, once."""
  index = {s.key: i for i, s in enumerate(synsets)}
  pairs = {
    (min(i, j), max(i, j))
    for i, s in enumerate(synsets)
    for symbol, key in s.pointers
    if (derivations or symbol != _DERIVATION) and (j := index.get(key, i)) != i
  }
  pair = np.array(sorted(pairs), np.int32)
  both = np.concatenate([pair, pair[:, ::-1]])
  both = both[np.lexsort((both[:, 0], both[:, 1]))]
  return both[:, 0].copy(), both[:, 1].copy()


def _bags(texts: list[str], num_features: int) -> np.ndarray:
  """float32[N, F]: counts of words by hash, rows scaled to length 1 (or 0 without a word)."""
  place = functools.cache(lambda word: zlib.crc32(word.encode()) % num_features)
  bags = np.zeros((len(texts), num_features), np.float32)
  for row, text in zip(bags, texts):
    for word in re.findall(r"[a-z]+", text.lower()):
      row[place(word)] += 1
  length = np.linalg.norm(bags, axis=-1, keepdims=True)
  return bags / np.where(length > 0, length, 1)


def _split_of(key: str) -> str:
  bucket = hashlib.sha256(key.encode()).digest()[0] * 100 // 256
  return "train" if bucket < 60 else "validation" if bucket < 80 else "test"
