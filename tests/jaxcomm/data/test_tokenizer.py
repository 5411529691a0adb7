"""Byte-level BPE: every text round-trips, the same text gives the same tokenizer."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import find_end_of_text, load_tokenizer, train_tokenizer

TEXTS = ["def f(x):\n  return x + 1\n" * 5, "to be or not to be", "für Elise \U0001f3b9"]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(TEXTS, vocab_size=300)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_round_trip(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_end_of_text_written_in_a_document_is_plain_text(tokenizer, tmp_path):
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  for tk in (tokenizer, load_tokenizer(tmp_path / "tokenizer.json")):
    eot = tk.token_to_id("<|endoftext|>")
    ids = tk.encode("a<|endoftext|>b").ids
    assert eot == 0
    assert eot not in ids
    assert tk.decode(ids) == "a<|endoftext|>b"


def test_vocabulary_size(tokenizer):
  assert tokenizer.get_vocab_size() <= 300
  assert train_tokenizer(TEXTS, vocab_size=257).get_vocab_size() == 257
  assert train_tokenizer([" ".join(map(str, range(9999)))], 400).get_vocab_size() == 400


def test_same_tokenizer_in_other_processes_and_thread_counts():
  code = (
    "import hashlib; from jaxcomm.data import train_tokenizer\n"
    "texts = [f'{i} times {i * i} is {i ** 3}, or so they say' for i in range(3000)]\n"
    "print(hashlib.sha256(train_tokenizer(texts, 600).to_str().encode()).hexdigest())"
  )

  def run(threads):
    env = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, check=True, capture_output=True, timeout=120).stdout

  texts = [f"{i} times {i * i} is {i**3}, or so they say" for i in range(3000)]
  here = hashlib.sha256(train_tokenizer(texts, 600).to_str().encode()).hexdigest().encode()
  assert run(1).strip() == run(3).strip() == here


@pytest.mark.parametrize("vocab_size", [-1, 0, 256, 2**32 + 1])
def test_bad_vocab_size(vocab_size):
  with pytest.raises(ValueError, match=rf"`vocab_size` must be in \[257, .*, got {vocab_size}"):
    train_tokenizer(TEXTS, vocab_size)


@pytest.mark.parametrize("documents", [[], ["", ""]])
def test_no_text(documents):
  with pytest.raises(ValueError, match="`documents` must hold text"):
    train_tokenizer(documents, 300)


def test_missing_extra_names_the_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r'`tokenizers` .* pip install "jaxcomm\[train\]"'):
    train_tokenizer(TEXTS, 300)


# Files of the user.


def word_level(path, *names, config=None):
  """A tokenizer.json of words, as another library saves it: it pads, cuts and adds a prefix."""
  tk = pytest.importorskip("tokenizers")
  vocab = {name: i for i, name in enumerate(["[UNK]", *names, "to", "be"])}
  tokenizer = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tk.pre_tokenizers.Whitespace()
  tokenizer.post_processor = tk.processors.TemplateProcessing("to $A", None, [("to", vocab["to"])])
  tokenizer.enable_padding(length=9)
  tokenizer.enable_truncation(1)
  tokenizer.save(str(path / "tokenizer.json"))
  if config is not None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  return path / "tokenizer.json"


def test_a_file_of_another_library_neither_pads_nor_cuts(tmp_path):
  tokenizer = load_tokenizer(word_level(tmp_path, "</s>"))
  assert tokenizer.encode("be be to", add_special_tokens=False).tokens == ["be", "be", "to"]


@pytest.mark.parametrize(
  ("names", "config", "want"),
  [
    (["x", "</s>"], None, 2),
    (["</s>", "<|endoftext|>"], None, 2),
    (["<|endoftext|>", "mine"], {"eos_token": "mine"}, 2),
    (["<|endoftext|>", "mine"], {"eos_token": {"content": "mine", "lstrip": False}}, 2),
    (["<|endoftext|>", "mine"], {"model_max_length": 9}, 1),
  ],
)
def test_end_of_text(tmp_path, names, config, want):
  assert find_end_of_text(word_level(tmp_path, *names, config=config)) == want


@pytest.mark.parametrize(
  ("names", "config", "message"),
  [
    ([], None, r"must have an end-of-text token, .*</s>.* `tokenizer_config\.json` beside it"),
    (["</s>"], {"eos_token": "<end>"}, r"`eos_token` '<end>' of .* is not in the vocabulary"),
    (["</s>"], [], r"tokenizer_config\.json` is not a JSON object"),
  ],
)
def test_no_end_of_text(tmp_path, names, config, message):
  path = word_level(tmp_path, *names, config=config)
  with pytest.raises(ValueError, match=message):
    find_end_of_text(path)


def test_files_that_are_no_tokenizer(tmp_path):
  path = tmp_path / "tokenizer.json"
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json` does not exist"):
    load_tokenizer(path)
  with pytest.raises(IsADirectoryError, match="is a directory, a file is needed"):
    load_tokenizer(tmp_path)
  for content in (b"", b"{}", b'{"version": "1.0"', b"[1]"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json` is not a tokenizer"):
      load_tokenizer(path)
  path.write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"tokenizer\.json:1: not UTF-8"):
    load_tokenizer(path)
