"""Sets of the library `datasets`, from folders, with the hub out of reach."""

import json
import sys

import pytest

from jaxcomm.data import load_corpus

TEXTS = [f"text number {i}" for i in range(100)]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  library = pytest.importorskip("datasets")
  monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
  monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
  return library


def write_rows(path, texts):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def count(corpus):
  return {s: len(corpus.split(s)) for s in ("train", "validation", "test")}


def test_a_folder_of_data_files(datasets, tmp_path):
  write_rows(tmp_path / "set" / "train.jsonl", TEXTS)
  got = load_corpus(f"hf:{tmp_path}/set")
  assert (got.source, got.version, got.licence) == ("hf:set", "", "unknown")
  assert [d.text for d in got.documents] == TEXTS
  assert count(got) == {"train": 96, "validation": 2, "test": 2}


def test_splits_of_the_set_keep_their_role_and_its_licence(datasets, tmp_path):
  info = datasets.DatasetInfo(license="CC0-1.0")
  parts = {"train": TEXTS[:80], "dev": TEXTS[80:95], "extra": TEXTS[95:]}
  sets = {k: datasets.Dataset.from_dict({"body": v}, info=info) for k, v in parts.items()}
  datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
  with pytest.warns(UserWarning, match="the splits extra are left out"):
    got = load_corpus(f"hf:{tmp_path}/set", text_field="body")
  assert got.licence == "CC0-1.0"
  assert [d.text for d in got.split("validation")] == TEXTS[80:95]
  assert count(got) == {"train": 79, "validation": 15, "test": 1}  # a test split cut from train


def test_a_text_in_two_splits_is_held_out(datasets, tmp_path):
  write_rows(tmp_path / "set" / "train.jsonl", TEXTS)
  write_rows(tmp_path / "set" / "test.jsonl", TEXTS[:3])
  got = load_corpus(f"hf:{tmp_path}/set")
  assert {d.split for d in got.documents if d.text in TEXTS[:3]} == {"test"}


def test_what_is_refused(datasets, tmp_path):
  write_rows(tmp_path / "set" / "train.jsonl", TEXTS)
  with pytest.raises(ValueError, match=r"set, split train: no field `body`, it has text"):
    load_corpus(f"hf:{tmp_path}/set", text_field="body")
  (tmp_path / "null").mkdir()
  (tmp_path / "null" / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
  with pytest.raises(ValueError, match=r"null, split train, row 2: `text` must be a string"):
    load_corpus(f"hf:{tmp_path}/null")
  with pytest.raises(FileNotFoundError, match=r"nowhere` is not a folder"):
    load_corpus(f"hf:{tmp_path}/nowhere")
  with pytest.raises(OSError, match=r"`hf:some-body/some-set@1234` cannot be loaded"):
    load_corpus("hf:some-body/some-set@1234")


def test_absent_library_names_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ImportError, match=r'`datasets` .* pip install "jaxcomm\[hf\]"'):
    load_corpus("hf:anything")
