"""Tokenised text on disk: prepared once, verified on every use, read through memory maps."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcomm.data.corpus import SPLITS, Corpus, Document, check_split, load_corpus
from jaxcomm.data.tokenizer import END_OF_TEXT, check_vocab_size, train_tokenizer

if TYPE_CHECKING:
  import tokenizers

_FORMAT = 1  # raise it when files or their meaning change: old caches are then not found
_BATCH_CHARS = 4_000_000  # text handed to the tokenizer's threads at once
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TextCorpus:
  """A tokenised corpus on disk; every document ends with `eot_id`."""

  directory: Path
  vocab_size: int  # ids are in [0, vocab_size)
  eot_id: int
  meta: dict[str, Any] = dataclasses.field(compare=False, repr=False)  # content of meta.json

  @property
  def tokenizer_path(self) -> Path:
    return self.directory / "tokenizer.json"

  def tokens(self, split: str) -> np.memmap:
    """All token ids of `split`: uint16[num_tokens], or uint32 for more than 65536 entries."""
    return _memmap(self.directory / f"{check_split(split)}.tokens.npy")

  def offsets(self, split: str) -> np.memmap:
    """int64[num_documents + 1]: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
    return _memmap(self.directory / f"{check_split(split)}.offsets.npy")


def prepare_text(
  source: str | os.PathLike[str] = "sympy",
  *,
  vocab_size: int = 8192,
  cache_dir: str | os.PathLike[str] | None = None,
) -> TextCorpus:
  """Reads `source`, trains a tokenizer on its train split, tokenises all splits, caches the result.

  The cache entry is named by the hash of the text, `vocab_size` and the format. It appears
  atomically, one process at a time builds it, and an entry whose sizes or hashes do not match is
  rebuilt with a warning. `meta.json` records package, version, licence, hashes and counts.

  Args:
    source: `"sympy"` (source code of the installed sympy 1.14.0) or the path of a text file.
    vocab_size: entries of the vocabulary, at least 257. Small corpora may use fewer
      (`meta["tokenizer"]["entries"]`), a model still has `vocab_size` rows.
    cache_dir: default: `$JAXCOMM_CACHE`, else `~/.cache/jaxcomm`.

  Raises:
    ImportError: the extra `train` is missing.
    OSError, ValueError: see `load_corpus` and `train_tokenizer`.

  Example:
    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text(
    ...   "".join(f"{i} squared is {i * i}.\\n" for i in range(999))
    ... )
    >>> corpus = prepare_text(folder / "a.txt", vocab_size=300, cache_dir=folder)
    >>> corpus.tokens("train").dtype, int(corpus.tokens("train")[-1]) == corpus.eot_id
    (dtype('uint16'), True)
  """
  check_vocab_size(vocab_size)
  corpus = load_corpus(source)
  digest = corpus.sha256()
  key = hashlib.sha256(f"{_FORMAT}/{vocab_size}/{digest}".encode()).hexdigest()[:16]
  directory = _cache_dir(cache_dir) / "text" / f"{corpus.source}-{vocab_size}-{key}"
  if (found := _read(directory)) is not None:
    return found
  directory.parent.mkdir(parents=True, exist_ok=True)
  with _locked(directory.with_name(directory.name + ".lock")):
    if (found := _read(directory, warn=True)) is not None:  # built while we waited
      return found
    _publish(corpus, digest, vocab_size, directory)
  found = _read(directory)
  if found is None:
    raise OSError(f"`{directory}` does not hold what was just written to it.")
  return found


def _cache_dir(cache_dir: str | os.PathLike[str] | None) -> Path:
  if cache_dir is None:
    cache_dir = os.environ.get("JAXCOMM_CACHE") or "~/.cache/jaxcomm"
  return Path(cache_dir).expanduser().absolute()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Lets one process of this machine pass at a time; the lock dies with its process."""
  import fcntl  # not on Windows, and needed only to build an entry

  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _publish(corpus: Corpus, digest: str, vocab_size: int, directory: Path) -> None:
  """Builds the entry beside `directory`, then renames it into place."""
  work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory.parent))
  try:
    _build(corpus, digest, vocab_size, work)
    if directory.exists():  # damaged: `_read` refused it
      os.rename(directory, work / "damaged")
    os.rename(work, directory)
    shutil.rmtree(directory / "damaged", ignore_errors=True)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


def _build(corpus: Corpus, digest: str, vocab_size: int, directory: Path) -> None:
  start = time.monotonic()
  train = [d.text for d in corpus.split("train")]
  _LOG.info("%s: training a tokenizer on %.1f MB", corpus.source, sum(map(len, train)) / 1e6)
  tokenizer = train_tokenizer(train, vocab_size)
  if (entries := tokenizer.get_vocab_size()) < vocab_size:
    _LOG.warning(
      "%s: its text yields a vocabulary of %d entries, fewer than the %d asked for",
      *(corpus.source, entries, vocab_size),
    )
  tokenizer.save(os.fspath(directory / "tokenizer.json"))
  splits = {s: _build_split(tokenizer, corpus.split(s), s, vocab_size, directory) for s in SPLITS}
  meta = {
    "format": _FORMAT,
    "source": corpus.source,
    "version": corpus.version,
    "licence": corpus.licence,
    "text_sha256": digest,
    "vocab_size": vocab_size,
    "eot_id": tokenizer.token_to_id(END_OF_TEXT),
    "tokenizer": {
      "version": importlib.metadata.version("tokenizers"),
      "entries": entries,
      "trained_on": "train",
    },
    "splits": splits,
    "files": {p.name: _fingerprint(p) for p in sorted(directory.iterdir())},
  }
  (directory / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
  _LOG.info("%s: prepared in %.1f s", corpus.source, time.monotonic() - start)


def _build_split(
  tokenizer: tokenizers.Tokenizer,
  documents: Sequence[Document],
  split: str,
  vocab_size: int,
  directory: Path,
) -> dict[str, int]:
  """Writes tokens and offsets of one split; returns its counts."""
  dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
  eot_id = tokenizer.token_to_id(END_OF_TEXT)
  ids = []
  for batch in _batched([d.text for d in documents]):
    encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    ids += [np.asarray([*e.ids, eot_id], dtype) for e in encodings]
    _LOG.info("%s: tokenised %d of %d documents", split, len(ids), len(documents))
  offsets = np.cumsum([0, *(len(x) for x in ids)], dtype=np.int64)
  np.save(directory / f"{split}.tokens.npy", np.concatenate(ids), allow_pickle=False)
  np.save(directory / f"{split}.offsets.npy", offsets, allow_pickle=False)
  num_bytes = sum(len(d.text.encode()) for d in documents)
  return {"documents": len(documents), "bytes": num_bytes, "tokens": int(offsets[-1])}


def _batched(texts: Sequence[str]) -> Iterator[list[str]]:
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text)
    if size >= _BATCH_CHARS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _read(directory: Path, *, warn: bool = False) -> TextCorpus | None:
  """The entry if it is whole; None if it is absent or damaged."""
  if not directory.exists():
    return None
  try:
    meta = json.loads((directory / "meta.json").read_text())
    for name, want in meta["files"].items():
      if _fingerprint(directory / name) != want:
        raise ValueError(f"`{name}` is damaged")
    return TextCorpus(directory, meta["vocab_size"], meta["eot_id"], meta)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    if warn:
      warnings.warn(f"rebuilding the damaged cache `{directory}`: {e}", stacklevel=3)
    return None


def _fingerprint(path: Path) -> dict[str, int | str]:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.tell(), "sha256": digest}


def _memmap(path: Path) -> np.memmap:
  return np.load(path, mmap_mode="r", allow_pickle=False)
