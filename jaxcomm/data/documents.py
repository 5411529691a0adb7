"""Documents, corpora, and which split owns a document: no split shares one with another."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Document:
  """One text with a name that is unique in its corpus, and the split that owns it."""

  name: str
  text: str
  split: str


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Named documents of one or more sources, in a fixed order."""

  source: str  # "sympy", the base name of the user's file, "hf:NAME"; several joined by "+"
  version: str  # of the package, or revision; empty for files
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


def agree_on_splits(corpora: Sequence[Corpus]) -> list[Corpus]:
  """Holds a text out of the training of all `corpora` where one of them holds it out.

  Raises:
    ValueError: a corpus is then without one of the splits.
  """
  held_out: dict[str, str] = {}
  for document in (d for c in corpora for d in c.documents if d.split != "train"):
    if held_out.get(document.text) != "test":
      held_out[document.text] = document.split

  def agree(document: Document) -> Document:
    split = held_out.get(document.text, "train")
    return document if split == document.split else dataclasses.replace(document, split=split)

  agreed = [dataclasses.replace(c, documents=tuple(map(agree, c.documents))) for c in corpora]
  for corpus in agreed:
    for split in SPLITS:
      if not corpus.split(split):
        raise ValueError(f"empty split `{split}` in `{corpus.source}`.")
  return agreed


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


def hold_out(texts: Iterable[str], splits: Sequence[str], where: str) -> list[str]:
  """Split of each of `texts`: 2 % of the distinct ones to each of `splits`, the rest to train.

  The order by content hash decides; equal texts land in the same split.

  Raises:
    ValueError: there are too few distinct texts.
  """
  keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
  order = sorted(set(keys))
  if len(order) < 1 + len(splits):
    raise ValueError(
      f"empty split: `{where}` ({len(order)} distinct blocks or rows) is too small for"
      f" {', '.join(['train', *splits])}; give more text."
    )
  share = max(1, len(order) // 50)
  split = dict.fromkeys(order, "train")
  for i, name in enumerate(splits):
    split.update(dict.fromkeys(order[i * share : (i + 1) * share], name))
  return [split[key] for key in keys]
