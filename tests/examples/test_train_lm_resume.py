"""Ways to resume `examples/train_lm.py`, and ways that are refused with the folder untouched."""

import json
import os
import re
import shutil
import signal

import matplotlib.image
import numpy as np
import pytest

from jaxcomm.training import _run as training_run
from jaxcomm.training import load_config, read_metrics

pytestmark = pytest.mark.slow


def contents(path):
  return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def rows_of(path):
  return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(path)]


def losses_of(path):
  return [row["loss"] for row in read_metrics(path) if "loss" in row]


# Refused.


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--lr", "0.5"], "another configuration than .* was started with: lr: 0.004 -> 0.5"),
    (["--method", "ddp", "--seed", "3"], "method: 'diloco' -> 'ddp', seed: 0 -> 3"),
    (["--sync-period", "5"], "sync_period: 4 -> 5"),
    (["--replicas", "4"], r"holds 2 replicas, this run has 4: .* \(--replica-change\)"),
  ],
)
def test_another_configuration(fails, run, argv, message):
  before = contents(run)
  code, line = fails("--resume", "--out", run, "--steps", "9", *argv)
  assert code == 1
  assert re.search(message, line), line
  assert contents(run) == before


def test_changed_data_under_the_same_name(fails, run, text):
  before, original = contents(run), text.read_text()
  text.write_text(original.replace("alpha", "omega"))
  try:
    code, line = fails("--resume", "--out", run, "--steps", "9")
  finally:
    text.write_text(original)
  assert code == 1
  assert "the run was trained on the data" in line
  assert contents(run) == before


def test_all_checkpoints_damaged(fails, run):
  for path in (run / "checkpoints").rglob("manifest.ocdbt"):
    path.write_bytes(b"")
  before = contents(run)
  code, line = fails("--resume", "--out", run, "--steps", "9")
  assert code == 1
  assert "no usable checkpoint in" in line
  assert "steps [3, 6] are all damaged" in line
  assert contents(run) == before


def test_checkpoints_gone(fails, run):
  """Starting again from step 0 would overwrite the metrics of a finished run."""
  shutil.rmtree(run / "checkpoints")
  before = contents(run)
  code, line = fails("--resume", "--out", run, "--steps", "9")
  assert code == 1
  assert "reached step 6, but its checkpoints are gone: it cannot go on" in line
  assert contents(run) == before


def test_a_finished_run(train, run):
  before = contents(run)
  for argv in ([], ["--steps", "6"], ["--steps", "5"]):
    out = train("--resume", "--out", run, *argv)
    assert "has already finished, at step 6: nothing to do" in out
  assert contents(run) == before


# Continued.


def test_more_steps_on_the_same_schedule(train, tiny_flags, run, tmp_path):
  """As one run of 9 steps with a schedule of 6, bit for bit."""
  out = train("--resume", "--out", run, "--steps", "9")
  assert "resumed from step 6." in out
  assert "done: 9 steps" in out
  config = load_config(run)
  assert (config["steps"], config["schedule_steps"]) == (9, 6)
  train(*tiny_flags, "--steps", "9", "--schedule-steps", "6", "--out", tmp_path / "once")
  assert rows_of(run) == rows_of(tmp_path / "once")
  assert json.loads((run / "summary.json").read_text())["steps"] == 9


def test_summary_and_report_of_a_run_killed_just_before_them(train, run):
  want = json.loads((run / "summary.json").read_text())
  rows = rows_of(run)
  for name in ("summary.json", "report.png"):
    (run / name).unlink()
  out = train("--resume", "--out", run)
  assert "resumed from step 6." in out
  got = json.loads((run / "summary.json").read_text())
  for name in ("steps", "final_loss", "eval_loss", "first_eval_loss", "wire_bytes_total"):
    assert got[name] == want[name]
  assert matplotlib.image.imread(run / "report.png").ndim == 3
  assert rows_of(run) == rows


def test_leftovers_of_kills(train, run, short, tmp_path):
  """A cut line, temporary files and folders; then no checkpoint at all."""
  want = shutil.copytree(short, tmp_path / "want")
  train("--resume", "--out", want, "--steps", "8")
  for name in ("config.json.tmp", "metrics.jsonl.tmp", "summary.json.tmp"):
    (run / name).write_text('{"st')
  with (run / "metrics.jsonl").open("a") as f:
    f.write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
  shutil.copytree(run / "checkpoints" / "6", run / "checkpoints" / "9.orbax-checkpoint-tmp")
  train("--resume", "--out", run, "--steps", "8")
  assert rows_of(run) == rows_of(want)
  assert not (run / "checkpoints" / "9.orbax-checkpoint-tmp").exists()
  shutil.rmtree(run / "checkpoints")
  (run / "summary.json").unlink()
  out = train("--resume", "--out", run)
  assert "no checkpoint yet: starting from step 0." in out
  assert rows_of(run) == rows_of(want)


def test_another_number_of_replicas(train, run):
  before = rows_of(run)
  argv = ["--replicas", "4", "--replica-change", "average_replicas", "--steps", "9"]
  out = train("--resume", "--out", run, *argv)
  assert "mesh: replica 4" in out
  assert "resumed from step 6." in out
  config = load_config(run)
  assert (config["replicas"], config["steps"]) == (4, 9)
  rows = rows_of(run)
  assert rows[:7] == before
  assert [r["step"] for r in rows] == list(range(10))
  assert rows[-1]["loss"] < rows[1]["loss"]
  out = train("--resume", "--out", run, "--steps", "10")  # from now on simply 4
  assert "resumed from step 9." in out
  assert [r["step"] for r in rows_of(run)] == list(range(11))


@pytest.mark.parametrize(
  ("argv", "mesh"),
  [
    (["--data-parallel", "2", "--fsdp", "2"], "replica 2, data 2, fsdp 2 on 8 x cpu"),
    (["--max-devices", "1"], "replica 1, data 1, fsdp 1 on 1 x cpu, 2 replicas stacked"),
  ],
)
def test_another_mesh(train, run, short, tmp_path, argv, mesh):
  """Same replicas on 8 devices and on one: the same losses, up to the order of additions."""
  want = shutil.copytree(short, tmp_path / "want")
  train("--resume", "--out", want, "--steps", "12")
  out = train("--resume", "--out", run, "--steps", "12", *argv)
  assert f"mesh: {mesh}" in out
  assert ("(logical, mean over a round)" in out) == ("--max-devices" in argv)
  np.testing.assert_allclose(losses_of(run), losses_of(want), rtol=1e-4)
  wire = [[r.get("wire_bytes_total") for r in rows_of(p)] for p in (run, want)]
  if "--max-devices" in argv:  # logical bytes are those of two devices
    assert wire[0] == wire[1]


# Nothing but compiled.


@pytest.mark.parametrize(
  ("argv", "axes"),
  [
    ([], {"replica"}),
    (["--fsdp", "2"], {"replica", "fsdp"}),
    (["--method", "ddp"], {"replica"}),
    (["--max-devices", "1"], {"replica"}),
  ],
)
def test_dry_run(train, script, tiny_flags, tmp_path, monkeypatch, argv, axes):
  def no_training(*args, **kwargs):
    raise AssertionError("a dry run trains")

  monkeypatch.setattr(training_run, "_train", no_training)
  out = train(*tiny_flags, "--steps", "6", "--dry-run", "--out", tmp_path / "run", *argv)
  assert not (tmp_path / "run").exists()
  assert re.search(r"memory per device: \d+\.\d\d [kM]B \(state and batch \d", out)
  found = re.findall(r"^  (\w+) +(\d+(?:\.\d\d)? k?M?B)$", out, re.MULTILINE)
  assert {axis for axis, _ in found} == axes
  speed = r"below [\d,]+\.\d Mbit/s per device" if "ddp" not in argv else "at no link speed"
  assert re.search(rf"faster than data parallel {speed} \(at .*, estimated; ", out)
  assert "data parallel over replica would send" in out


def test_sigterm_while_compiling(train, script, tiny_flags, tmp_path, monkeypatch):
  compile_step = training_run._compile

  def interrupted(task):
    os.kill(os.getpid(), signal.SIGTERM)
    return compile_step(task)

  monkeypatch.setattr(training_run, "_compile", interrupted)
  path = tmp_path / "run"
  out = train(*tiny_flags, "--steps", "6", "--out", path)
  line = f"SIGTERM: stopped after step 0 of 6, saved step 0 in {path}; --resume continues.\n"
  assert out.endswith(line)
  monkeypatch.undo()
  assert "resumed from step 0." in train("--resume", "--out", path)
  assert len(losses_of(path)) == 6


def test_a_run_that_logs_nothing(train, tiny_flags, tmp_path):
  path = tmp_path / "run"
  argv = ["--steps", "2", "--log-every", "0", "--eval-every", "0", "--save-every", "0"]
  train(*tiny_flags, *argv, "--schedule-steps", "6", "--out", path)
  assert read_metrics(path) == []
  assert (path / "report.png").exists()
  assert [p.name for p in (path / "checkpoints").iterdir()] == ["2"]


def test_without_a_folder_nothing_is_written(train, tiny_flags, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert "done: 1 steps" in train(*tiny_flags, "--steps", "1", "--schedule-steps", "6")
  assert list(tmp_path.iterdir()) == []
