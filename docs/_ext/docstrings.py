"""Docstrings and signatures for the site: what is written plainly, made reStructuredText."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

_ARRAY_TREE = re.compile(
  r"~?[\w.]*\bArray \| [^,()=]*?Iterable\[\W*ArrayTree\W*\] \| [~\w.]*Mapping\[[^\]]*ArrayTree\W*\]"
)
# A bar, or stars that open emphasis and never close it.
_LONE = re.compile(r"\||(?<![*\w])(\*{1,2})(?=\w)(?![^*]*[^*\s]\1(?![\w*]))")
_ROLE_AND_LETTER = re.compile(r"(?<![:`])(`[^`]+`)(?=\w)")


def as_rst(lines: list[str]) -> Iterator[str]:
  """Escapes bars and lone stars, ends code before a letter (`x`s), and marks indented code."""
  for i, line in enumerate(lines):
    if ".. math::" in line or ">>>" in line:
      yield line
      continue
    parts = line.split("`")  # the odd ones are code
    parts[::2] = [_LONE.sub(_escape, part) for part in parts[::2]]
    line = _ROLE_AND_LETTER.sub(r"\1\\ ", "`".join(parts))
    yield f"{line}:" if line.endswith(":") and _code_follows(lines[i:]) else line


def _escape(match: re.Match[str]) -> str:
  return "".join(f"\\{c}" for c in match[0])


def _code_follows(lines: list[str]) -> bool:
  """Whether the first line is followed by an empty one and then by an indented block."""
  rest = [line for line in lines[1:] if line.strip()]
  if len(lines) < 3 or lines[1].strip() or not rest or rest[0].strip().startswith(("- ", ">>>")):
    return False
  indent = [len(line) - len(line.lstrip()) for line in (lines[0], rest[0])]
  return indent[1] >= indent[0] + 4


def _process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
  if what == "data" and "\n".join(lines).strip() == (inspect.getdoc(obj) or "").strip():
    lines.clear()  # a constant has no docstring: this is that of its type
  lines[:] = as_rst(lines)


def _short_types(app: Any, what: str, name: str, obj: Any, options: Any, *texts: Any) -> Any:
  """Signature and result with the name of a type of optax and chex, where it was written out."""
  return tuple(_ARRAY_TREE.sub("ArrayTree", text) if text else text for text in texts)


def setup(app: Any) -> dict[str, bool]:
  app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon
  app.connect("autodoc-process-signature", _short_types)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
