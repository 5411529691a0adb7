"""`examples/train_ladder.py`: its variants, their folders, and that it goes on where it was."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from jaxcomm.training import launch, read_metrics
from models import llama
from tests.examples.load_script import load_script

pytestmark = pytest.mark.usefixtures("with_llama", "quickly_compiled")


@pytest.fixture(scope="module")
def ladders(script):
  """The script, on the functions of `train_lm`."""
  with load_script("train_ladder") as module:
    yield module


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--residuals", "ladder", "ladder"], "`residuals` must name at least one variant, none twice"),
    (["--residuals", "none"], "invalid choice 'none' for argument '--residuals'"),
    (["--tensor", "2"], "`tensor` must be 1 for desync"),
    (["--desync-devices", "0"], "`desync_devices` must be at least 1, got 0"),
    (["--desync-devices", "3"], "divisible by `tensor_parallel_size` = 3"),
    (["--stages", "2"], "`stages` must be 1"),
    (["--overlap", "--method", "ddp"], "`overlap` must be False"),
    ([], "`out` must be given"),
  ],
)
def test_wrong_flags(ladders, capsys, tmp_path, argv, message):
  out = ["--out", str(tmp_path / "runs")] if argv else []
  with pytest.raises(SystemExit):
    launch(ladders.Config, ladders.main, [*argv, *out])
  err = capsys.readouterr().err
  assert (err.count("\n"), message in err) == (1, True), err
  assert not (tmp_path / "runs").exists()


def test_variants_have_the_sums_that_their_names_say(ladders):
  base = dataclasses.replace(llama.nano(), num_layers=4)
  found = {}
  for name in ("standard", "ladder", "parallel", "desync-2x", "desync-4x"):
    cfg = ladders.variant(base, name, 2)
    found[name] = (ladders.ladder.num_all_reduces(cfg), cfg.tensor_parallel_size)
  assert found == {
    "standard": (8, 1),
    "ladder": (8, 1),
    "parallel": (4, 1),
    "desync-2x": (4, 2),
    "desync-4x": (2, 2),
  }


@pytest.mark.slow
def test_standard_is_llama_and_a_comparison_can_grow(
  ladders, train, tiny_flags, tmp_path, monkeypatch, capsys
):
  def run(*argv):
    capsys.readouterr()
    launch(ladders.Config, ladders.main, [str(a) for a in argv])
    return capsys.readouterr().out

  small = dataclasses.replace(llama.nano(), hidden_size=16, intermediate_size=32)
  monkeypatch.setattr(llama, "nano", lambda: small)
  shared = [*tiny_flags, "--replicas", "1", "--steps", "4"]
  root = tmp_path / "runs"
  run(*shared, "--residuals", "standard", "--out", root)
  first = (root / "standard" / "metrics.jsonl").read_bytes()

  out = run("--resume", "--out", root, "--residuals", "standard", "desync-4x")
  assert out.count("compiled in") == 1
  assert (root / "standard" / "metrics.jsonl").read_bytes() == first
  train(*shared, "--method", "none", "--out", tmp_path / "llama")
  losses = {
    path: [row["loss"] for row in read_metrics(path) if "loss" in row]
    for path in (root / "standard", root / "desync-4x", tmp_path / "llama")
  }
  standard, desync, want = losses.values()
  np.testing.assert_allclose(standard, want, rtol=1e-5)
  assert desync != standard

  with (root / "comparison.csv").open() as f:
    rows = list(csv.DictReader(f))
  assert [row["residual"] for row in rows] == ["standard", "desync-4x"]
  assert [row["tokens"] for row in rows] == [str(4 * 8 * 16)] * 2
  assert [(row["all_reduces"], row["awaited"]) for row in rows] == [("4", "4"), ("1", "1")]
  gap = float(rows[1]["eval_loss"]) / float(rows[0]["eval_loss"]) - 1
  assert float(rows[1]["to_first_percent"]) == pytest.approx(100 * gap)
  assert json.loads((root / "summary.json").read_text())["runs"][1]["residual"] == "desync-4x"
  assert (root / "report.png").stat().st_size > 10_000
