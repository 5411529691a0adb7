"""The graph of WordNet, on five synsets written by hand."""

import json
import zlib

import numpy as np
import pytest

from jaxcomm.data import Graph, load_graph

# offset, lexicographer file, part of speech, words, pointers | gloss
SYNSETS = {
  "data.noun": [
    "00000001 03 n 01 entity 0 002 ~ 00000002 n 0000 + 00000001 v 0101 | that which is",
    "00000002 05 n 02 cat 0 true_cat 1 002 @ 00000001 n 0000 @ 00000002 n 0000 | a cat, a CAT ",
  ],
  "data.verb": ["00000001 29 v 01 be 0 001 + 00000001 n 0101 01 + 08 00 | is  "],
  "data.adj": [
    "00000001 00 a 01 alive 0 001 & 00000002 s 0000 | living",
    "00000002 00 s 01 live(p) 0 002 & 00000001 a 0000 + 00000009 n 0000 | 0 1 2",
  ],
  "data.adv": [],
}


@pytest.fixture
def cache(tmp_path):
  """A cache as `fetch` leaves it."""
  folder = tmp_path / "fetch" / "wordnet-3.0"
  folder.mkdir(parents=True)
  for name, lines in SYNSETS.items():
    (folder / name).write_text("\n".join(["  1 the licence", *lines]) + "\n")
  meta = {"files": {}, "changed": [], "licence": "WordNet-3.0", "version": "3.0"}
  (folder / "meta.json").write_text(json.dumps(meta))
  return tmp_path


def edges(graph):
  return list(zip(graph.senders.tolist(), graph.receivers.tolist()))


def test_nodes_edges_and_features(cache):
  """In the order of adj (alive, live), noun (entity, cat), verb (be); no cat - cat, no 9 n."""
  graph = load_graph(num_features=64, cache_dir=cache)
  assert graph.y.tolist() == [0, 0, 3, 5, 29]
  assert edges(graph) == [(1, 0), (0, 1), (3, 2), (4, 2), (2, 3), (2, 4)]
  assert graph.licence == "WordNet-3.0"
  bag = np.zeros(64)
  for word, count in {"a": 2, "cat": 2}.items():
    bag[zlib.crc32(word.encode()) % 64] += count
  np.testing.assert_allclose(graph.x[3], bag / np.linalg.norm(bag), rtol=1e-6)
  np.testing.assert_array_equal(graph.x[1], 0)  # a gloss without words
  np.testing.assert_array_equal(sum(m.astype(int) for m in graph.masks.values()), 1)


def test_without_derivations(cache):
  assert edges(load_graph(derivations=False, cache_dir=cache)) == [(1, 0), (0, 1), (3, 2), (2, 3)]


def test_what_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match=r"`source` must be one of wordnet, wordnet-3\.1, got 'cora'"
  ):
    load_graph("cora")
  with pytest.raises(ValueError, match="`num_features` must be at least 1, got 0"):
    load_graph(num_features=0)
  with pytest.raises(FileNotFoundError, match=r"-m jaxcomm\.data fetch wordnet`"):
    load_graph(cache_dir=tmp_path)
  ends, x, y = np.array([0, 2]), np.zeros((2, 1)), np.zeros(2)
  with pytest.raises(ValueError, match=r"`senders` and `receivers` must be in \[0, 2\), .* 0 to 2"):
    Graph(ends, ends[::-1], x, y, {}, "mine", "unknown")
