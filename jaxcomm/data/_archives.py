"""Reading the files of a package without installing it: wheels, npm tarballs, Debian packages."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
  """Name and content of the regular files in the archive `path` whose name is `wanted`.

  Args:
    path: `.whl` or `.zip`; `.tgz` or another tar; `.deb`.
    wanted: tells by the name inside the archive, without a leading `./`.

  Raises:
    ValueError: the archive is damaged.
    FileNotFoundError: a `.deb` packed by zstandard, and no `dpkg-deb` to open it.
  """
  try:
    if path.suffix in (".whl", ".zip"):
      yield from _zip_members(path, wanted)
    elif path.suffix == ".deb":
      yield from _tar_members(_deb_data(path), wanted)
    else:
      yield from _tar_members(path.read_bytes(), wanted)
  except (zipfile.BadZipFile, tarfile.TarError, EOFError) as e:
    raise ValueError(f"`{path}` is damaged: {e}.") from e


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
  with zipfile.ZipFile(path) as archive:
    for info in archive.infolist():
      if not info.is_dir() and wanted(info.filename):
        yield info.filename, archive.read(info)


def _tar_members(data: bytes, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
  with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
    for info in archive:
      name = info.name.removeprefix("./")
      if info.isfile() and wanted(name) and (file := archive.extractfile(info)):
        yield name, file.read()


def _deb_data(path: Path) -> bytes:
  """The tar of files in a Debian package: an `ar` archive of 60-byte headers and even lengths."""
  data, start = path.read_bytes(), 8
  if data[:8] != b"!<arch>\n":
    raise ValueError(f"`{path}` is damaged: it is no Debian package.")
  while start + 60 <= len(data):
    name = data[start : start + 16].decode("ascii", "replace").rstrip(" /")
    size = data[start + 48 : start + 58].strip()
    if not size.isdigit():
      break
    end = start + 60 + int(size)
    if name == "data.tar.zst":
      return _unpack_by_dpkg(path)
    if name.startswith("data.tar"):
      return data[start + 60 : end]
    start = end + end % 2
  raise ValueError(f"`{path}` is damaged: it holds no data.tar.")


def _unpack_by_dpkg(path: Path) -> bytes:
  if shutil.which("dpkg-deb") is None:
    raise FileNotFoundError(f"`{path}` is packed by zstandard: `dpkg-deb` is needed to open it.")
  command = ["dpkg-deb", "--fsys-tarfile", str(path)]
  return subprocess.run(command, check=True, capture_output=True).stdout
