"""Text corpora that have a name: pinned, with a known licence."""

import importlib.metadata
import json
import os
import warnings
from pathlib import Path

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
  files = {str(f): f for f in package.files or () if f.suffix == ".py"}
  if not files:
    raise ImportError(f"sympy is installed without a list of its files: {_SYMPY_HINT}")
  documents = []
  for name in sorted(files, key=str.encode):
    path = files[name].locate()
    if data := Path(str(path)).read_bytes():
      documents.append(Document(name, decode_text(data, path), split_of(module_key(name))))
  corpus = Corpus("sympy", _SYMPY_VERSION, "BSD-3-Clause", tuple(documents))
  if corpus.sha256() != _SYMPY_SHA256:
    warnings.warn(
      f"the installed files of sympy {_SYMPY_VERSION} differ from the published ones:"
      " losses are not comparable with the documented runs.",
      stacklevel=4,
    )
  return corpus


def sympy_code_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The same documents from the fetched wheel of sympy."""
  return _fetched("sympy-code", cache_dir)


def english_docs_corpus(cache_dir: CacheDir = None) -> Corpus:
  """The manuals of CPython and PostgreSQL, and the glosses of WordNet: English prose."""
  return _fetched("english-docs", cache_dir)


TEXTS = {
  "sympy": sympy_corpus,
  "sympy-code": sympy_code_corpus,
  "english-docs": english_docs_corpus,
}


def _fetched(name: str, cache_dir: CacheDir) -> Corpus:
  folder = fetch(name, cache_dir=cache_dir, offline=True)
  source = read_source(folder)
  lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
  rows = [json.loads(line) for line in lines]
  documents = tuple(Document(r["name"], r["text"], split_of(module_key(r["name"]))) for r in rows)
  return Corpus(name, source["version"], source["licence"], documents)
