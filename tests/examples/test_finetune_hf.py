"""`examples/finetune_hf.py`: a folder in, a folder out; resume; folders it must refuse."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors

import jaxcomm
import models
from jaxcomm import data
from jaxcomm.training import launch
from models import llama
from tests.examples.load_script import load_script

pytestmark = pytest.mark.usefixtures("with_llama", "quickly_compiled")
FIXTURE = pathlib.Path(__file__).parents[1] / "models" / "fixtures" / "hf" / "gqa_tied" / "model"
WORDS = "alpha beta gamma delta mean replica token wire round step outer inner loss".split()


@pytest.fixture(scope="module")
def finetune(script):
  """The script, on `train_lm`'s functions, which make each step once."""
  with load_script("finetune_hf") as module:
    yield module


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """A Hugging Face folder of 48 token ids with its tokenizer."""
  tk = pytest.importorskip("tokenizers")
  folder = shutil.copytree(FIXTURE, tmp_path_factory.mktemp("hf") / "Small")
  vocab = {w: i for i, w in enumerate(["[UNK]", "<stop>", ".", *WORDS])}
  tokenizer = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="[UNK]"))
  tokenizer.pre_tokenizer = tk.pre_tokenizers.Whitespace()
  tokenizer.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
  (folder / "generation_config.json").write_text('{"temperature": 0.5}')
  (folder / "notes.txt").write_text("not of the model")
  return folder


@pytest.fixture(scope="module")
def flags(source, text):
  return [
    *("--model", str(source), "--data", str(text), "--compressor", "none", "--lr", "1e-2"),
    *("--seq-len", "16", "--batch-size", "8", "--replicas", "2", "--eval-batches", "1"),
    *("--eval-every", "3", "--save-every", "2", "--sync-period", "3", "--schedule-steps", "6"),
  ]


@pytest.fixture
def run(finetune, flags, capsys):
  """Runs the script: what it prints."""

  def start(*argv):
    capsys.readouterr()
    launch(finetune.Config, finetune.main, [*flags, *map(str, argv)])
    return capsys.readouterr().out

  return start


@pytest.fixture
def refused(finetune, capsys):
  """The one line that flags get which must fail."""

  def start(*argv):
    capsys.readouterr()
    with pytest.raises(SystemExit):
      launch(finetune.Config, finetune.main, [str(a) for a in argv])
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err

  return start


def tensors(folder):
  return safetensors.load_file(folder / "model.safetensors")


def assert_same_folder(got, want):
  assert {p.name for p in got.iterdir()} == {p.name for p in want.iterdir()}
  for file in want.iterdir():
    assert (got / file.name).read_bytes() == file.read_bytes(), file.name


def evaluation_losses(text, *folders):
  """Of the models that `load_hf` makes of `folders`, on the sequences that a run evaluates."""
  corpus = data.prepare_text(text, tokenizer=folders[0] / "tokenizer.json")
  rows = data.load_text(corpus, split="validation", seq_len=16)
  [batch] = data.eval_batches(rows, len(rows), 1)
  loaded = [models.load_hf(folder) for folder in folders]
  loss = jax.jit(lambda params: llama.loss(params, batch, loaded[0][1])[0])
  return [float(loss(params)) for _, _, params in loaded]


@pytest.mark.slow
def test_a_folder_in_and_out_also_after_a_stop(finetune, source, text, run, tmp_path):
  before = {p.name: p.read_bytes() for p in source.iterdir()}
  out = run("--steps", "6", "--out", tmp_path / "whole")
  folder = tmp_path / "whole" / "hf-6"
  assert f"{folder}: the fine-tuned model, float32." in out
  assert {p.name: p.read_bytes() for p in source.iterdir()} == before
  copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
  assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", *copied}
  assert all((folder / name).read_bytes() == before[name] for name in copied)
  ids = {k: v for k, v in json.loads(before["config.json"]).items() if k in finetune.TOKEN_IDS}
  assert ids.items() <= json.loads((folder / "config.json").read_text()).items()

  summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
  first, last = evaluation_losses(text, source, folder)
  np.testing.assert_allclose(summary["first_eval_loss"], first, rtol=1e-6)
  np.testing.assert_allclose(summary["eval_loss"], last, rtol=1e-6)
  assert last < first - 0.05

  stopped = shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
  for name in ("checkpoints/6", "hf-6"):  # as if killed after step 4, in the middle of a round of 3
    shutil.rmtree(stopped / name)
  (stopped / "summary.json").unlink()
  assert "resumed from step 4" in run("--steps", "6", "--out", stopped, "--resume")
  assert_same_folder(stopped / "hf-6", folder)
  shutil.rmtree(stopped / "hf-6")  # as if killed before it was written
  assert "hf-6: the fine-tuned model" in run("--out", stopped, "--resume")
  assert_same_folder(stopped / "hf-6", folder)
  assert "hf-6 is there already." in run("--out", stopped, "--resume")


def test_a_dry_run_reads_no_parameters(finetune, run, monkeypatch):
  monkeypatch.setattr(finetune, "load_hf", None)
  out = run("--dry-run", "--steps", "6")
  assert "finetune_hf: Small, diloco" in out
  assert "memory per device" in out


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda f: shutil.rmtree(f), "`model` must be a folder with config.json, got"),
    (lambda f: (f / "tokenizer.json").unlink(), "`model` must have the tokenizer.json that it was"),
    (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    (
      lambda f: (f / "config.json").write_text('{"model_type": "mixtral"}'),
      "`model`: `model_type` in config.json must be 'llama', got 'mixtral'",
    ),
    (
      lambda f: (f / "config.json").rename(f / "params.json"),
      "`model`: these are weights in Meta's layout",
    ),
  ],
)
def test_folders_that_are_refused(source, flags, refused, tmp_path, change, message):
  folder = shutil.copytree(source, tmp_path / "bad")
  change(folder)
  line = refused(*flags, "--model", folder, "--out", tmp_path / "run")
  assert message in line
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "`out` must be given"),
    (["--out", "x", "--preset", "mini"], "`preset` is for new models, `model` has its own"),
    (["--out", "x", "--vocab-size", "300"], "`vocab_size` is for new models"),
    (["--out", "x", "--lr", "0"], "`lr` must be positive"),
  ],
)
def test_wrong_flags(flags, refused, argv, message):
  assert message in refused(*flags, *argv)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "noloco"])
def test_what_is_written_is_the_mean_of_the_replicas(finetune, run, tmp_path, monkeypatch, method):
  states = []
  inner = finetune.run

  def watched(config, task):
    result = inner(config, task)
    states.append(jax.device_get(result.state))
    return result

  monkeypatch.setattr(finetune, "run", watched)
  run("--steps", "6", "--method", method, "--out", tmp_path / "run")
  _, _, params = models.load_hf(tmp_path / "run" / "hf-6")
  [state] = states
  want = jaxcomm.outer_params(state.opt_state) if method == "noloco" else state.params
  assert (want["embed_VD"][0] != want["embed_VD"][1]).any()
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y.mean(0), 1e-5, 1e-7), params, want)


@pytest.mark.slow
def test_bfloat16_folders_come_out_in_bfloat16(source, run, tmp_path):
  _, cfg, params = models.load_hf(source, param_dtype="bfloat16")
  names = ("tokenizer.json", "tokenizer_config.json")
  half = tmp_path / "half"
  models.save_hf(params, cfg, half, files={name: source / name for name in names})
  out = run("--model", half, "--steps", "6", "--method", "ddp", "--out", tmp_path / "run")
  assert "hf-6: the fine-tuned model, bfloat16." in out
  got, old = tensors(tmp_path / "run" / "hf-6"), tensors(half)
  assert {x.dtype.name for x in got.values()} == {"bfloat16"}
  assert all((got[name] != old[name]).any() for name in old)


@pytest.mark.slow
def test_a_new_model(finetune, text, capsys, tmp_path, monkeypatch):
  small = dataclasses.replace(llama.nano(), hidden_size=16, num_layers=1)
  monkeypatch.setattr(llama, "nano", lambda: small)
  argv = [
    *("--preset", "nano", "--vocab-size", "300", "--data", str(text), "--steps", "4"),
    *("--seq-len", "16", "--batch-size", "8", "--replicas", "2", "--out", str(tmp_path / "run")),
  ]
  launch(finetune.Config, finetune.main, argv)
  assert "finetune_hf: new nano, diloco" in capsys.readouterr().out
  folder = tmp_path / "run" / "hf-4"
  tokenizer = data.load_tokenizer(folder / "tokenizer.json")
  config = json.loads((folder / "config.json").read_text())
  assert tokenizer.id_to_token(config["eos_token_id"]) == "<|endoftext|>"
  _, cfg, _ = models.load_hf(folder)
  assert cfg.vocab_size == 300
  assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 4e-3
