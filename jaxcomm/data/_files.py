"""Files of the user: which ones a source names, and the documents in each.

Text files (any suffix but the following), JSON lines (`.jsonl`, `.ndjson`, `.json`) and parquet
(`.parquet`). Errors name path and line, or path and row.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxcomm.data._extras import require

_JSON_LINES = frozenset((".jsonl", ".ndjson", ".json"))
_PARQUET = frozenset((".parquet",))
_IN_FOLDERS = frozenset((".txt", ".jsonl", ".ndjson", ".parquet"))  # others may be no data


def find_files(source: str | os.PathLike[str]) -> list[Path]:
  """The files that `source` names, sorted: a file, a folder, or a glob (`**` for any depth).

  Of a folder: every `.txt`, `.jsonl`, `.ndjson` and `.parquet` in it at any depth, hidden ones left
  out. Give a glob for other suffixes.

  Raises:
    FileNotFoundError: there is no such file.
  """
  path = Path(source).expanduser()
  if path.is_dir():
    below = (p.relative_to(path) for p in path.rglob("*"))
    shown = (
      p for p in below if p.suffix.lower() in _IN_FOLDERS and not any(x[0] == "." for x in p.parts)
    )
    files, problem = [path / p for p in shown], f"holds no file {', '.join(sorted(_IN_FOLDERS))}"
  elif path.exists() or not glob.has_magic(str(path)):
    files, problem = [path] if path.exists() else [], "does not exist"
  else:
    files, problem = [Path(p) for p in glob.glob(str(path), recursive=True)], "matches no file"
  files = [p for p in files if not p.is_dir()]
  if not files:
    raise FileNotFoundError(f"`{source}` {problem}.")
  return sorted(files, key=lambda p: os.fsencode(p.as_posix()))


def is_text(path: Path) -> bool:
  """Whether all of `path` is text, and no table of documents."""
  return path.suffix.lower() not in _JSON_LINES | _PARQUET


def read_text(path: Path) -> str:
  """The text of `path`.

  Raises:
    ValueError: the file is empty or not UTF-8 text.
  """
  text = decode_text(read_file(path), path)
  if not text.strip():
    raise ValueError(f"`{path}` is empty.")
  return text


def read_rows(path: Path, text_field: str) -> list[tuple[int, str]]:
  """Number and text of all rows of JSON lines or parquet whose text is not blank, from 1.

  Raises:
    ValueError: the file cannot be read, or a row has no string in `text_field`; path and row.
  """
  read = _parquet_rows if path.suffix.lower() in _PARQUET else _json_rows
  rows = [(i, text) for i, text in read(path, text_field) if text.strip()]
  if not rows:
    raise ValueError(f"`{path}` is empty.")
  return rows


def read_file(path: Path) -> bytes:
  """Its bytes; raises FileNotFoundError or IsADirectoryError in our words."""
  if path.is_dir():
    raise IsADirectoryError(f"`{path}` is a directory, a file is needed.")
  if not path.exists():
    raise FileNotFoundError(f"`{path}` does not exist.")
  return path.read_bytes()


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


def check_field(value: Any, text_field: str, where: str) -> str:
  """`value`, or raises ValueError where it is no text that UTF-8 can hold."""
  if not isinstance(value, str):
    raise ValueError(f"{where}: `{text_field}` must be a string, got {type(value).__name__}.")
  try:
    value.encode()
  except UnicodeEncodeError as e:
    raise ValueError(f"{where}: `{text_field}` is not valid text ({e.reason}).") from e
  return value


def missing_field(text_field: str, names: Iterable[str], where: str) -> ValueError:
  """The exception for a row or table that lacks `text_field`."""
  return ValueError(
    f"{where}: no field `{text_field}`, it has {', '.join(map(str, names)) or 'none'}:"
    " name the one with the text by --text-field (`text_field`)."
  )


def _json_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
  text = decode_text(read_file(path), path).removeprefix("\ufeff")
  for number, line in enumerate(text.split("\n"), 1):  # only \n ends a line of JSON lines
    if not line.strip():
      continue
    where = f"{path}:{number}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise ValueError(f"{where}: not a line of JSON ({e}).") from e
    if not isinstance(row, dict):
      raise ValueError(f"{where}: a JSON object is needed, got {type(row).__name__}.")
    if text_field not in row:
      raise missing_field(text_field, row, where)
    yield number, check_field(row[text_field], text_field, where)


def _parquet_rows(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
  pa, number = require("pyarrow", "parquet"), 0
  pq = require("pyarrow.parquet", "parquet")
  try:
    with pq.ParquetFile(path) as table:
      if text_field not in table.schema_arrow.names:
        raise missing_field(text_field, table.schema_arrow.names, str(path))
      for batch in table.iter_batches(columns=[text_field]):
        for value in batch.column(0).to_pylist():
          number += 1
          yield number, check_field(value, text_field, f"{path}, row {number}")
  except (pa.ArrowException, UnicodeDecodeError, OSError) as e:
    raise ValueError(f"`{path}` cannot be read as parquet, after row {number}: {e}") from e
