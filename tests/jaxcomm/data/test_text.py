"""The cache of tokens: what it holds, that it is verified, atomic and safe between processes."""

import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from jaxcomm.data import (
  load_corpus,
  load_tokenizer,
  prepare_mixture,
  prepare_text,
  provenance,
  train_tokenizer,
)
from jaxcomm.data import text as text_module

SPLITS = ("train", "validation", "test")


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "squares.txt"
  lines = (f"{i} squared is {i * i}, <|endoftext|> é.\n\n" for i in range(1500))
  path.write_text("".join(lines), encoding="utf-8")
  return path


@pytest.fixture
def prepared(source, tmp_path):
  return prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache")


def check_against_documents(corpus, source, split):
  """Every stored document decodes to its text, ends with one eot, and lengths add up."""
  documents = load_corpus(source).split(split)
  tokenizer = load_tokenizer(corpus.tokenizer_path)
  tokens, offsets = corpus.tokens(split), corpus.offsets(split)
  assert len(offsets) == len(documents) + 1
  assert (offsets[0], offsets[-1]) == (0, len(tokens))
  assert np.diff(offsets).sum() == len(tokens)
  ends = np.flatnonzero(tokens == corpus.eot_id)
  np.testing.assert_array_equal(ends, offsets[1:] - 1)  # only we end documents
  stored = [tokens[a : b - 1].tolist() for a, b in itertools.pairwise(offsets)]
  assert tokenizer.decode_batch(stored, skip_special_tokens=False) == [d.text for d in documents]
  counts = {"documents": len(documents), "tokens": len(tokens)}
  counts["bytes"] = sum(len(d.text.encode()) for d in documents)
  assert corpus.meta["splits"][split] == counts


@pytest.mark.parametrize("split", SPLITS)
def test_documents_round_trip(prepared, source, split):
  check_against_documents(prepared, source, split)
  assert prepared.tokens(split).max() < prepared.vocab_size


def test_files_are_memory_maps_with_declared_types(prepared):
  for split in SPLITS:
    tokens, offsets = prepared.tokens(split), prepared.offsets(split)
    assert isinstance(tokens, np.memmap)
    assert (tokens.dtype, offsets.dtype) == (np.uint16, np.int64)
    assert not tokens.flags.writeable


def test_meta_records_the_source_and_every_file(prepared, source):
  meta = json.loads((prepared.directory / "meta.json").read_text())
  assert meta == prepared.meta
  assert meta["source"] == "squares.txt"
  assert meta["text_sha256"] == load_corpus(source).sha256()
  names = {p.name for p in prepared.directory.iterdir()} - {"meta.json"}
  assert set(meta["files"]) == names
  for name, entry in meta["files"].items():
    data = (prepared.directory / name).read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_large_vocabulary_is_stored_in_uint32(source, tmp_path):
  for size, dtype in ((65536, np.uint16), (65537, np.uint32)):
    got = prepare_text(source, vocab_size=size, cache_dir=tmp_path)
    assert (got.tokens("test").dtype, got.vocab_size) == (dtype, size)


def test_small_vocabulary_is_reported(source, tmp_path, caplog):
  got = prepare_text(source, vocab_size=60000, cache_dir=tmp_path)
  assert got.meta["tokenizer"]["entries"] < 60000
  assert "fewer than the 60000 asked for" in caplog.text


def test_second_call_reads_the_cache(prepared, source, tmp_path, monkeypatch):
  monkeypatch.setattr(text_module, "_build", None)
  assert prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache") == prepared


def test_cache_follows_text_and_vocab_size(prepared, source, tmp_path):
  other = prepare_text(source, vocab_size=301, cache_dir=tmp_path / "cache")
  source.write_text(source.read_text() + "one more line\n")
  changed = prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache")
  assert len({prepared.directory, other.directory, changed.directory}) == 3


def test_same_input_gives_the_same_files(prepared, source, tmp_path):
  again = prepare_text(source, vocab_size=300, cache_dir=tmp_path / "other")
  assert again.meta == prepared.meta


def test_cache_directory_comes_from_the_environment(source, tmp_path, monkeypatch):
  monkeypatch.setenv("JAXCOMM_CACHE", str(tmp_path / "env"))
  assert (tmp_path / "env") in prepare_text(source, vocab_size=300).directory.parents
  monkeypatch.delenv("JAXCOMM_CACHE")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  found = prepare_text(source, vocab_size=300).directory
  assert (tmp_path / "home" / ".cache" / "jaxcomm") in found.parents


def flip_byte(path):
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip_byte, truncate, os.remove])
@pytest.mark.parametrize("name", ["train.tokens.npy", "test.offsets.npy", "tokenizer.json"])
def test_damaged_file_is_rebuilt_with_a_warning(prepared, source, tmp_path, damage, name):
  good = (prepared.directory / name).read_bytes()
  damage(prepared.directory / name)
  with pytest.warns(UserWarning, match="rebuilding the damaged cache"):
    again = prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache")
  assert again == prepared
  assert (again.directory / name).read_bytes() == good
  assert not (again.directory / "damaged").exists()


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"files": {}}', '{"files": []}'])
def test_damaged_meta_is_rebuilt_with_a_warning(prepared, source, tmp_path, content):
  (prepared.directory / "meta.json").write_text(content)
  with pytest.warns(UserWarning, match="rebuilding the damaged cache"):
    again = prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache")
  assert again.meta == prepared.meta


def test_failed_build_leaves_nothing_behind(source, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(np, "save", full)
  with pytest.raises(OSError, match="No space left"):
    prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache")
  left = [p for p in (tmp_path / "cache" / "text").iterdir() if p.suffix != ".lock"]
  assert left == []
  monkeypatch.undo()
  assert prepare_text(source, vocab_size=300, cache_dir=tmp_path / "cache").tokens("train").size


def test_processes_that_race_build_once_and_agree(source, tmp_path):
  code = (
    "import logging, sys; from jaxcomm.data import prepare_text\n"
    "logging.basicConfig(level=logging.INFO)\n"
    "c = prepare_text(sys.argv[1], vocab_size=300, cache_dir=sys.argv[2])\n"
    "print(c.tokens('train').sum())"
  )
  command = [sys.executable, "-c", code, str(source), str(tmp_path / "cache")]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
  results = [p.communicate(timeout=120) for p in processes]
  assert [p.returncode for p in processes] == [0, 0, 0]
  assert len({out for out, _ in results}) == 1
  assert sum("training a tokenizer" in log for _, log in results) == 1


@pytest.mark.parametrize("vocab_size", [0, 256])
def test_bad_vocab_size_is_refused_before_reading(tmp_path, vocab_size):
  with pytest.raises(ValueError, match=f"`vocab_size` must be .* got {vocab_size}"):
    prepare_text(tmp_path / "absent.txt", vocab_size=vocab_size)


def test_unknown_split(prepared):
  with pytest.raises(ValueError, match="`split` must be one of"):
    prepared.tokens("dev")


@pytest.fixture
def own_tokenizer(tmp_path):
  """A byte-level tokenizer of 280 entries, and another end-of-text token."""
  tokenizer = train_tokenizer(["one squared is one, and so on"] * 9, 279)
  tokenizer.add_special_tokens(["</s>"])
  (tmp_path / "own").mkdir()
  tokenizer.save(str(tmp_path / "own" / "tokenizer.json"))
  (tmp_path / "own" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
  return tmp_path / "own" / "tokenizer.json"


def test_a_tokenizer_of_ones_own(source, own_tokenizer, tmp_path):
  size = load_tokenizer(own_tokenizer).get_vocab_size()
  got = prepare_text(source, tokenizer=own_tokenizer, cache_dir=tmp_path / "cache")
  assert (got.vocab_size, got.eot_id) == (size, size - 1)
  assert got.tokenizer_path.read_bytes() == own_tokenizer.read_bytes()
  assert got.meta["tokenizer"]["trained_on"] is None
  for split in SPLITS:
    check_against_documents(got, source, split)
  again = prepare_text(source, tokenizer=own_tokenizer, vocab_size=size, cache_dir=tmp_path)
  assert again.meta == got.meta
  with pytest.raises(ValueError, match=rf"`vocab_size` must be at least the {size} token ids of"):
    prepare_text("nowhere", tokenizer=own_tokenizer, vocab_size=size - 1)


def test_another_end_of_text_is_another_entry(source, own_tokenizer, tmp_path):
  first = prepare_text(source, tokenizer=own_tokenizer, cache_dir=tmp_path)
  own_tokenizer.with_name("tokenizer_config.json").unlink()
  second = prepare_text(source, tokenizer=own_tokenizer, cache_dir=tmp_path)
  assert (second.eot_id, second.directory == first.directory) == (0, False)


@pytest.fixture
def second_source(source, tmp_path):
  """Rows of other text, and one that `source` holds out."""
  path = tmp_path / "cubes.jsonl"
  held_out = load_corpus(source).split("test")[0].text
  texts = [held_out, *(f"{i} cubed is {i**3}" for i in range(300))]
  path.write_text("".join(json.dumps({"body": t}) + "\n" for t in texts))
  return path


def test_a_mixture_shares_tokenizer_and_held_out_texts(source, second_source, tmp_path):
  options = {"vocab_size": 300, "text_field": "body", "cache_dir": tmp_path}
  parts = prepare_mixture([source, second_source], **options)
  assert [p.meta["source"] for p in parts] == ["squares.txt", "cubes.jsonl"]
  assert len({p.tokenizer_path.read_bytes() for p in parts}) == 1
  assert len({(p.vocab_size, p.eot_id) for p in parts}) == 1
  tokenizer = load_tokenizer(parts[0].tokenizer_path)
  first = {s: tokenizer.decode(parts[0].tokens(s), skip_special_tokens=False) for s in SPLITS}
  second = {s: tokenizer.decode(parts[1].tokens(s), skip_special_tokens=False) for s in SPLITS}
  assert "squared" in first["test"]
  assert "squared" in second["test"]
  assert "squared" not in second["train"]
  assert prepare_mixture([source, second_source], **options) == parts  # from the cache
  data = provenance(parts)
  assert data["name"] == "squares.txt+cubes.jsonl"
  assert data["sha256"] == "+".join(p.meta["text_sha256"] for p in parts)


def test_what_a_mixture_refuses(source, tmp_path):
  for sources, message in (([], "at least one source"), (str(source), "must be a list")):
    with pytest.raises(ValueError, match=message):
      prepare_mixture(sources)
  with pytest.raises(ValueError, match=r"must not name a source twice, got .*squares\.txt"):
    prepare_mixture([source, source], cache_dir=tmp_path)


def test_provenance_of_the_default(tmp_path, prepared):
  assert provenance([prepared]) == {
    "name": "squares.txt",
    "version": "",
    "licence": "unknown",
    "sha256": prepared.meta["text_sha256"],
    "tokens_sha256": prepared.meta["files"]["train.tokens.npy"]["sha256"],
  }


@pytest.mark.slow
def test_sympy_at_the_default_vocabulary(tmp_path):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    corpus = prepare_text(cache_dir=tmp_path)
  assert (corpus.vocab_size, corpus.meta["tokenizer"]["entries"]) == (8192, 8192)
  tokens = sum(corpus.meta["splits"][s]["tokens"] for s in SPLITS)
  assert abs(tokens - 8.32e6) < 0.02e6
  for split in SPLITS:
    check_against_documents(corpus, "sympy", split)
