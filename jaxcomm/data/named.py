"""Text corpora that have a name: pinned, with a known licence."""

import dataclasses
import importlib.metadata
import json
import os
import warnings
from pathlib import Path

from jaxcomm.data._domains import docstrings_of, is_test, part, without_docstrings
from jaxcomm.data._fetch import fetch, read_source
from jaxcomm.data._files import decode_text
from jaxcomm.data.documents import Corpus, Document, module_key, split_of

_SYMPY_VERSION = "1.14.0"
_SYMPY_SHA256 = "86f56d84a901c8636f9a7fae78d089e818cac93c3f5f7c1b8727e68d17d7f841"
_SYMPY_HINT = 'pip install "jaxcomm[train]"'

CacheDir = str | os.PathLike[str] | None


def sympy_corpus(cache_dir: CacheDir = None) -> Corpus:
  """All non-empty `.py` files that pip recorded for sympy; sympy itself is not imported."""
  del cache_dir  # nothing was fetched
  try:
    package = importlib.metadata.distribution("sympy")
  except importlib.metadata.PackageNotFoundError as e:
    raise ImportError(f"the default corpus is the source of sympy: {_SYMPY_HINT}") from e
  if package.version != _SYMPY_VERSION:
    raise ImportError(
      f"the default corpus is sympy {_SYMPY_VERSION}, got {package.version}: {_SYMPY_HINT}"
    )
  corpus = _python_files(package, "sympy", "BSD-3-Clause", _SYMPY_HINT)
  if corpus.sha256() != _SYMPY_SHA256:
    warnings.warn(
      f"the installed files of sympy {_SYMPY_VERSION} differ from the published ones:"
      " losses are not comparable with the documented runs.",
      stacklevel=4,
    )
  return corpus


def sympy_tests_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The tests of sympy 1.14.0, 10.0 MB: Python that calls and compares."""
  return part(sympy_corpus(cache_dir), "sympy-tests", lambda d: d.text if is_test(d.name) else "")


def sympy_modules_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The modules of sympy 1.14.0 without tests and docstrings, 10.3 MB: Python that computes."""
  return part(sympy_corpus(cache_dir), "sympy-modules", without_docstrings)


def sympy_docstrings_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The docstrings of these modules, 5.0 MB: mathematics in English, with sessions."""
  return part(sympy_corpus(cache_dir), "sympy-docstrings", docstrings_of)


def scipy_docstrings_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The docstrings of the installed scipy without its tests: 5.2 MB in version 1.17.1.

  JAX brings scipy in whatever version; that is recorded, and other versions are other texts.
  """
  del cache_dir
  package = importlib.metadata.distribution("scipy")
  corpus = _python_files(package, "scipy", "BSD-3-Clause", "pip install scipy")
  return part(corpus, "scipy-docstrings", docstrings_of)


def sympy_code_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The same documents from the fetched wheel of sympy."""
  return _fetched("sympy-code", cache_dir)


def english_docs_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The manuals of CPython and PostgreSQL, and the glosses of WordNet: English prose."""
  return _fetched("english-docs", cache_dir)


def python_manual_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The part of english-docs from CPython, 10.8 MB of reStructuredText, PSF-2.0."""
  return _manual("python-manual", "python/", "PSF-2.0", cache_dir)


def postgresql_manual_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The part of english-docs from PostgreSQL, 6.6 MB of text of HTML pages."""
  return _manual("postgresql-manual", "postgresql/", "PostgreSQL", cache_dir)


def wordnet_glosses_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The part of english-docs from WordNet 3.0, 11.5 MB of words and their glosses."""
  return _manual("wordnet-glosses", "wordnet/", "WordNet-3.0", cache_dir)


TEXTS = {
  "sympy": sympy_corpus,
  "sympy-tests": sympy_tests_corpus,
  "sympy-modules": sympy_modules_corpus,
  "sympy-docstrings": sympy_docstrings_corpus,
  "scipy-docstrings": scipy_docstrings_corpus,
  "sympy-code": sympy_code_corpus,
  "english-docs": english_docs_corpus,
  "python-manual": python_manual_corpus,
  "postgresql-manual": postgresql_manual_corpus,
  "wordnet-glosses": wordnet_glosses_corpus,
}


def _python_files(
  package: importlib.metadata.Distribution, source: str, licence: str, hint: str
) -> Corpus:
  """All non-empty `.py` files that pip recorded for `package`; nothing is imported."""
  files = {str(f): f for f in package.files or () if f.suffix == ".py"}
  if not files:
    raise ImportError(f"{source} is installed without a list of its files: {hint}")
  documents = []
  for name in sorted(files, key=str.encode):
    path = files[name].locate()
    if data := Path(str(path)).read_bytes():
      documents.append(Document(name, decode_text(data, path), split_of(module_key(name))))
  return Corpus(source, package.version, licence, tuple(documents))


def _manual(name: str, prefix: str, licence: str, cache_dir: CacheDir) -> Corpus:
  whole = english_docs_corpus(cache_dir)
  kept = part(whole, name, lambda d: d.text if d.name.startswith(prefix) else "")
  return dataclasses.replace(kept, licence=licence)


def _fetched(name: str, cache_dir: CacheDir) -> Corpus:
  folder = fetch(name, cache_dir=cache_dir, offline=True)
  source = read_source(folder)
  lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  documents = tuple(Document(r["name"], r["text"], split_of(module_key(r["name"]))) for r in rows)
  return Corpus(name, source["version"], source["licence"], documents)
