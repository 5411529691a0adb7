"""Parts of corpora: disjoint, in the splits of the whole, and the pinned releases' own."""

import warnings

import pytest

from jaxcomm.data import Document, fetch, load_corpus
from jaxcomm.data._cache import cache_root
from jaxcomm.data._domains import docstrings_of, without_docstrings

CACHE = cache_root(None)  # of the whole test run, before a test sets one of its own
SOURCE = '''"""Module."""

def f(x):
  r\'\'\'Says "hello".

    >>> f(1)
  \'\'\'
  text = """
not a docstring
"""
  return text  # 'quotes"
'''


def test_docstrings_and_what_is_left():
  document = Document("a.py", SOURCE, "train")
  assert docstrings_of(document) == 'Module.\n\nSays "hello".\n\n>>> f(1)\n'
  assert without_docstrings(document) == (
    '\ndef f(x):\n  text = """\nnot a docstring\n"""\n  return text  # \'quotes"\n'
  )
  test = Document("a/tests/test_a.py", SOURCE, "train")
  assert docstrings_of(test) == without_docstrings(test) == ""


@pytest.mark.slow
def test_parts_of_sympy_keep_its_splits():
  whole = {d.name: d for d in load_corpus("sympy").documents}
  sizes, hashes = {}, {}
  for name in ("sympy-tests", "sympy-modules", "sympy-docstrings"):
    part = load_corpus(name)
    assert (part.source, part.version, part.licence) == (name, "1.14.0", "BSD-3-Clause")
    for document in part.documents[::50]:
      assert document.split == whole[document.name].split
    sizes[name] = round(sum(len(d.text.encode()) for d in part.documents) / 1e6, 1)
    hashes[name] = part.sha256()[:12]
  assert sizes == {"sympy-tests": 10.0, "sympy-modules": 10.3, "sympy-docstrings": 5.0}
  assert hashes == {
    "sympy-tests": "de6bd6438430",
    "sympy-modules": "5679b51b743b",
    "sympy-docstrings": "a3bb8d85c350",
  }


@pytest.mark.slow
def test_docstrings_of_scipy():
  part = load_corpus("scipy-docstrings")
  assert not [d.name for d in part.documents if "/tests/" in d.name]
  assert sum(len(d.text.encode()) for d in part.documents) > 4e6
  assert part.licence == "BSD-3-Clause"


def test_parts_of_english_docs():
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      fetch("english-docs", cache_dir=CACHE, offline=True)
      whole = load_corpus("english-docs", cache_dir=CACHE)
      names = ("python-manual", "postgresql-manual", "wordnet-glosses")
      parts = [load_corpus(name, cache_dir=CACHE) for name in names]
  except FileNotFoundError:
    pytest.skip(f"english-docs is not in {CACHE}: python -m jaxcomm.data fetch english-docs")
  together = [d for p in parts for d in p.documents]
  assert sorted(together, key=lambda d: d.name) == sorted(whole.documents, key=lambda d: d.name)
  assert [p.licence for p in parts] == ["PSF-2.0", "PostgreSQL", "WordNet-3.0"]
