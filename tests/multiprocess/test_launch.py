"""The launcher itself: output, failure, timeout, and that nothing is left running."""

import os
import shutil
import signal
import sys
import time

import pytest

from tests.multiprocess import launch
from tests.multiprocess.launch import Job, JobError, namespace_missing


def python(code: str) -> list[str]:
  return [sys.executable, "-c", code]


def is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  return True


def test_returns_what_each_process_printed(tmp_path):
  with Job([python("print('a')"), python("print('b')")], tmp_path) as job:
    assert job.wait(timeout=60) == ["a\n", "b\n"]


def test_a_failure_ends_the_others_and_shows_every_output(tmp_path, monkeypatch):
  monkeypatch.setattr(launch, "_GRACE", 0.5)  # the other one would not end by itself
  sleeper = "import time; print('sleeping', flush=True); time.sleep(600)"
  failing = "import time; time.sleep(0.5); raise SystemExit('boom')"
  start = time.monotonic()
  with Job([python(sleeper), python(failing)], tmp_path) as job:
    with pytest.raises(
      JobError, match=r"(?s)a process failed; exit codes \[None, 1\].*sleeping.*boom"
    ):
      job.wait(timeout=300)
    assert job.codes() == [-signal.SIGKILL, 1]
  assert time.monotonic() - start < 60


def test_timeout_ends_children_too(tmp_path):
  code = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c',"
    " 'import time; time.sleep(600)']); print(p.pid, flush=True); p.wait()"
  )
  with Job([python(code)], tmp_path) as job:
    while not job.stdout(0).endswith("\n"):
      time.sleep(0.05)
    with pytest.raises(JobError, match=r"no end after 0\.2 s; exit codes \[None\]"):
      job.wait(timeout=0.2)
  child = int(job.stdout(0))
  deadline = time.monotonic() + 30
  while is_alive(child) and time.monotonic() < deadline:  # init reaps it a moment later
    time.sleep(0.05)
  assert not is_alive(child)


def test_leaving_the_context_by_an_error_ends_the_job(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with Job([python("import time; time.sleep(600)")] * 2, tmp_path) as job:
      raise KeyboardInterrupt
  assert job.codes() == [-signal.SIGKILL] * 2


def test_a_command_that_cannot_start_ends_those_before_it(tmp_path):
  job = Job([python("import time; time.sleep(600)"), ["/nonexistent"]], tmp_path)
  with pytest.raises(FileNotFoundError):
    job.__enter__()
  assert job.codes() == [-signal.SIGKILL]


def test_says_what_a_network_namespace_needs(monkeypatch):
  monkeypatch.setenv("PATH", "/nonexistent")
  assert namespace_missing() == "needs the command `ip` (package iproute2)"
  monkeypatch.undo()
  monkeypatch.setattr(shutil, "which", lambda tool: f"/bin/{tool}")
  monkeypatch.setattr(os, "geteuid", lambda: 1000)
  assert namespace_missing() == "needs root, to make a network namespace"
