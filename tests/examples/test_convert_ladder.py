"""`examples/convert_ladder.py`: its three losses, resume, sources that it must refuse."""

import dataclasses
import json
import shutil

import pytest

from jaxcomm.training import launch
from models import llama
from tests.examples.load_script import load_script

pytestmark = pytest.mark.usefixtures("with_llama", "quickly_compiled")


@pytest.fixture(scope="module")
def convert(script):
  """The script, on the functions of `train_lm`."""
  with load_script("convert_ladder") as module:
    yield module


@pytest.fixture
def run(convert, capsys):
  """Runs the script: what it prints."""

  def start(*argv):
    capsys.readouterr()
    launch(convert.Config, convert.main, [str(a) for a in argv])
    return capsys.readouterr().out

  return start


def read(path):
  return json.loads((path / "summary.json").read_text())


def save_run(path, **flags):
  """What a run leaves behind, in part."""
  (path / "checkpoints").mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(flags))


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--ladder-layers", "0"], "`ladder_layers` must be at least 1, got 0"),
    (["--ladder-layers", "5"], "`ladder_layers` must be in [0, 4], got 5"),
    (["--retrain-steps", "0"], "`retrain_steps` must be at least 1, got 0"),
    (["--retrain-lr", "0"], "`retrain_lr` must be positive and finite, got 0.0"),
    (["--seq-shards", "2"], "`seq_shards` must be 1"),
    (["--model", "other"], "`model` must be a run of train_lm.py, got one of another script"),
    (["--model", "stopped"], "`model` must be a run that has finished"),
    (["--model", "missing"], "`model` must be a folder with config.json, got"),
  ],
)
def test_wrong_flags(run, capsys, tmp_path, monkeypatch, argv, message):
  monkeypatch.chdir(tmp_path)
  save_run(tmp_path / "other", model="llama", residuals=["ladder"])
  save_run(tmp_path / "stopped", model="llama")
  with pytest.raises(SystemExit):
    run(*argv, "--out", "runs")
  err = capsys.readouterr().err
  assert (err.count("\n"), message in err) == (1, True), err
  assert not (tmp_path / "runs").exists()


def test_a_share_of_the_jump(convert, tmp_path):
  summary = {"first_eval_loss": 3.5, "eval_loss": 3.1, "steps": 5}
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  _, model = convert.ladder.convert_to_ladder(None, llama.tiny(), 2)
  result = convert.summarise(3.0, model, tmp_path)
  assert result["recovered"] == pytest.approx(0.8)
  assert result["ladder_layers"] == (2, 3)
  assert convert.describe(result).splitlines() == [
    "           eval loss  above the Llama",
    "Llama         3.0000          +0.0000",
    "converted     3.5000          +0.5000",
    "retrained     3.1000          +0.1000",
    "80.0 % of the jump recovered in 5 steps.",
  ]
  assert convert.summarise(3.6, model, tmp_path)["recovered"] is None  # there was no jump


@pytest.mark.slow
def test_a_llama_is_trained_converted_and_retrained(run, tiny_flags, tmp_path, monkeypatch):
  small = dataclasses.replace(llama.nano(), hidden_size=16, intermediate_size=32)
  monkeypatch.setattr(llama, "nano", lambda: small)
  shared = ["--replicas", "1", "--retrain-steps", "3", "--retrain-lr", "1e-3"]
  root = tmp_path / "runs"
  run(*tiny_flags, *shared, "--steps", "6", "--out", root)
  result, retrained = read(root), read(root / "ladder")
  assert result["ladder_layers"] == [1]
  assert result["loss_of_llama"] == pytest.approx(read(root / "llama")["eval_loss"], rel=1e-5)
  assert result["loss_converted"] == retrained["first_eval_loss"] != result["loss_of_llama"]
  assert result["loss_retrained"] == retrained["eval_loss"] < result["loss_converted"]

  # As if stopped before the retraining: the same to the bit.
  again = shutil.copytree(root, tmp_path / "again")
  shutil.rmtree(again / "ladder")
  (again / "summary.json").unlink()
  assert run("--resume", "--out", again).count("compiled in") == 1
  assert read(again) == result
