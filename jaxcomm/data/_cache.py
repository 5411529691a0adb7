"""Entries of the cache: folders built once, verified on every use, replaced when damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
  """`cache_dir`, else `$JAXCOMM_CACHE`, else `~/.cache/jaxcomm`."""
  if cache_dir is None:
    cache_dir = os.environ.get("JAXCOMM_CACHE") or "~/.cache/jaxcomm"
  return Path(cache_dir).expanduser().absolute()


def cached(
  directory: Path, build: Callable[[Path], dict[str, Any]], load: Callable[[dict[str, Any]], T]
) -> T:
  """The entry `directory`, built first where it is absent or damaged.

  Args:
    directory: it appears atomically; one process of this machine at a time builds it.
    build: fills a given folder and returns the content of its `meta.json`, to which sizes and
      hashes of all files are added.
    load: makes the result from that content; an exception means that the entry is damaged.
  """
  if (found := read_entry(directory, load)) is not None:
    return found
  directory.parent.mkdir(parents=True, exist_ok=True)
  with _locked(directory.with_name(directory.name + ".lock")):
    found = read_entry(directory, load, warn=True)
    if found is not None:  # built while we waited
      return found
    _publish(directory, build)
  found = read_entry(directory, load)
  if found is None:
    raise OSError(f"`{directory}` does not hold what was just written to it.")
  return found


def read_entry(
  directory: Path, load: Callable[[dict[str, Any]], T], *, warn: bool = False
) -> T | None:
  """The entry if it is whole; None if it is absent or damaged."""
  if not directory.exists():
    return None
  try:
    meta = json.loads((directory / "meta.json").read_text())
    for name, want in meta["files"].items():
      if _fingerprint(directory / name) != want:
        raise ValueError(f"`{name}` is damaged")
    return load(meta)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    if warn:
      warnings.warn(f"rebuilding the damaged cache `{directory}`: {e}", stacklevel=4)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Lets one process of this machine pass at a time; the lock dies with its process."""
  import fcntl  # not on Windows, and needed only to build an entry

  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _publish(directory: Path, build: Callable[[Path], dict[str, Any]]) -> None:
  """Builds the entry beside `directory`, then renames it into place."""
  work = Path(tempfile.mkdtemp(prefix=".tmp-", dir=directory.parent))
  try:
    meta = build(work)
    meta["files"] = {p.name: _fingerprint(p) for p in sorted(work.iterdir())}
    (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    if directory.exists():  # damaged: `read_entry` refused it
      os.rename(directory, work / "damaged")
    os.rename(work, directory)
    shutil.rmtree(directory / "damaged", ignore_errors=True)
  except BaseException:
    shutil.rmtree(work, ignore_errors=True)
    raise


def _fingerprint(path: Path) -> dict[str, int | str]:
  with path.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": file.tell(), "sha256": digest}
