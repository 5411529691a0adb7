"""The comparison: its flags, its model of time, and that it goes on where it was stopped."""

import csv
import json
import os
import signal
import sys

import numpy as np
import pytest

from jaxcomm.training import launch, load_config, read_metrics
from tests.examples.load_script import load_script

METHODS = ["--methods", "ddp", "diloco --sync-period 2"]
pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.fixture(scope="module")
def compare(script):
  """The module, whose runs are those of `script`."""
  with load_script("compare_methods", "compare_report") as module:
    yield module


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--methods", "ddp", "sgd"], "invalid choice 'sgd' for argument '--method'"),
    (["--methods", "ddp", "diloco --steps 9"], "`methods` must be given flags of methods only"),
    (["--methods", "ddp", "ddp"], "`methods` must differ, got 'ddp' twice"),
    (["--methods", "ddp --sync-period 0"], "`sync_period` must be at least 1, got 0"),
    (["--link-mbits", "10", "0"], "`link_mbits` must be positive numbers, at least one, got"),
    (["--eval-every", "0"], "`eval_every` must be at least 1"),
    (["--method", "ddp"], "Unrecognized options: --method, ddp"),
    ([], "`out` must be given"),
  ],
)
def test_wrong_flags(compare, capsys, tmp_path, argv, message):
  out = ["--out", str(tmp_path / "runs")] if argv else []
  with pytest.raises(SystemExit) as exit_info:
    launch(compare.CompareConfig, compare.main, [*argv, *out])
  err = capsys.readouterr().err
  assert (exit_info.value.code, err.count("\n"), message in err) == (2, 1, True), err
  assert not (tmp_path / "runs").exists()


def test_methods_may_have_flags_of_their_own(compare):
  config = compare.CompareConfig(
    out="x", lr=1e-3, methods=["none", "diloco --sync-period 4 --lr 2e-3", "diloco"]
  )
  runs = {name: (r.method, r.sync_period, r.lr) for name, r in config.runs.items()}
  assert runs == {
    "none": ("none", 20, 1e-3),
    "diloco_sync-period_4_lr_2e-3": ("diloco", 4, 2e-3),
    "diloco": ("diloco", 20, 1e-3),
  }


def test_modelled_time_and_what_is_left_behind(compare, tmp_path):
  folder = tmp_path / "a"
  folder.mkdir()
  rows = [
    {"step": 0, "eval_loss": 5.0},
    {"step": 10, "loss": 4.5, "tokens_per_s": 800.0, "wire_bytes_total": 4e6},
    {"step": 20, "eval_loss": 4.0, "tokens_per_s": 600.0, "wire_bytes_total": 9e6},
    {"step": 30, "loss": 3.5, "tokens_per_s": 1e9, "wire_bytes_total": 9e6},
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  summary = {"steps": 30, "wire_bytes_per_step": {"replica": 4e5, "fsdp": 5e4}}
  (folder / "summary.json").write_text(json.dumps(summary))
  report = sys.modules["compare_report"]
  run = report.read_run(folder, 80)
  np.testing.assert_allclose(run.sent, [0.0, 8e6])  # without what stays inside a replica
  # 20 steps of 80 / 800 s, and 64 Mbit.
  np.testing.assert_allclose(run.seconds(16.0), [0.0, 2.0 + 4.0])
  (row,) = table = report.table([run], [16.0, 64.0])
  assert (row["tokens"], row["seconds_at_64_mbits"]) == (2400, pytest.approx(3.0))
  assert report.format_table(table).splitlines()[1].split() == (
    ["a", "4.0000", "8.00", "MB", "100.0", "6.0", "3.0"]
  )
  report.draw(tmp_path / "report.png", [run], [16.0, 64.0], "title")
  assert (tmp_path / "report.png").stat().st_size > 10_000


class Stopping:
  """Batches that ask the process to end when the third is taken: in the middle of a round."""

  def __init__(self, batches):
    self.batches, self.taken = batches, 0

  def __next__(self):
    self.taken += 1
    if self.taken == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return next(self.batches)

  def get_state(self):
    return self.batches.get_state()


def rows_of(path):
  return [{**row, "tokens_per_s": 0} for row in read_metrics(path)]


@pytest.mark.slow
def test_a_comparison_stopped_in_its_second_run(
  compare, script, train, tiny_flags, tmp_path, capsys, monkeypatch
):
  def run(*argv):
    capsys.readouterr()
    launch(compare.CompareConfig, compare.main, [str(a) for a in argv])
    return capsys.readouterr().out

  build_data = script.build_data

  def stopping(config, *args):
    batches, evaluation = build_data(config, *args)
    return Stopping(batches) if config.method == "diloco" else batches, evaluation

  root, shared = tmp_path / "runs", [*tiny_flags, "--steps", "5"]
  with monkeypatch.context() as patch:
    patch.setattr(script, "build_data", stopping)
    out = run(*shared, *METHODS, "--out", root)
  ours = root / "diloco_sync-period_2"
  assert out.rstrip().endswith(f"saved step 3 in {ours}; --resume continues.")
  assert not (root / "report.png").exists()
  first = (root / "ddp" / "metrics.jsonl").read_bytes()

  out = run("--resume", "--out", root)
  assert out.count("compiled in") == out.count("resumed from step 3.") == 1
  assert (root / "ddp" / "metrics.jsonl").read_bytes() == first
  train(*shared, "--method", "diloco", "--sync-period", "2", "--out", tmp_path / "alone")
  assert rows_of(ours) == rows_of(tmp_path / "alone")

  # All are finished: drawn again, at another speed.
  out = run("--resume", "--out", root, "--link-mbits", "5")
  assert "compiled in" not in out
  assert load_config(root)["link_mbits"] == [5.0]
  with (root / "comparison.csv").open() as f:
    ddp, diloco = csv.DictReader(f)
  assert float(diloco["eval_loss"]) == rows_of(ours)[-1]["eval_loss"]
  assert ddp["tokens"] == diloco["tokens"] == str(5 * 8 * 16)
  assert float(ddp["bytes_sent"]) == pytest.approx(5 / 2 * float(diloco["bytes_sent"]))
  seconds = 5 * float(ddp["step_seconds"]) + 8 * float(ddp["bytes_sent"]) / 5e6
  assert float(ddp["seconds_at_5_mbits"]) == pytest.approx(seconds)
  assert json.loads((root / "summary.json").read_text())["runs"][1]["method"] == ours.name
  assert (root / "report.png").stat().st_size > 10_000
