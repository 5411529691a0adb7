"""`train_lm.py` in two processes: the losses of two virtual devices, resume, SIGTERM, bad input.

Llama itself is trained once; the rest happens to a model that starts in half the time.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import time
from typing import Any

import pytest

from tests.multiprocess.launch import Job, free_port, job_flags

pytestmark = pytest.mark.slow

TIMEOUT = 600.0
STEPS = 12
SAVE_EVERY = 5
LAST, BEFORE = 10, 5  # checkpoints in the middle of a round of 3
LLAMA, SMALL = "examples/train_lm.py", "tests/examples/train_small_lm.py"
METHODS = {"ddp": ("--method", "ddp"), "diloco": ("--method", "diloco", "--compressor", "int4")}
RUNS = pytest.mark.parametrize(
  ("method", "program"), [("ddp", LLAMA), ("diloco", SMALL)], ids=METHODS
)


@dataclasses.dataclass(frozen=True)
class Script:
  """Starts `train_lm.py` on a small text, in one process or two."""

  folder: pathlib.Path
  data: pathlib.Path

  def job(
    self,
    num_processes: int,
    out: pathlib.Path,
    *flags: str,
    program: str = SMALL,
    debug: bool = True,
  ) -> Job:
    command = [sys.executable, program, "--out", str(out), *self._flags(), *flags]
    commands, port = [command], free_port()
    if num_processes > 1:
      commands = [[*command, *job_flags(num_processes, i, port)] for i in range(num_processes)]
    name = f"{out.name}-{num_processes}-{time.monotonic_ns()}"
    env = {
      "JAXCOMM_CACHE": str(self.folder / "cache"),
      "JAXCOMM_DEBUG": "1" if debug else "",
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return Job(commands, self.folder / "output" / name, env=env)

  def run(self, num_processes: int, out: pathlib.Path, *flags: str, program: str = SMALL) -> str:
    """Runs to the end; returns what the first process printed."""
    with self.job(num_processes, out, *flags, program=program) as job:
      return _first_alone(job.wait(TIMEOUT))

  def _flags(self) -> list[str]:
    return [
      *("--data", str(self.data), "--preset", "nano", "--replicas", "2", "--batch-size", "4"),
      *("--seq-len", "32", "--sync-period", "3", "--schedule-steps", str(STEPS)),
      *("--warmup", "2", "--log-every", "1", "--eval-every", "6", "--eval-batches", "2"),
      *("--save-every", str(SAVE_EVERY), "--keep", "3"),
    ]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Script:
  folder = tmp_path_factory.mktemp("train_lm")
  lines = (f"{i} squared is {i * i}, and {i} cubed is {i**3}.\n\n" for i in range(6000))
  (folder / "data.txt").write_text("".join(lines))
  return Script(folder, folder / "data.txt")


@pytest.fixture(scope="module")
def two_processes(script):
  """`two_processes(method, program)`: the folder of an uninterrupted run in two processes."""

  @functools.cache
  def run(method: str, program: str) -> pathlib.Path:
    out = script.folder / f"{method}-{pathlib.Path(program).stem}-two"
    script.run(2, out, *METHODS[method], "--steps", str(STEPS), program=program)
    return out

  return run


def killed(run: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """`run` as a kill of both processes would have left it, just before the last step was saved."""
  shutil.copytree(run, out)
  shutil.rmtree(out / "checkpoints" / str(STEPS))
  for name in ("summary.json", "report.png"):
    (out / name).unlink()
  return out


def metrics(out: pathlib.Path) -> dict[int, dict[str, Any]]:
  """step -> row of metrics.jsonl, without what depends on the clock."""
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
  return {row["step"]: {k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows}


def assert_close(got: dict[int, dict[str, Any]], want: dict[int, dict[str, Any]]) -> None:
  assert got.keys() == want.keys()
  for step, row in want.items():
    assert got[step] == pytest.approx(row, rel=1e-5), step


@RUNS
def test_two_processes_give_the_losses_of_two_virtual_devices(
  script, two_processes, method, program
):
  out = script.folder / f"{method}-one"
  script.run(1, out, *METHODS[method], "--steps", str(STEPS), program=program)
  one, two = metrics(out), metrics(two_processes(method, program))
  assert list(one) == list(range(STEPS + 1))
  assert one[STEPS]["loss"] < one[1]["loss"]
  assert {"loss", "eval_loss", "wire_bytes", "wire_bytes_total"} <= one[STEPS].keys()
  assert_close(two, one)


@RUNS
def test_the_first_process_alone_leaves_a_whole_run_folder(two_processes, method, program):
  run = two_processes(method, program)
  names = {path.name for path in run.iterdir()}
  files = {"config.json", "metrics.jsonl", "summary.json", "report.png", "checkpoints"}
  assert names == files
  saved = {int(p.name) for p in (run / "checkpoints").iterdir()}
  assert saved == {BEFORE, LAST, STEPS}
  assert json.loads((run / "config.json").read_text())["process_id"] == 0
  summary = json.loads((run / "summary.json").read_text())
  assert summary["steps"] == STEPS
  assert summary["devices"] == "2 x cpu"
  assert not summary["wire_bytes_logical"]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resume_of_two_processes_by(num_processes, script, two_processes, tmp_path):
  """DiLoCo's state has leaves of both kinds: equal in all processes (as of ddp), and their own."""
  out = killed(two_processes("diloco", SMALL), tmp_path / "run")
  output = script.run(num_processes, out, *METHODS["diloco"], "--resume", "--steps", str(STEPS))
  assert f"resumed from step {LAST}." in output
  got, want = metrics(out), metrics(two_processes("diloco", SMALL))
  if num_processes == 2:
    assert got == want
  else:
    assert_close(got, want)


@pytest.mark.parametrize(("receivers", "method"), [((0, 1), "ddp"), ((1,), "diloco")])
def test_sigterm_saves_on_all_processes_and_exits_0(script, tmp_path, receivers, method):
  out = tmp_path / "run"
  flags = (*METHODS[method], "--eval-every", "0", "--save-every", "0")
  with script.job(2, out, *flags, "--steps", "100000") as job:
    _wait_for_rows(job, out, 5)
    for i in receivers:
      job.processes[i].terminate()
    output = _first_alone(job.wait(TIMEOUT))
  (step,) = [int(p.name) for p in (out / "checkpoints").iterdir()]
  assert step == max(metrics(out)) < 100000
  assert f"SIGTERM: stopped after step {step} of 100000, saved step {step} in {out}" in output
  script.run(1, out, *flags, "--resume", "--steps", str(step + 4))
  assert list(metrics(out)) == list(range(1, step + 5))


def test_a_folder_in_use_is_refused_by_all_processes(script, tmp_path):
  (tmp_path / "mine.txt").write_text("not a run")
  with script.job(2, tmp_path, "--steps", "2", debug=False) as job:
    deadline = time.monotonic() + TIMEOUT
    while None in job.codes() and time.monotonic() < deadline:
      time.sleep(0.1)
    assert job.codes() == [1, 1], job.report()
    first, second = (_lines_of(job.stderr(i), "error:") for i in range(2))
    assert first == [
      f"error: {tmp_path} is not an empty folder: give --resume to continue the run in it, or"
      " another folder."
    ]
    assert second == [f"error: process 0 cannot use the run folder {tmp_path}."]
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(script, two_processes, tmp_path):
  out = killed(two_processes("diloco", SMALL), tmp_path / "run")
  damaged = out / "checkpoints" / str(LAST)
  file = max((p for p in damaged.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-100])
  output = script.run(2, out, *METHODS["diloco"], "--resume", "--steps", str(STEPS))
  assert f"resumed from step {BEFORE}." in output
  assert metrics(out) == metrics(two_processes("diloco", SMALL))
  assert (out / "checkpoints" / f"damaged-{LAST}").is_dir()


def _first_alone(outputs: list[str]) -> str:
  """What the first process printed, after a check that no other did (gloo itself does)."""
  for output in outputs[1:]:
    assert [line for line in output.splitlines() if not line.startswith("[Gloo]")] == []
  return outputs[0]


def _lines_of(text: str, start: str) -> list[str]:
  return [line for line in text.splitlines() if line.startswith(start)]


def _wait_for_rows(job: Job, out: pathlib.Path, count: int) -> None:
  deadline = time.monotonic() + TIMEOUT
  while time.monotonic() < deadline and not any(job.codes()):
    file = out / "metrics.jsonl"
    if file.exists() and len(file.read_text().splitlines()) >= count:
      return
    time.sleep(0.05)
  pytest.fail(f"no {count} rows in {out}\n{job.report()}")
