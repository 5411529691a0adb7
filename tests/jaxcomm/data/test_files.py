"""Documents out of the user's files: which files, which rows, which split, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import load_corpus
from jaxcomm.data.documents import SPLITS


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  return path


def jsonl(rows):
  return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def rows(n, prefix="row"):
  return [{"text": f"{prefix} {i}", "id": i} for i in range(n)]


def parquet(path, table, **kwargs):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  pq.write_table(pa.table(table, **kwargs), path)
  return path


def texts(corpus):
  return [d.text for d in corpus.documents]


def check_splits(corpus):
  """Each split has documents and shares none; names are unique."""
  owned = [{d.text for d in corpus.split(s)} for s in SPLITS]
  assert all(owned)
  assert sum(map(len, owned)) == len(set.union(*owned))
  assert len({d.name for d in corpus.documents}) == len(corpus.documents)


def test_json_lines_keep_every_text_and_its_line_number(tmp_path):
  content = "\ufeff" + jsonl(rows(9)) + "\n\r\n" + jsonl([{"text": "  "}, {"text": "é\u2028\0b"}])
  got = load_corpus(write(tmp_path / "a.jsonl", content))
  assert texts(got) == [*(f"row {i}" for i in range(9)), "é\u2028\0b"]
  assert got.documents[-1].name == "row/000013"
  check_splits(got)


def test_parquet_equals_json_lines(tmp_path):
  values = rows(200)
  want = load_corpus(write(tmp_path / "a.jsonl", jsonl(values)))
  table = {"id": list(range(200)), "content": [r["text"] for r in values]}
  got = load_corpus(parquet(tmp_path / "b.parquet", table), text_field="content")
  assert got.documents == want.documents
  check_splits(got)
  assert len(got.split("validation")) == 4  # 2 %


def test_a_folder_is_its_data_files_in_order(tmp_path):
  write(tmp_path / "b.txt", "beta\n" * 300)
  write(tmp_path / "a" / "z.jsonl", jsonl(rows(5)))
  for ignored in (".git/x.txt", "a/.hidden.txt", "notes.md", "image.png"):
    write(tmp_path / ignored, b"\xff\xd8")
  got = load_corpus(tmp_path)
  assert [d.name for d in got.documents] == [
    *(f"a/z.jsonl/row/{i:06d}" for i in range(1, 6)),
    "b.txt/block/000000",
  ]
  assert got.source == tmp_path.name


def test_a_glob_is_the_same_when_the_shell_expands_it(tmp_path):
  files = [write(tmp_path / f"{i}.jsonl", jsonl(rows(4, f"file {i}"))) for i in range(3)]
  quoted, expanded = load_corpus(f"{tmp_path}/*.jsonl"), load_corpus([*reversed(files)])
  assert quoted.documents == expanded.documents
  assert len(quoted.documents) == 12
  assert (quoted.source, expanded.source) == ("*.jsonl", "2.jsonl+1.jsonl+0.jsonl")
  check_splits(quoted)


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
  assert len(load_corpus(write(tmp_path / "a[1].jsonl", jsonl(rows(7)))).documents) == 7


def test_many_text_files_are_whole_documents_and_few_are_cut(tmp_path):
  long = "a line of text\n\n" * 1000
  for i in range(100):
    write(tmp_path / f"{i:03}.md", f"{i}\n{long}")
  many = load_corpus(f"{tmp_path}/*.md")
  assert (len(many.documents), many.documents[7].name) == (100, "007.md")
  check_splits(many)
  few = load_corpus(f"{tmp_path}/00*.md")
  assert len(few.documents) > 100
  assert "".join(d.text for d in few.documents if d.name.startswith("007")) == f"7\n{long}"


def test_named_sets_and_files_join(tmp_path):
  """A text that sympy holds out is not trained on because a file has it too."""
  sympy = load_corpus("sympy")
  held_out, trained = sympy.split("test")[0].text, sympy.split("train")[0].text
  copies = [{"text": held_out}, {"text": trained}]
  path = write(tmp_path / "a.jsonl", jsonl([*rows(50), *copies]))
  got = load_corpus([path, "sympy"])
  assert (got.source, got.version) == ("sympy+a.jsonl", "1.14.0")
  assert got.licence == "BSD-3-Clause, unknown"
  assert len(got.documents) == len(sympy.documents) + 52
  assert {d.split for d in got.documents if d.text == held_out} == {"test"}
  check_splits(got)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_equal_rows_share_a_split(tmp_path_factory, values):
  path = tmp_path_factory.mktemp("rows") / "a.jsonl"
  path.write_text(jsonl([{"text": str(v)} for v in values]))
  if len(set(values)) < 3:
    with pytest.raises(ValueError, match=r"empty split: .*a\.jsonl` .* is too small for train"):
      load_corpus(path)
  else:
    got = load_corpus(path)
    assert texts(got) == [str(v) for v in values]
    check_splits(got)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", r"a\.jsonl` is empty"),
    (b'\n{"text": " "}\n', r"a\.jsonl` is empty"),
    (b'{"text": "a"}\n{"text": "b"\n', r"a\.jsonl:2: not a line of JSON \(.*delimiter"),
    (b"[" * 100_000, r"a\.jsonl:1: not a line of JSON \(maximum recursion"),
    (b'\n["a"]\n', r"a\.jsonl:2: a JSON object is needed, got list"),
    (b'{"body": 1, "id": 2}\n', r"a\.jsonl:1: no field `text`, it has body, id: .*--text-field"),
    (b'{"text": null}\n', r"a\.jsonl:1: `text` must be a string, got NoneType"),
    (b'{"text": "\\ud800"}\n', r"a\.jsonl:1: `text` is not valid text \(surrogates"),
    (b'{"text": "a"}\n\n{"text": "\xe9"}\n', r"a\.jsonl:3: not UTF-8 .* at byte offset 25"),
    (b'{"text": "a"}\n\0\n', r"a\.jsonl:2: a NUL byte"),
  ],
)
def test_bad_json_lines(tmp_path, content, message):
  with pytest.raises(ValueError, match=message):
    load_corpus(write(tmp_path / "a.jsonl", content))


def test_bad_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  bad_utf8 = pa.Array.from_buffers(
    pa.string(), 1, [None, pa.array([0, 1], pa.int32()).buffers()[1], pa.py_buffer(b"\xff")]
  )
  cases = {
    "column": ({"body": ["a"]}, r"column\.parquet: no field `text`, it has body"),
    "null": ({"text": ["a", None]}, r"null\.parquet, row 2: `text` must be a string, got NoneType"),
    "number": ({"text": [1]}, r"number\.parquet, row 1: `text` must be a string, got int"),
    "bytes": ({"text": [b"a"]}, r"bytes\.parquet, row 1: `text` must be a string, got bytes"),
    "utf8": ({"text": bad_utf8}, r"utf8\.parquet` cannot be read as parquet, after row 0"),
    "empty": ({"text": pa.array([], pa.string())}, r"empty\.parquet` is empty"),
  }
  for name, (table, message) in cases.items():
    with pytest.raises(ValueError, match=message):
      load_corpus(parquet(tmp_path / f"{name}.parquet", table))
  whole = parquet(tmp_path / "whole.parquet", {"text": ["a"] * 9}).read_bytes()
  for content in (b"", b"PAR1", whole[:-9], whole[:40] + b"\xff" * 9 + whole[49:]):
    with pytest.raises(ValueError, match=r"cut\.parquet` cannot be read as parquet"):
      load_corpus(write(tmp_path / "cut.parquet", content))


def test_files_and_sources_named_twice(tmp_path):
  path = write(tmp_path / "a.jsonl", jsonl(rows(9)))
  with pytest.raises(ValueError, match=r"must not name a source twice, got a\.jsonl\+a\.jsonl"):
    load_corpus([path, path])
  with pytest.raises(ValueError, match=r"must not name a file twice, got `.*a\.jsonl`"):
    load_corpus([path, f"{tmp_path}/*.jsonl"])
  with pytest.raises(ValueError, match="at least one source"):
    load_corpus([])


def test_absent_pyarrow_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r'`pyarrow` .* pip install "jaxcomm\[parquet\]"'):
    load_corpus(write(tmp_path / "a.parquet", b"PAR1"))
