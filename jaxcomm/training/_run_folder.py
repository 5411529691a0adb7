"""The folder of one run: its configuration, metrics and summary, on disk at every moment."""

import json
import os
import pathlib
from collections.abc import Collection
from typing import Any


class RunFolderError(ValueError):
  """A run folder that cannot be used as asked; nothing in it was changed."""


class RunFolder:
  """`config.json`, `metrics.jsonl`, `summary.json` and `checkpoints/` under one path.

  A new run writes its configuration at once; a resumed one changes nothing on disk before
  `continue_from`, so that a refused or failed resume leaves the folder as it was.

  Args:
    path: the folder.
    config: JSON-able description of the run.
    resume: continue the run in the folder; otherwise it must hold none.
    may_change: keys of `config` that may differ from the saved ones on resume.
    write: False on all processes but the first: nothing is written, and whether the folder is free
      is the first one's to say, which may have written there already.

  Raises:
    RunFolderError: a run is there and `resume` is False; none is there and `resume` is True; or
      the configuration differs in a key that may not change.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    config: dict[str, Any],
    *,
    resume: bool = False,
    may_change: Collection[str] = (),
    write: bool = True,
  ):
    self.path = pathlib.Path(path)
    self._config = config
    self._write = write
    self._lines = None
    saved = load_config(self.path) if resume else None
    if saved is not None:
      _check_same(saved, config, may_change, self.path)
    elif write and self.path.exists() and not _is_unused(self.path):
      raise RunFolderError(
        f"{self.path} is not an empty folder: give --resume to continue the run in it, or another"
        " folder."
      )
    if saved is None:
      self._write_config()

  @property
  def checkpoints(self) -> pathlib.Path:
    """Folder of the checkpoints."""
    return self.path / "checkpoints"

  @property
  def finished_steps(self) -> int | None:
    """Steps of the run that `summary.json` describes; None if no run has finished here."""
    try:
      return int(json.loads((self.path / "summary.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
      return None

  def continue_from(self, step: int) -> None:
    """Drops metrics of steps after `step`, about to be computed again; records `config`."""
    if not self._write:
      return
    kept = [json.dumps(row) + "\n" for row in read_metrics(self.path) if row["step"] <= step]
    write_atomically(self.path / "metrics.jsonl", "".join(kept))
    self._write_config()

  def _write_config(self) -> None:
    if self._write:
      self.path.mkdir(parents=True, exist_ok=True)
      write_atomically(self.path / "config.json", json.dumps(self._config, indent=2) + "\n")

  def log(self, row: dict[str, Any]) -> None:
    """Appends one line to `metrics.jsonl`."""
    if not self._write:
      return
    if self._lines is None:
      self._lines = (self.path / "metrics.jsonl").open("a", buffering=1)
    self._lines.write(json.dumps(row) + "\n")

  def summarise(self, summary: dict[str, Any]) -> None:
    """Writes `summary.json`."""
    if self._write:
      write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

  def close(self) -> None:
    """Closes the metrics file."""
    if self._lines is not None:
      self._lines.close()
      self._lines = None


def load_config(path: str | os.PathLike) -> dict[str, Any]:
  """The configuration of the run in `path`.

  Raises:
    RunFolderError: there is none, or it is not readable JSON.
  """
  file = pathlib.Path(path) / "config.json"
  try:
    config = json.loads(file.read_text())
  except (FileNotFoundError, NotADirectoryError) as e:
    raise RunFolderError(f"no run to resume in {path}: {file} is missing.") from e
  except (ValueError, OSError) as e:
    raise RunFolderError(f"{file} is not readable: {e}.") from e
  if not isinstance(config, dict):
    raise RunFolderError(f"{file} must hold an object, got {type(config).__name__}.")
  return config


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """All whole lines of `metrics.jsonl`, none if it is missing; a kill may have cut the last."""
  file = pathlib.Path(path) / "metrics.jsonl"
  if not file.exists():
    return []
  rows = []
  for line in file.read_text(errors="replace").splitlines():
    try:
      rows.append(json.loads(line))
    except ValueError:
      break
  return rows


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Replaces a file's content; a kill leaves the old or the new, never a part."""
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("w") as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def _is_unused(path: pathlib.Path) -> bool:
  """Whether a run may start here; one killed while it wrote its configuration left a `.tmp`."""
  return path.is_dir() and all(p.name == "config.json.tmp" for p in path.iterdir())


def _check_same(
  saved: dict[str, Any], config: dict[str, Any], may_change: Collection[str], path: pathlib.Path
) -> None:
  keys = sorted((saved.keys() & config.keys()) - set(may_change))  # scripts gain flags over time
  wrong = [k for k in keys if saved[k] != config[k]]
  if wrong:
    shown = ", ".join(f"{k}: {saved[k]!r} -> {config[k]!r}" for k in wrong)
    raise RunFolderError(
      f"--resume with another configuration than {path} was started with: {shown}."
    )
