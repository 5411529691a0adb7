"""Tokenised text on disk: prepared once, verified on every use, read through memory maps."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxcomm.data._cache import cache_root, cached
from jaxcomm.data.corpus import Source, load_corpus
from jaxcomm.data.documents import SPLITS, Corpus, Document, agree_on_splits, check_split
from jaxcomm.data.tokenizer import (
  check_vocab_size,
  find_end_of_text,
  load_tokenizer,
  num_token_ids,
  train_tokenizer,
)

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
  source: Source | Sequence[Source] = "sympy",
  *,
  vocab_size: int | None = None,
  tokenizer: str | os.PathLike[str] | None = None,
  text_field: str = "text",
  cache_dir: str | os.PathLike[str] | None = None,
) -> TextCorpus:
  """Reads `source`, trains a tokenizer on its train split, tokenises all splits, caches the result.

  The cache entry is named by the hash of the text, of the tokenizer or `vocab_size`, and of the
  format. It appears atomically, one process at a time builds it, and an entry whose sizes or hashes
  do not match is rebuilt with a warning. `meta.json` records package, version, licence, hashes and
  counts.

  Args:
    source: one source or several, whose documents are put together: see `load_corpus`.
    vocab_size: entries of the vocabulary to train, at least 257, default 8192. Small corpora may
      use fewer (`meta["tokenizer"]["entries"]`), a model still has `vocab_size` rows. With
      `tokenizer`: the rows of the model, which its ids must not exceed.
    tokenizer: a Hugging Face `tokenizer.json` to use in place of a trained one. What ends a
      document is found as `find_end_of_text` says.
    text_field: key or column of the text in JSON lines, parquet and `hf:` sets.
    cache_dir: default: `$JAXCOMM_CACHE`, else `~/.cache/jaxcomm`.

  Raises:
    ImportError: the extra `train`, or one that the source needs, is missing.
    OSError, ValueError: see `load_corpus`, `train_tokenizer` and `load_tokenizer`; or the tokenizer
      has no end-of-text token, or more ids than `vocab_size`.

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
  vocabulary = _vocabulary(vocab_size, tokenizer)
  corpus = load_corpus(source, text_field=text_field, cache_dir=cache_dir)
  return _prepare(corpus, vocabulary, cache_root(cache_dir))


def prepare_mixture(
  sources: Sequence[Source],
  *,
  vocab_size: int | None = None,
  tokenizer: str | os.PathLike[str] | None = None,
  text_field: str = "text",
  cache_dir: str | os.PathLike[str] | None = None,
) -> list[TextCorpus]:
  """Prepares each of `sources` by itself, with one tokenizer, for `batches` with `weights`.

  A text that one source holds out of training is held out in all. The tokenizer is trained on the
  train splits of all sources, each in full.

  Args:
    sources: at least one, none twice.
    vocab_size: see `prepare_text`, as all others.
    tokenizer: as there.
    text_field: as there.
    cache_dir: as there.

  Raises:
    ImportError, OSError, ValueError: see `prepare_text`.
  """
  if isinstance(sources, str | os.PathLike) or not sources:
    raise ValueError(f"`sources` must be a list of at least one source, got {sources!r}.")
  if len({str(s) for s in sources}) < len(sources):
    raise ValueError(f"`sources` must not name a source twice, got {', '.join(map(str, sources))}.")
  vocabulary, root = _vocabulary(vocab_size, tokenizer), cache_root(cache_dir)
  loaded = [load_corpus(s, text_field=text_field, cache_dir=cache_dir) for s in sources]
  corpora = agree_on_splits(loaded)
  if vocabulary.path is None:
    vocabulary = _vocabulary(None, _train_shared(corpora, vocabulary.size, root))
  return [_prepare(corpus, vocabulary, root) for corpus in corpora]


def provenance(corpora: Sequence[TextCorpus]) -> dict[str, str]:
  """Where the tokens come from, for a run's records; the values of several are joined by "+".

  Returns:
    `name`, `version` (empty for files), `licence`, `sha256` of the text, and `tokens_sha256` of the
    train tokens.
  """
  values = {
    "name": [c.meta["source"] for c in corpora],
    "version": [c.meta["version"] for c in corpora],
    "licence": [c.meta["licence"] for c in corpora],
    "sha256": [c.meta["text_sha256"] for c in corpora],
    "tokens_sha256": [c.meta["files"]["train.tokens.npy"]["sha256"] for c in corpora],
  }
  return {name: "+".join(filter(None, parts)) for name, parts in values.items()}


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
  """The tokenizer in `path`; or one to train, with `size` entries."""

  size: int
  path: Path | None
  eot_id: int
  key: str  # names it in the cache


def _vocabulary(vocab_size: int | None, tokenizer: str | os.PathLike[str] | None) -> _Vocabulary:
  if tokenizer is None:
    size = 8192 if vocab_size is None else vocab_size
    check_vocab_size(size)
    return _Vocabulary(size, None, 0, str(size))
  path = Path(tokenizer).expanduser()
  size = num_token_ids(load_tokenizer(path))
  if vocab_size is not None and size > vocab_size:
    raise ValueError(
      f"`vocab_size` must be at least the {size} token ids of `{tokenizer}`, got {vocab_size}."
    )
  eot_id = find_end_of_text(path)
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return _Vocabulary(size, path, eot_id, f"{digest}/{eot_id}")


def _prepare(corpus: Corpus, vocabulary: _Vocabulary, root: Path) -> TextCorpus:
  digest = corpus.sha256()
  key = hashlib.sha256(f"{_FORMAT}/{vocabulary.key}/{digest}".encode()).hexdigest()[:16]
  name = re.sub(r"[^\w.+-]", "_", corpus.source)[:60]
  directory = root / "text" / f"{name}-{vocabulary.size}-{key}"

  def load(meta: dict[str, Any]) -> TextCorpus:
    return TextCorpus(directory, meta["vocab_size"], meta["eot_id"], meta)

  return cached(directory, lambda work: _build(corpus, digest, vocabulary, work), load)


def _train_shared(corpora: Sequence[Corpus], vocab_size: int, root: Path) -> Path:
  """A cached tokenizer, trained on the train splits of all `corpora`."""
  digests = "/".join(corpus.sha256() for corpus in corpora)
  key = hashlib.sha256(f"{_FORMAT}/{vocab_size}/{digests}".encode()).hexdigest()[:16]
  directory = root / "tokenizers" / f"{vocab_size}-{key}"

  def build(work: Path) -> dict[str, Any]:
    tokenizer = _train([d.text for c in corpora for d in c.split("train")], vocab_size, "mixture")
    tokenizer.save(os.fspath(work / "tokenizer.json"))
    return {"format": _FORMAT, "entries": tokenizer.get_vocab_size()}

  cached(directory, build, lambda meta: meta["entries"])
  return directory / "tokenizer.json"


def _train(texts: list[str], vocab_size: int, source: str) -> tokenizers.Tokenizer:
  _LOG.info("%s: training a tokenizer on %.1f MB", source, sum(map(len, texts)) / 1e6)
  tokenizer = train_tokenizer(texts, vocab_size)
  if (entries := tokenizer.get_vocab_size()) < vocab_size:
    _LOG.warning(
      "%s: its text yields a vocabulary of %d entries, fewer than the %d asked for",
      *(source, entries, vocab_size),
    )
  return tokenizer


def _build(corpus: Corpus, digest: str, vocabulary: _Vocabulary, directory: Path) -> dict[str, Any]:
  start, path = time.monotonic(), directory / "tokenizer.json"
  if vocabulary.path is None:
    tokenizer = _train([d.text for d in corpus.split("train")], vocabulary.size, corpus.source)
    tokenizer.save(os.fspath(path))
  else:
    shutil.copyfile(vocabulary.path, path)
    tokenizer = load_tokenizer(path)
  encoder = _Encoder(tokenizer, vocabulary.eot_id, vocabulary.size)
  splits = {s: _build_split(encoder, corpus.split(s), s, directory) for s in SPLITS}
  _LOG.info("%s: prepared in %.1f s", corpus.source, time.monotonic() - start)
  return {
    "format": _FORMAT,
    "source": corpus.source,
    "version": corpus.version,
    "licence": corpus.licence,
    "text_sha256": digest,
    "vocab_size": vocabulary.size,
    "eot_id": vocabulary.eot_id,
    "tokenizer": {
      "version": importlib.metadata.version("tokenizers"),
      "entries": tokenizer.get_vocab_size(),
      "trained_on": "train" if vocabulary.path is None else None,
    },
    "splits": splits,
  }


class _Encoder(NamedTuple):
  tokenizer: tokenizers.Tokenizer
  eot_id: int
  vocab_size: int


def _build_split(
  encoder: _Encoder, documents: Sequence[Document], split: str, directory: Path
) -> dict[str, int]:
  """Writes tokens and offsets of one split; returns its counts."""
  dtype = np.uint16 if encoder.vocab_size <= 2**16 else np.uint32
  ids = []
  for batch in _batched([d.text for d in documents]):
    encodings = encoder.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    ids += [np.asarray([*e.ids, encoder.eot_id], dtype) for e in encodings]
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


def _memmap(path: Path) -> np.memmap:
  return np.load(path, mmap_mode="r", allow_pickle=False)
