"""Parts of a corpus that are domains of their own: prose out of code, and code without it."""

import dataclasses
import re
import textwrap
from collections.abc import Callable, Iterator

from jaxcomm.data.documents import Corpus, Document

# Strings are found one after the other, so that the end of one is not the start of the next.
_TRIPLE = re.compile(r'("""|\'\'\')((?:\\.|[^\\])*?)\1', re.DOTALL)
_PREFIX = re.compile(r"[ \t]*[rRuU]?")


def part(corpus: Corpus, source: str, text_of: Callable[[Document], str]) -> Corpus:
  """The documents of `corpus` with the texts that `text_of` leaves of them, none where empty.

  Names and splits stay: what one part holds out of training, no other part trains on.
  """
  kept = ((d, text_of(d)) for d in corpus.documents)
  documents = tuple(dataclasses.replace(d, text=text) for d, text in kept if text.strip())
  return dataclasses.replace(corpus, source=source, documents=documents)


def is_test(name: str) -> bool:
  """Whether the file `name` is part of a package's tests or benchmarks.

  Example:
    >>> is_test("sympy/core/tests/test_add.py"), is_test("sympy/core/add.py")
    (True, False)
  """
  return not {"tests", "benchmarks"}.isdisjoint(name.split("/")[:-1])


def docstrings_of(document: Document) -> str:
  """The docstrings of a Python file that is no test, in order, a blank line between two.

  Those in triple quotes that begin a line; parsing the files would take ten times as long.

  Example:
    >>> docstrings_of(Document("a.py", "def f():\\n  '''Adds.'''\\n  return 1\\n", "train"))
    'Adds.\\n'
  """
  if is_test(document.name):
    return ""
  return "\n".join(_dedented(match[2]) for _, match in _docstrings(document.text))


def without_docstrings(document: Document) -> str:
  """A Python file that is no test without its docstrings, as `docstrings_of` finds them.

  Example:
    >>> without_docstrings(Document("a.py", "def f():\\n  '''Adds.'''\\n  return 1\\n", "train"))
    'def f():\\n  return 1\\n'
  """
  if is_test(document.name):
    return ""
  text, kept, end = document.text, [], 0
  for start, match in _docstrings(text):
    kept.append(text[end:start])
    line_end = text.find("\n", match.end())
    end = len(text) if line_end < 0 else line_end + 1
  return "".join([*kept, text[end:]])


def _docstrings(source: str) -> Iterator[tuple[int, re.Match[str]]]:
  """Every docstring, and where its line begins."""
  for match in _TRIPLE.finditer(source):
    start = source.rfind("\n", 0, match.start()) + 1
    if _PREFIX.fullmatch(source, start, match.start()):
      yield start, match


def _dedented(text: str) -> str:
  """Without the indentation of the code around it, which the first line lacks."""
  first, newline, rest = text.partition("\n")
  return first.lstrip() + newline + textwrap.dedent(rest).rstrip() + "\n"
