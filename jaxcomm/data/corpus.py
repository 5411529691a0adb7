"""Text corpora by name, from the user's files, and from sets of the library `datasets`."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxcomm.data._files import find_files, is_text, read_rows, read_text
from jaxcomm.data._hub import read_hub
from jaxcomm.data.documents import Corpus, Document, agree_on_splits, hold_out
from jaxcomm.data.named import TEXTS

Source = str | os.PathLike[str]

_MANY_FILES = 100  # so many text files are documents; fewer are cut into blocks


def load_corpus(
  source: Source | Sequence[Source] = "sympy",
  *,
  text_field: str = "text",
  cache_dir: str | os.PathLike[str] | None = None,
) -> Corpus:
  """Reads the documents of `source`. Nothing is fetched but a set of the hub, by `hf:NAME`.

  A source is one of

  - `"sympy"`: the source code of the installed sympy 1.14.0; or a part of it that is a domain of
    its own, `"sympy-tests"`, `"sympy-modules"`, `"sympy-docstrings"`; or `"scipy-docstrings"`;
  - `"sympy-code"` or `"english-docs"`, after `fetch`; or a part of the latter: `"python-manual"`,
    `"postgresql-manual"`, `"wordnet-glosses"`;
  - a file, a folder (its .txt, .jsonl, .ndjson and .parquet files) or a glob: `.jsonl`, `.ndjson`
    and `.json` hold one object per line, `.parquet` a table; any other file is UTF-8 text;
  - `"hf:NAME"`, `"hf:NAME:CONFIG"`, `"hf:NAME@REVISION"` or `"hf:FOLDER"`, with the library
    `datasets`.

  A row is a document. A text file is cut into about 100 blocks, or is one document where there are
  100 text files or more. 2 % of the distinct documents of the user's files, chosen by a hash of
  their text, are the test split, 2 % validation, at least one each.

  Args:
    source: one source, or several: their documents together.
    text_field: key or column of the text in JSON lines, parquet and `hf:` sets.
    cache_dir: where `fetch` put the named sets; default as there.

  Raises:
    ImportError: sympy 1.14.0, or an extra that the source needs, is not installed.
    FileNotFoundError: there is no such file, or the named set was not fetched.
    ValueError: a file is empty, not UTF-8 text or not what its suffix says, a row has no text (path
      and line), a file is named twice, or there is too little for three splits.
  """
  sources = [source] if isinstance(source, str | os.PathLike) else list(source)
  if not sources:
    raise ValueError("`source` must name at least one source, got none.")
  if len({str(s) for s in sources}) < len(sources):
    raise ValueError(f"`source` must not name a source twice, got {_label(sources)}.")
  files = [s for s in sources if not _is_named(s)]
  parts = [_named_corpus(str(s), text_field, cache_dir) for s in sources if _is_named(s)]
  if files:  # together, so that a glob means the same whether or not the shell expands it
    parts.append(_files_corpus(files, text_field))
  (corpus,) = agree_on_splits([parts[0] if len(parts) == 1 else _join(parts)])
  return corpus


def _is_named(source: Source) -> bool:
  return isinstance(source, str) and (source in TEXTS or source.startswith("hf:"))


def _named_corpus(source: str, text_field: str, cache_dir: str | os.PathLike[str] | None) -> Corpus:
  if source.startswith("hf:"):
    return read_hub(source, text_field)
  return TEXTS[source](cache_dir)


def _files_corpus(sources: Sequence[Source], text_field: str) -> Corpus:
  files = [path for source in sources for path in find_files(source)]
  seen: set[Path] = set()
  for path in files:
    if path.resolve() in seen:
      raise ValueError(f"`source` must not name a file twice, got `{path}` in {_label(sources)}.")
    seen.add(path.resolve())
  names, texts = [], []
  whole = sum(map(is_text, files)) >= _MANY_FILES
  for prefix, path in sorted(zip(_prefixes(files), files)):
    for name, text in _documents(path, text_field, whole):
      names.append(f"{prefix}/{name}".strip("/"))
      texts.append(text)
  splits = hold_out(texts, ("test", "validation"), ", ".join(map(str, sources)))
  documents = tuple(map(Document, names, texts, splits))
  return Corpus(_label(sources), "", "unknown", documents)


def _documents(path: Path, text_field: str, whole: bool) -> Iterable[tuple[str, str]]:
  if not is_text(path):
    return [(f"row/{number:06d}", text) for number, text in read_rows(path, text_field)]
  text = read_text(path)
  if whole:
    return [("", text)]
  return [(f"block/{i:06d}", block) for i, block in enumerate(cut_blocks(text))]


def _prefixes(files: Sequence[Path]) -> list[str]:
  """Names of `files` in their smallest common folder; none for a single file."""
  if len(files) == 1:
    return [""]
  absolute = [p.absolute() for p in files]
  common = os.path.commonpath([p.parent for p in absolute])
  return [p.relative_to(common).as_posix() for p in absolute]


def _label(sources: Sequence[Source]) -> str:
  """`sources` without their folders, so that a corpus is the same wherever it lies."""
  names = [Path(s).name or str(s) for s in sources]
  if len(names) > 3:
    names = [*names[:2], f"{len(names) - 2} more"]
  return "+".join(names)


def _join(parts: Sequence[Corpus]) -> Corpus:
  documents = [
    dataclasses.replace(d, name=f"{part.source}/{d.name}") for part in parts for d in part.documents
  ]
  return Corpus(
    "+".join(p.source for p in parts),
    "+".join(p.version for p in parts if p.version),
    ", ".join(dict.fromkeys(p.licence for p in parts)),
    tuple(documents),
  )


def cut_blocks(text: str) -> list[str]:
  """Cuts `text` into blocks whose concatenation is `text`.

  A block holds at least 1 % of the text, within 512 and 32768 characters, and ends at the next
  blank line; where none follows within three more such sizes, at a line end, then at a space.

  Example:
    >>> blocks = cut_blocks("a line of text\\n\\n" * 1000)
    >>> len(blocks), blocks[0].endswith("\\n\\n")
    (27, True)
  """
  size = min(max(len(text) // 100, 512), 32768)
  blocks, start = [], 0
  while len(text) - start >= 5 * size:  # so that the last block is no stub
    end = _cut(text, start + size, start + 4 * size)
    blocks.append(text[start:end])
    start = end
  return [*blocks, text[start:]]


def _cut(text: str, first: int, last: int) -> int:
  for mark in ("\n\n", "\n\r\n", "\n", " "):
    at = text.find(mark, first, last)
    if at >= 0:
      return at + len(mark)
  return last
