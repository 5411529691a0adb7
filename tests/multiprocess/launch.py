"""Starts several Python processes that form one JAX job, and never leaves one behind."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
_TAIL = 6000  # characters of each stream shown when a job fails
_GRACE = 5.0  # seconds that the other processes get to fail by themselves, for a better message


class JobError(AssertionError):
  """A process failed or the job took too long; the message holds what every process printed."""


class Job:
  """A process per command, all ended when the context is left.

  Every process leads a session of its own, so that its children end with it, and writes to files
  under `folder`: a pipe that nobody reads would stop it.

  Args:
    commands: one command line per process.
    folder: for the output of the processes.
    env: variables set besides those of this process.

  Example:
    >>> import tempfile
    >>> with Job([[sys.executable, "-c", "print(1)"]] * 2, tempfile.mkdtemp()) as job:
    ...   job.wait(timeout=60)
    ['1\\n', '1\\n']
  """

  def __init__(
    self,
    commands: Sequence[Sequence[str]],
    folder: str | os.PathLike,
    *,
    env: dict[str, str] | None = None,
  ):
    self._commands = commands
    self._folder = pathlib.Path(folder)
    self._env = _environment() | (env or {})
    self._started: list[subprocess.Popen] = []  # and not ended from here
    self.processes: list[subprocess.Popen] = []

  def __enter__(self) -> "Job":
    self._folder.mkdir(parents=True, exist_ok=True)
    try:
      for i, command in enumerate(self._commands):
        with self._file(i, "out").open("w") as out, self._file(i, "err").open("w") as err:
          process = subprocess.Popen(
            command, stdout=out, stderr=err, env=self._env, cwd=ROOT, start_new_session=True
          )
        self.processes.append(process)
        self._started.append(process)
    except BaseException:
      self.kill()
      raise
    return self

  def __exit__(self, *exc) -> None:
    self.kill()

  def wait(self, timeout: float) -> list[str]:
    """Standard output of every process, once all have ended with exit code 0.

    Raises:
      JobError: a process ended otherwise, or `timeout` seconds passed; no process is left.
    """
    self._poll(timeout, lambda codes: None not in codes or any(codes))
    if any(self.codes()):
      self._poll(_GRACE, lambda codes: None not in codes)
    codes = self.codes()
    self.kill()
    if any(codes) or None in codes:
      reason = "a process failed" if any(codes) else f"no end after {timeout} s"
      raise JobError(f"{reason}; exit codes {codes}, None where ended from here\n{self.report()}")
    return [self.stdout(i) for i in range(len(codes))]

  def codes(self) -> list[int | None]:
    """Exit code of every process; None while it runs."""
    return [process.poll() for process in self.processes]

  def terminate(self) -> None:
    """Sends SIGTERM to every process."""
    for process in self.processes:
      process.terminate()

  def kill(self) -> None:
    """Ends what still runs, children included."""
    while self._started:
      process = self._started.pop()
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()

  def stdout(self, i: int) -> str:
    """What process `i` has printed so far."""
    return self._file(i, "out").read_text(errors="replace")

  def stderr(self, i: int) -> str:
    """What process `i` has written to standard error so far."""
    return self._file(i, "err").read_text(errors="replace")

  def report(self) -> str:
    """The end of everything that was printed."""
    parts = []
    for i in range(len(self.processes)):
      for name, text in (("stdout", self.stdout(i)), ("stderr", self.stderr(i))):
        parts.append(f"--- {name} of process {i} ---\n{text[-_TAIL:]}")
    return "\n".join(parts)

  def _file(self, i: int, suffix: str) -> pathlib.Path:
    return self._folder / f"process{i}.{suffix}"

  def _poll(self, seconds: float, done: Callable[[list[int | None]], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not done(self.codes()) and time.monotonic() < deadline:
      time.sleep(0.05)


def run_workers(
  worker: str,
  num_processes: int,
  *args: str,
  folder: str | os.PathLike,
  timeout: float = 300.0,
  prefix: Sequence[str] = (),
) -> list[Any]:
  """Runs `worker`, a file beside this one, in `num_processes` processes of one device each.

  The worker calls `join.join()` first and hands its result to `join.report`.

  Args:
    worker: file name.
    num_processes: size of the job.
    *args: for the worker.
    folder: for output files.
    timeout: seconds.
    prefix: put before every command, e.g. what enters a network namespace.

  Returns:
    What each process reported, decoded from JSON.

  Raises:
    JobError: see `Job.wait`.
  """
  command = [*prefix, sys.executable, str(HERE / worker), *args]
  port = free_port()
  commands = [[*command, *job_flags(num_processes, i, port)] for i in range(num_processes)]
  with Job(commands, folder) as job:
    outputs = job.wait(timeout)
  return [json.loads(output.splitlines()[-1]) for output in outputs]


def job_flags(num_processes: int, process_id: int, port: int) -> list[str]:
  """The flags by which workers and example scripts join a job."""
  return [
    *("--coordinator", f"localhost:{port}"),
    *("--num-processes", str(num_processes)),
    *("--process-id", str(process_id)),
  ]


def free_port() -> int:
  """A TCP port that nobody listened on a moment ago."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def namespace_missing() -> str | None:
  """Why this machine cannot make a network namespace; None if it can."""
  for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
    if shutil.which(tool) is None:
      return f"needs the command `{tool}` (package {package})"
  if os.geteuid() != 0:
    return "needs root, to make a network namespace"
  made = subprocess.run(
    ["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, text=True
  )
  if made.returncode:
    return f"cannot make a network namespace: {made.stderr.strip()}"
  return None


@contextlib.contextmanager
def network_namespace() -> Iterator[list[str]]:
  """A network namespace with nothing but its own loopback device; yields the command's prefix.

  `/proc/net/dev`, read from inside, then counts the traffic of the job and no other.
  """
  hold = "ip link set lo up && echo up && exec sleep infinity"
  holder = subprocess.Popen(["unshare", "--net", "sh", "-c", hold], stdout=subprocess.PIPE)
  try:
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"up\n"
    yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
  finally:
    holder.kill()
    holder.communicate()


def _environment() -> dict[str, str]:
  """This process's variables, without the flags that its own JAX was started with."""
  kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return kept | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
