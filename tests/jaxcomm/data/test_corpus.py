"""Where documents come from, and that no split shares one."""

import importlib.metadata
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import corpus, documents


@pytest.fixture(scope="module")
def sympy_corpus():
  return corpus.load_corpus("sympy")


def write(path, content):
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def test_sympy_counts(sympy_corpus, recwarn):
  files = importlib.metadata.distribution("sympy").files or ()
  assert sum(f.suffix == ".py" for f in files) == 1533
  assert len(sympy_corpus.documents) == 1453
  assert sum(len(d.text.encode()) for d in sympy_corpus.documents) == 26_180_038
  assert (sympy_corpus.version, sympy_corpus.licence) == ("1.14.0", "BSD-3-Clause")
  corpus.load_corpus("sympy")
  assert not recwarn.list  # the pinned hash of the text matches


def test_sympy_names_are_unique_and_sorted_bytewise(sympy_corpus):
  names = [d.name.encode() for d in sympy_corpus.documents]
  assert names == sorted(set(names))


def test_sympy_splits_have_sane_sizes(sympy_corpus):
  size = {s: sum(len(d.text) for d in sympy_corpus.split(s)) for s in documents.SPLITS}
  total = sum(size.values())
  assert 0.005 < size["validation"] / total < 0.08
  assert 0.005 < size["test"] / total < 0.08
  assert total == sum(len(d.text) for d in sympy_corpus.documents)


def test_sympy_test_files_share_the_split_of_their_module(sympy_corpus):
  split = {d.name: d.split for d in sympy_corpus.documents}
  pairs = [(n, documents.module_key(n)) for n in split if "/tests/" in n]
  owned = [(test, module) for test, module in pairs if module in split]
  assert len(owned) > 300
  assert all(split[test] == split[module] for test, module in owned)
  assert any(split[test] == "validation" for test, _ in owned)


def test_sympy_held_out_texts_are_not_in_train(sympy_corpus):
  train = {d.text for d in sympy_corpus.split("train")}
  assert not any(d.text in train for s in ("validation", "test") for d in sympy_corpus.split(s))


@pytest.mark.parametrize(
  ("name", "key"),
  [
    ("sympy/core/add.py", "sympy/core/add.py"),
    ("sympy/core/tests/test_add.py", "sympy/core/add.py"),
    ("sympy/a/tests/data/test_b.py", "sympy/a/b.py"),
    ("sympy/testing/tests/diff_test.py", "sympy/testing/diff_test.py"),
    ("isympy.py", "isympy.py"),
  ],
)
def test_module_key(name, key):
  assert documents.module_key(name) == key


def test_split_of_gives_two_two_ninety_six_percent():
  splits = [documents.split_of(f"file{i}") for i in range(5000)]
  assert 60 < splits.count("test") < 140
  assert 60 < splits.count("validation") < 140


def test_import_needs_no_extra_and_reading_does_not_import_sympy():
  code = (
    "import sys, jaxcomm, jaxcomm.data as d\n"
    "assert not {'grain', 'tokenizers', 'sympy'} & set(sys.modules)\n"
    "d.load_corpus(); assert 'sympy' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_absent_sympy_names_the_command(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", absent)
  with pytest.raises(ImportError, match=r'pip install "jaxcomm\[train\]"'):
    corpus.load_corpus()


def fake_sympy(monkeypatch, tmp_path, version, files):
  info = tmp_path / f"sympy-{version}.dist-info"
  info.mkdir()
  write(info / "METADATA", f"Metadata-Version: 2.1\nName: sympy\nVersion: {version}\n")
  write(info / "RECORD", "".join(f"{name},,\n" for name in files))
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, content)
  package = importlib.metadata.PathDistribution(info)
  monkeypatch.setattr(importlib.metadata, "distribution", lambda name: package)


def test_wrong_sympy_version_names_both_and_the_command(monkeypatch, tmp_path):
  fake_sympy(monkeypatch, tmp_path, "1.13.1", {})
  with pytest.raises(ImportError, match=r"sympy 1\.14\.0, got 1\.13\.1: pip install"):
    corpus.load_corpus()


def test_sympy_without_recorded_files_is_refused(monkeypatch, tmp_path):
  fake_sympy(monkeypatch, tmp_path, "1.14.0", {})
  with pytest.raises(ImportError, match="without a list of its files"):
    corpus.load_corpus()


def test_changed_sympy_files_warn_and_empty_ones_are_dropped(monkeypatch, tmp_path):
  files = {f"sympy/m{i}.py": f"x = {i}\n" for i in range(300)} | {
    "sympy/e.py": "",
    "sympy/a.txt": "a",
  }
  fake_sympy(monkeypatch, tmp_path, "1.14.0", files)
  with pytest.warns(UserWarning, match="differ from the published"):
    got = corpus.load_corpus()
  assert len(got.documents) == 300


def test_file_splits_are_disjoint_and_cover_the_text(tmp_path):
  text = "".join(f"Paragraph {i}.\nIt has two lines.\n\n" for i in range(3000))
  got = corpus.load_corpus(write(tmp_path / "book.txt", text))
  assert "".join(d.text for d in got.documents) == text
  assert all(d.text.endswith(".\n\n") for d in got.documents)
  share = {s: len(got.split(s)) / len(got.documents) for s in documents.SPLITS}
  assert share["train"] > 0.95
  assert min(share.values()) > 0.005
  texts = [{d.text for d in got.split(s)} for s in documents.SPLITS]
  assert sum(map(len, texts)) == len(set.union(*texts))


def test_equal_blocks_land_in_one_split(tmp_path):
  block = "the same paragraph again " * 30 + "\n\n"
  text = "".join(block if i % 2 else block + f"{i}\n\n" for i in range(400))
  got = corpus.load_corpus(write(tmp_path / "a.txt", text))
  texts = [{d.text for d in got.split(s)} for s in documents.SPLITS]
  assert sum(map(len, texts)) == len(set.union(*texts))


def test_small_file_has_all_splits(tmp_path):
  got = corpus.load_corpus(write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(700))))
  assert all(got.split(s) for s in documents.SPLITS)


def test_splits_do_not_depend_on_the_folder(tmp_path):
  text = "".join(f"line {i}\n" for i in range(2000))
  (tmp_path / "b").mkdir()
  first = corpus.load_corpus(write(tmp_path / "a.txt", text))
  second = corpus.load_corpus(str(write(tmp_path / "b" / "a.txt", text)))
  assert first == second
  assert first.sha256() == second.sha256()


@settings(max_examples=50, deadline=None)
@given(
  st.text(alphabet="ab \n\r\u2028", max_size=200), st.integers(0, 400), st.text("é\n", max_size=50)
)
def test_blocks_join_to_the_text(head, repeats, tail):
  text = head * repeats + tail
  blocks = corpus.cut_blocks(text)
  assert "".join(blocks) == text
  size = min(max(len(text) // 100, 512), 32768)
  assert all(size <= len(b) < 5 * size for b in blocks) or len(blocks) == 1


def test_text_without_any_break_is_cut():
  assert [len(b) for b in corpus.cut_blocks("x" * 100_000)][:3] == [4000, 4000, 4000]


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b" \n\t\n", "is empty"),
    (b"short\n", "empty split.*too small"),
    (b"same line\n" * 3, "empty split"),
    (b"one\ntwo\nthree \xff\n", r"a\.txt:3: not UTF-8 .* at byte offset 14"),
    (b"\x7fELF\n\n\x00\x01", r"a\.txt:3: a NUL byte .* at byte offset 6"),
  ],
)
def test_bad_file_content(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    corpus.load_corpus(write(tmp_path / "a.txt", content))


def test_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"nowhere\.txt` does not exist"):
    corpus.load_corpus(tmp_path / "nowhere.txt")
  with pytest.raises(FileNotFoundError, match=r"\*\.txt` matches no file"):
    corpus.load_corpus(f"{tmp_path}/*.txt")
  write(tmp_path / "notes.md", "not looked for in a folder")
  with pytest.raises(FileNotFoundError, match=r"holds no file \.jsonl, \.ndjson, \.parquet, \.txt"):
    corpus.load_corpus(tmp_path)


def test_unknown_split(sympy_corpus):
  with pytest.raises(
    ValueError, match=r"`split` must be one of train, validation, test, got 'dev'"
  ):
    sympy_corpus.split("dev")
