"""Text corpora: where the documents come from and to which split each belongs.

Two sources, both local: the Python files of the installed sympy 1.14.0 (26.18 MB, BSD-3-Clause),
and one text file of the user. A split never shares a document with another.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import warnings
from pathlib import Path

SPLITS = ("train", "validation", "test")

_SYMPY_VERSION = "1.14.0"
_SYMPY_SHA256 = "86f56d84a901c8636f9a7fae78d089e818cac93c3f5f7c1b8727e68d17d7f841"
_SYMPY_HINT = 'pip install "jaxcomm[train]"'


@dataclasses.dataclass(frozen=True)
class Document:
  """One text with a name that is unique in its corpus, and the split that owns it."""

  name: str
  text: str
  split: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Named documents of one source, in a fixed order."""

  source: str  # "sympy", or the base name of the user's file
  version: str  # of the package; empty for a file
  licence: str
  documents: tuple[Document, ...]

  def sha256(self) -> str:
    """Hash of every name, split and text, in order."""
    digest = hashlib.sha256()
    for document in self.documents:
      for part in (document.name, document.split, document.text):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()

  def split(self, split: str) -> tuple[Document, ...]:
    """The documents of `split`, in order."""
    check_split(split)
    return tuple(d for d in self.documents if d.split == split)


def load_corpus(source: str | os.PathLike[str] = "sympy") -> Corpus:
  """Reads the documents of `source`: `"sympy"`, or the path of a UTF-8 text file.

  Raises:
    ImportError: sympy 1.14.0 is not installed.
    FileNotFoundError, IsADirectoryError: `source` is no file.
    ValueError: the file is empty, not UTF-8 text (path and line), or too small for three splits.
  """
  corpus = _sympy_corpus() if source == "sympy" else _file_corpus(Path(source))
  for split in SPLITS:
    if not corpus.split(split):
      raise ValueError(f"empty split `{split}` in `{source}`.")
  return corpus


def check_split(split: str) -> str:
  """Returns `split`, or raises ValueError where it is not one of `SPLITS`."""
  if split not in SPLITS:
    raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, got {split!r}.")
  return split


def split_of(key: str) -> str:
  """Split of the documents that share `key`: 2 % test, 2 % validation, 96 % train.

  Example:
    >>> split_of("sympy/core/add.py")
    'train'
  """
  bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
  return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


def module_key(name: str) -> str:
  """The module that the file `name` belongs to: a test file shares the key of what it tests.

  Whole directories would be too coarse a key (99 of them: 0.4 % validation, no test), so the key
  is the module: sympy's tests lie in a `tests` directory beside it under the name `test_` + module.

  Example:
    >>> module_key("sympy/core/tests/test_add.py")
    'sympy/core/add.py'
  """
  *folders, file = name.split("/")
  if "tests" not in folders:
    return name
  folders = folders[: folders.index("tests")]
  return "/".join([*folders, re.sub(r"^test_", "", file)])


def decode_text(data: bytes, path: str | os.PathLike[str]) -> str:
  """Strict UTF-8 without NUL; the error names path, line and byte offset."""
  offset, problem = data.find(b"\0"), "a NUL byte (a binary file?)"
  if offset < 0:
    try:
      return data.decode("utf-8")
    except UnicodeDecodeError as e:
      offset, problem = e.start, f"not UTF-8 ({e.reason})"
  line = data.count(b"\n", 0, offset) + 1
  raise ValueError(f"{path}:{line}: {problem} at byte offset {offset}.")


def _sympy_corpus() -> Corpus:
  """All non-empty `.py` files that pip recorded for sympy; sympy itself is not imported."""
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
      stacklevel=3,
    )
  return corpus


def _file_corpus(path: Path) -> Corpus:
  """Cuts one file into about 100 blocks and gives whole blocks to the splits.

  The order by content hash picks 2 % test and 2 % validation, at least one block each; blocks with
  equal text land in the same split.
  """
  if path.is_dir():
    raise IsADirectoryError(f"`{path}` is a directory, a text file is needed.")
  if not path.exists():
    raise FileNotFoundError(f"`{path}` does not exist.")
  text = decode_text(path.read_bytes(), path)
  if not text.strip():
    raise ValueError(f"`{path}` is empty.")
  blocks = cut_blocks(text)
  keys = [hashlib.sha256(block.encode()).hexdigest() for block in blocks]
  order = sorted(set(keys))
  if len(order) < len(SPLITS):
    raise ValueError(
      f"empty split: `{path}` ({len(text)} characters, {len(order)} distinct blocks) is too small"
      " for train, validation and test; give a larger file."
    )
  held_out = max(1, len(order) // 50)
  split = dict.fromkeys(order, "train")
  split.update(dict.fromkeys(order[:held_out], "test"))
  split.update(dict.fromkeys(order[held_out : 2 * held_out], "validation"))
  return Corpus(
    path.name,
    "",
    "unknown",
    tuple(Document(f"block/{i:06d}", b, split[k]) for i, (b, k) in enumerate(zip(blocks, keys))),
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
