"""`examples/train_lm.py` on every kind of data: a few steps each, and what bad data gets."""

import json
import pathlib
import random

import pytest

from jaxcomm.training import read_metrics

STEPS = 6  # and the schedule: the step is that of `short`


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Small files of every kind."""
  path, rng = tmp_path_factory.mktemp("kinds"), random.Random(0)
  words = "alpha beta gamma delta mean replica token wire round step outer inner loss".split()
  texts = [" ".join(rng.choices(words, k=60)) + ".\n" for _ in range(300)]
  (path / "many").mkdir()
  for i, text in enumerate(texts[:120]):
    (path / "many" / f"{i}.txt").write_text(text)
  (path / "a.txt").write_text("\n".join(texts))
  for name, field in (("b", "text"), ("c", "content")):
    rows = (json.dumps({"id": i, field: f"{name} {text}"}) for i, text in enumerate(texts))
    (path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
  return path


def parquet(folder):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  (folder / "columns").mkdir(exist_ok=True)
  texts = [json.loads(line)["text"] for line in (folder / "b.jsonl").read_text().splitlines()]
  pq.write_table(pa.table({"content": texts}), folder / "columns" / "part.parquet")
  return folder / "columns"


def tokenizer(folder, num_ids=300):
  """A Hugging Face file with `num_ids` ids."""
  tk = pytest.importorskip("tokenizers")
  vocab = {w: i for i, w in enumerate(["<eos>", "[UNK]", "alpha", "beta", "gamma", "."])}
  words = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="[UNK]"))
  words.pre_tokenizer = tk.pre_tokenizers.Whitespace()
  words.add_tokens([f"extra{i}" for i in range(num_ids - 6)])
  path = folder / f"tokenizer-{num_ids}.json"
  words.save(str(path))
  return path


def flags_of(kind, folder, monkeypatch):
  """The flags that ask for a kind of data, and the name it gets in the summary."""
  if kind == "text":
    return ["--data", folder / "a.txt"], "a.txt"
  if kind == "jsonl":
    return ["--data", folder / "b.jsonl"], "b.jsonl"
  if kind == "field":
    return ["--data", folder / "c.jsonl", "--text-field", "content"], "c.jsonl"
  if kind == "folder":
    return ["--data", folder / "many"], "many"
  if kind == "glob":
    return ["--data", f"{folder}/**/[a1]*.txt"], "[a1]*.txt"
  if kind == "several":
    return ["--data", folder / "a.txt", folder / "b.jsonl"], "a.txt+b.jsonl"
  if kind == "mixture":
    sources = ["--data", folder / "a.txt", folder / "b.jsonl", "--data-weights", "0.7", "0.3"]
    return sources, "a.txt+b.jsonl"
  if kind == "tokenizer":
    return ["--data", folder / "a.txt", "--tokenizer", tokenizer(folder)], "a.txt"
  if kind == "parquet":
    return ["--data", parquet(folder), "--text-field", "content"], "columns"
  assert kind == "hf"
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf-cache")
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  return ["--data", f"hf:{parquet(folder)}", "--text-field", "content"], "hf:columns"


KINDS = (
  "text",
  "jsonl",
  "field",
  "folder",
  "glob",
  "several",
  "mixture",
  "tokenizer",
  "parquet",
  "hf",
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_trains_on(kind, folder, train, tiny_flags, tmp_path, monkeypatch):
  flags, name = flags_of(kind, folder, monkeypatch)
  train(*tiny_flags, *flags, "--steps", STEPS, "--save-every", "0", "--out", tmp_path / "run")
  losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
  assert len(losses) == STEPS
  assert losses[-1] < losses[0]
  data = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]
  assert (data["name"], set(data["licence"].split("+"))) == (name, {"unknown"})
  assert {len(h) for key in ("sha256", "tokens_sha256") for h in data[key].split("+")} == {64}


@pytest.mark.slow
def test_a_mixture_resumes_on_the_batches_it_would_have_had(folder, train, tiny_flags, tmp_path):
  flags = [*tiny_flags, *flags_of("mixture", folder, None)[0], "--schedule-steps", "6"]
  train(*flags, "--steps", "9", "--out", tmp_path / "whole")
  train(*flags, "--steps", "4", "--out", tmp_path / "run")
  train("--resume", "--steps", "9", "--out", tmp_path / "run")

  def losses(path):
    return [(row["step"], row["loss"]) for row in read_metrics(path) if "loss" in row]

  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  saved = json.loads((tmp_path / "run" / "config.json").read_text())
  assert saved["data_weights"] == [0.7, 0.3]


def test_a_tokenizer_with_more_ids_than_the_model(folder, fails, tiny_flags, tmp_path):
  flags = ["--data", folder / "a.txt", "--tokenizer", tokenizer(folder, num_ids=306)]
  code, line = fails(*tiny_flags, *flags, "--out", tmp_path / "run")
  assert code == 1
  assert "`vocab_size` must be at least the 306 token ids of" in line
  assert "got 300" in line


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--data", "a", "b", "--data-weights", "1"], "`data_weights` must be a positive number for"),
    (["--data", "a", "--data-weights", "0"], "each of the 1 sources in `data`, got [0.0]"),
    (["--data-weights", "nan"], "got [nan]"),
  ],
)
def test_wrong_weights(fails, tiny_flags, argv, message):
  code, line = fails(*tiny_flags, *argv)
  assert code == 2
  assert message in line


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("x.jsonl", b'{"text": "a"}\n{"text": 1}\n', "x.jsonl:2: `text` must be a string, got int"),
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl:2: not a line of JSON"),
    ("x.jsonl", b'{"body": "a"}\n', "x.jsonl:1: no field `text`, it has body"),
    ("x.jsonl", b'{"text": "a"}\n\xff\n', "x.jsonl:2: not UTF-8"),
    ("x.jsonl", b"", "x.jsonl` is empty"),
    ("x.parquet", b"PAR1", "x.parquet` cannot be read as parquet"),
    ("empty/x.md", b"text", "empty` holds no file"),
  ],
)
def test_bad_data_is_one_line(fails, tiny_flags, tmp_path, name, content, message):
  if name.endswith("parquet"):
    pytest.importorskip("pyarrow")
  path = tmp_path / name
  path.parent.mkdir(exist_ok=True)
  path.write_bytes(content)
  source = path.parent if pathlib.Path(name).suffix == ".md" else path
  code, line = fails(*tiny_flags, "--data", source, "--out", tmp_path / "run")
  assert code == 1
  assert message in line
  assert not (tmp_path / "run").exists()
