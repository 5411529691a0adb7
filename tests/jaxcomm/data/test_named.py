"""What the pinned releases hold. Skipped where a set was not fetched: no test downloads."""

import collections
import warnings

import numpy as np
import pytest

from jaxcomm.data import fetch, load_corpus, load_graph, load_images
from jaxcomm.data._cache import cache_root
from jaxcomm.data.documents import SPLITS

CACHE = cache_root(None)  # of the whole test run, before a test sets one of its own


def need(name):
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return fetch(name, cache_dir=CACHE, offline=True)
  except FileNotFoundError:
    pytest.skip(f"{name} is not in {CACHE}: python -m jaxcomm.data fetch {name}")


def test_sympy_code_is_the_installed_sympy():
  need("sympy-code")
  got, want = load_corpus("sympy-code", cache_dir=CACHE), load_corpus("sympy")
  assert len(got.documents) == 1453
  assert got.documents == want.documents
  assert (got.version, got.licence) == (want.version, want.licence)


def test_english_docs():
  need("english-docs")
  corpus = load_corpus("english-docs", cache_dir=CACHE)
  size = collections.Counter()
  for document in corpus.documents:
    size[document.name.split("/")[0]] += len(document.text.encode())
  assert 10e6 < size["python"] < 12e6  # these two move with security updates
  assert 6e6 < size["postgresql"] < 8e6
  assert size["wordnet"] > 8.85e6  # glosses, and the words that they explain
  long = [  # no long paragraph is in two splits
    {p for d in corpus.split(s) for p in d.text.split("\n\n") if len(p) >= 40} for s in SPLITS
  ]
  assert sum(map(len, long)) == len(set.union(*long))
  assert min(sum(len(d.text) for d in corpus.split(s)) for s in SPLITS) > 200_000
  assert not any("<p>" in d.text for d in corpus.documents if d.name.startswith("postgresql/a"))


@pytest.mark.slow
def test_fashion_mnist_counts():
  need("fashion-mnist")
  parts = {s: load_images("fashion-mnist", split=s, cache_dir=CACHE) for s in SPLITS}
  assert {s: p.images.shape for s, p in parts.items()} == {
    "train": (55000, 28, 28, 1),
    "validation": (5000, 28, 28, 1),
    "test": (10000, 28, 28, 1),
  }
  assert np.bincount(parts["test"].labels).tolist() == [1000] * 10
  labels = np.concatenate([parts["train"].labels, parts["validation"].labels])
  assert np.bincount(labels).tolist() == [6000] * 10
  images = np.concatenate([parts["train"].images, parts["validation"].images])
  assert (round(images.mean() / 255, 3), round(images.std() / 255, 3)) == (0.286, 0.353)


@pytest.mark.slow
def test_wordnet_counts():
  """183,798 distinct pairs point one to the other, nine of which are a synset and itself."""
  need("wordnet")
  graph = load_graph(cache_dir=CACHE)
  num_nodes, num_edges = len(graph.y), len(graph.senders) // 2
  assert (num_nodes, num_edges) == (117_659, 183_789)
  assert (len(np.unique(graph.y)), np.bincount(graph.y).max()) == (45, 14_435)
  degree = np.bincount(graph.receivers, minlength=num_nodes)
  assert degree.sum() == 2 * num_edges
  edges = set(zip(graph.senders.tolist(), graph.receivers.tolist()))
  assert len(edges) == 2 * num_edges  # none twice
  assert all((b, a) in edges and a != b for a, b in edges)
  share = {s: m.mean() for s, m in graph.masks.items()}
  assert 0.59 < share["train"] < 0.61
  assert 0.19 < share["test"] < 0.21
  np.testing.assert_allclose(np.linalg.norm(graph.x, axis=-1), 1, rtol=1e-5)
