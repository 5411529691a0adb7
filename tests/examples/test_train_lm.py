"""`examples/train_lm.py` end to end: the run folder, resume after any kind of stop, bad input.

The model is `small_lm`, of which a process takes half the time to start.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxcomm.training import read_metrics, tree_digest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_lm.py"
SMALL = ROOT / "tests" / "examples" / "train_small_lm.py"
SYNC_PERIOD, SAVE_EVERY = 4, 5
PATIENCE = 600  # seconds that a process may take on a busy machine


@pytest.fixture(scope="session")
def work(tmp_path_factory):
  """A folder with a text file and the caches of data and compiled programs."""
  path = tmp_path_factory.mktemp("train_lm")
  rng = random.Random(0)
  words = "alpha beta gamma delta mean replica token wire round step outer inner loss".split()
  lines = (" ".join(rng.choices(words, k=8)) + ".\n\n" for _ in range(2000))
  (path / "text.txt").write_text("".join(lines))
  return path


@pytest.fixture(scope="session")
def flags(work):
  """A model of 44 thousand parameters that takes a few milliseconds per step."""
  return [
    *("--preset", "nano", "--vocab-size", "300", "--data", str(work / "text.txt")),
    *("--seq-len", "16", "--batch-size", "8", "--replicas", "2", "--eval-batches", "2"),
    *("--log-every", "1", "--eval-every", "50", "--save-every", str(SAVE_EVERY)),
    *("--sync-period", str(SYNC_PERIOD), "--error-feedback"),
  ]


def environment(work):
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAXCOMM_CACHE": str(work / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


class Process:
  """The script in a process of its own; what it prints goes to files."""

  def __init__(self, work, *argv, script=SMALL, env=None, file_kilobytes=None):
    self.log = work / f"log-{time.monotonic_ns()}"
    self._files = [self.log.with_suffix(s).open("w") for s in (".out", ".err")]
    command = [sys.executable, str(script), *map(str, argv)]
    if file_kilobytes is not None:
      limited = f'ulimit -f {file_kilobytes}; exec "$@"'
      command = ["bash", "-c", limited, "bash", *command]
    self._process = subprocess.Popen(
      command, stdout=self._files[0], stderr=self._files[1], env=environment(work) | (env or {}),
      cwd=work,
    )  # fmt: skip
    self.poll, self.send_signal = self._process.poll, self._process.send_signal

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._process.kill()
    self._process.wait()
    for file in self._files:
      file.close()

  @property
  def out(self):
    return self.log.with_suffix(".out").read_text()

  @property
  def err(self):
    return self.log.with_suffix(".err").read_text()

  def until(self, condition, what):
    """Waits for `condition()`; the process must not end before."""
    end = time.monotonic() + PATIENCE
    while not condition():
      assert self.poll() is None, f"ended before {what}\n{self.out}\n{self.err}"
      assert time.monotonic() < end, f"no {what}\n{self.out}\n{self.err}"
      time.sleep(0.002)

  def wait(self):
    """The exit code."""
    return self._process.wait(PATIENCE)


def train(work, *argv, **kwargs):
  """Runs the script to its end: exit code, standard output and standard error."""
  with Process(work, *argv, **kwargs) as process:
    return process.wait(), process.out, process.err


def rows_of(path):
  return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(path)]


def last_step(path):
  """Of the metrics on disk; -1 if there are none."""
  with contextlib.suppress(OSError):
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else -1
  return -1


def saved_steps(path):
  return sorted(int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdecimal())


def final_digest(path):
  """Of all arrays in the newest checkpoint."""
  step = saved_steps(path)[-1]
  with ocp.StandardCheckpointer() as checkpointer:
    return step, tree_digest(checkpointer.restore(path / "checkpoints" / str(step) / "state"))


def contents(path):
  return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def check_same_run(got, want, steps):
  """Rows, bytes and final arrays are those of the uninterrupted run, to the bit."""
  rows = rows_of(got)
  assert [r["step"] for r in rows] == list(range(steps + 1))
  assert rows == rows_of(want)
  assert final_digest(got) == final_digest(want)
  assert final_digest(got)[0] == steps
  summaries = [json.loads((p / "summary.json").read_text()) for p in (got, want)]
  for name in ("steps", "final_loss", "eval_loss", "first_eval_loss", "wire_bytes_total"):
    assert summaries[0][name] == summaries[1][name], name


# Before anything starts.

FLAGS = (
  "model preset method compressor replicas data-parallel fsdp steps batch-size seq-len sync-period"
  " lr outer-lr outer-momentum seed data out resume dry-run"
).split()


def test_help_lists_the_flags_without_starting_jax(work):
  """There is no such platform: starting JAX would fail."""
  env = {"JAX_PLATFORMS": "none", "COLUMNS": "200"}
  code, out, err = train(work, "--help", script=SCRIPT, env=env)
  assert (code, err) == (0, "")
  assert [f for f in FLAGS if f"--{f}" not in out] == []
  assert "python examples/train_lm.py --out runs/diloco --resume" in out


def test_wrong_flags_are_one_line(work):
  code, out, err = train(work, "--batch-size", "6", "--out", work / "none", script=SCRIPT)
  assert (code, out) == (2, "")
  assert err.startswith("error: `batch_size` must be divisible by replicas * data_parallel * fsdp")
  assert err.count("\n") == 1
  assert not (work / "none").exists()


# Uninterrupted, killed, terminated.

STEPS = 200


@pytest.fixture(scope="session")
def reference(work, flags):
  """An uninterrupted run."""
  code, out, err = train(work, *flags, "--steps", STEPS, "--out", work / "reference")
  assert code == 0, err
  return work / "reference", out


def kill_once(work, out, argv, rng, *, in_save):
  """Starts the script, kills it at a random moment; what was going on."""
  with Process(work, *argv) as process:
    begins = ("resumed from step", "no checkpoint yet") if "--resume" in argv else ("compiled in",)
    process.until(lambda: any(text in process.out for text in begins), begins)
    first = last_step(out)
    target = first + rng.randint(1, 9)
    process.until(lambda: last_step(out) >= target, f"step {target}")
    if in_save:
      process.until(lambda: any(out.glob("checkpoints/*.orbax-checkpoint-tmp")), "a save")
    time.sleep(rng.uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  saving = any(out.glob("checkpoints/*.orbax-checkpoint-tmp"))
  return {"saving": saving, "in_round": last_step(out) % SYNC_PERIOD != 0}


@pytest.mark.slow
def test_ten_kills_change_nothing(work, flags, reference):
  """DiLoCo with a 4-bit mean and error feedback, killed in rounds and in saves."""
  out, rng = work / "killed", random.Random(0)
  argv = [*flags, "--steps", STEPS, "--out", out]
  kills = []
  for i in range(10):
    resume = ["--resume"] if i else []
    kills.append(kill_once(work, out, [*argv, *resume], rng, in_save=i % 2 == 1))
  assert sum(k["saving"] for k in kills) >= 3, kills
  assert sum(k["in_round"] for k in kills) >= 3, kills
  code, printed, err = train(work, *argv, "--resume")
  assert code == 0, err
  assert "resumed from step" in printed
  check_same_run(out, reference[0], STEPS)


@pytest.mark.slow
def test_a_kill_of_data_parallelism_changes_nothing(work, flags):
  argv = [f for f in flags if f != "--error-feedback"]
  argv += ["--method", "ddp", "--steps", 40]
  assert train(work, *argv, "--out", work / "ddp")[0] == 0
  out, rng = work / "ddp-killed", random.Random(1)
  argv = [*argv, "--out", out]
  kill_once(work, out, argv, rng, in_save=True)
  code, _, err = train(work, *argv, "--resume")
  assert code == 0, err
  check_same_run(out, work / "ddp", 40)


@pytest.mark.slow
def test_sigterm_saves_and_says_so(work, flags, reference):
  out = work / "terminated"
  with Process(work, *flags, "--steps", STEPS, "--out", out) as process:
    process.until(lambda: last_step(out) >= 7, "step 7")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    step = last_step(out)
    line = f"SIGTERM: stopped after step {step} of {STEPS}, saved step {step} in {out}"
    assert process.out.splitlines()[-1] == f"{line}; --resume continues."
    assert process.err == ""
  assert saved_steps(out)[-1] == step < STEPS
  assert not (out / "summary.json").exists()
  code, printed, err = train(work, "--resume", "--out", out)  # all flags are those of the run
  assert code == 0, err
  assert f"resumed from step {step}." in printed
  check_same_run(out, reference[0], STEPS)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_harms_nothing(work, reference):
  """A limit on the size of files, which write(2) reports like a full disk."""
  out = shutil.copytree(reference[0], work / "full")
  before = contents(out / "checkpoints")

  argv = ["--resume", "--out", out, "--steps", STEPS + 2 * SAVE_EVERY]
  code, _, err = train(work, *argv, file_kilobytes=100)
  assert code == 1
  assert err.startswith(f"error: the checkpoint of step {STEPS + SAVE_EVERY} under {out}"), err
  assert "could not be written" in err
  assert err.count("\n") == 1, err
  after = contents(out / "checkpoints")
  assert {k: v for k, v in after.items() if ".orbax-checkpoint-tmp" not in k} == before
  rows = rows_of(reference[0])
  assert rows_of(out)[: len(rows)] == rows


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_falls_back(work, flags, reference):
  out = shutil.copytree(reference[0], work / "damaged")
  (out / "summary.json").unlink()
  newest = out / "checkpoints" / str(STEPS)
  largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  code, printed, err = train(work, "--resume", "--out", out)
  assert code == 0, err
  assert f"checkpoint of step {STEPS} is damaged" in err
  assert f"resumed from step {STEPS - SAVE_EVERY}." in printed
  assert (out / "checkpoints" / f"damaged-{STEPS}").is_dir()
  check_same_run(out, reference[0], STEPS)


# The contract of the run folder and of the output.


@pytest.mark.slow
def test_run_folder(reference):
  path, _ = reference
  names = {"config.json", "metrics.jsonl", "summary.json", "report.png", "checkpoints"}
  assert {p.name for p in path.iterdir()} == names
  config = json.loads((path / "config.json").read_text())
  assert (config["steps"], config["schedule_steps"], config["sync_period"]) == (STEPS, STEPS, 4)
  rows = read_metrics(path)
  assert rows[0].keys() == {"step", "eval_loss"}
  needed = {"step", "loss", "tokens_per_s", "wire_bytes", "wire_bytes_total"}
  assert all(needed <= row.keys() for row in rows[1:])
  assert [r["step"] for r in rows if "eval_loss" in r] == [0, 50, 100, 150, STEPS]
  synced = [r["step"] for r in rows[1:] if r["wire_bytes"] > 0]
  assert synced == list(range(SYNC_PERIOD, STEPS + 1, SYNC_PERIOD))
  assert rows[-1]["wire_bytes_total"] == sum(r["wire_bytes"] for r in rows[1:])
  assert rows[-1]["loss"] < rows[1]["loss"] - 1
  image = matplotlib.image.imread(path / "report.png")
  assert image.ndim == 3


@pytest.mark.slow
def test_summary(work, reference):
  path, _ = reference
  summary, rows = json.loads((path / "summary.json").read_text()), read_metrics(path)
  assert summary["steps"] == STEPS
  assert summary["params"] == 43_840
  assert summary["final_loss"] == rows[-1]["loss"]
  assert (summary["first_eval_loss"], summary["eval_loss"]) == (
    rows[0]["eval_loss"], rows[-1]["eval_loss"],
  )  # fmt: skip
  per_step = summary["wire_bytes_per_step"]
  assert set(per_step) == {"replica"}
  synced = max(r.get("wire_bytes", 0) for r in rows)
  np.testing.assert_allclose(per_step["replica"], synced / SYNC_PERIOD)
  assert summary["dense_wire_bytes_per_step"] == 4 * summary["params"]  # 2 (R - 1) / R of them
  assert summary["wire_bytes_total"] == rows[-1]["wire_bytes_total"]
  assert summary["wire_bytes_logical"] is False
  assert summary["wall_seconds"] > summary["step_seconds"] > 0
  assert summary["devices"] == "2 x cpu"
  assert summary["versions"]["jax"] == jax.__version__
  assert summary["data"]["name"] == "text.txt"
  assert len(summary["data"]["sha256"]) == 64
  commit = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
  known = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()
  assert len(summary["git_commit"] or "") == len(known)


@pytest.mark.slow
def test_output(reference):
  _, out = reference
  assert "parameters: 43,840\n" in out
  assert "mesh: replica 2, data 1, fsdp 1 on 2 x cpu\n" in out
  assert "data parallel over replica would send 175.36 kB, " in out
  assert "faster than data parallel below " in out
  assert f"step    {STEPS}/{STEPS}  loss " in out
  assert out.splitlines()[-1].startswith(f"done: {STEPS} steps, loss ")
