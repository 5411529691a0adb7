"""Hosts with slow links: flags, bytes and rate of a transfer, a JAX job, signals."""

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

NETLAB = pathlib.Path(__file__).parent.parent.parent / "scripts" / "netlab"


def load():
  loader = importlib.machinery.SourceFileLoader("netlab", str(NETLAB))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader("netlab", loader))
  sys.modules["netlab"] = module  # dataclasses look their module up
  loader.exec_module(module)
  return module


netlab = load()
MISSING = netlab.missing()
needs_root = pytest.mark.skipif(MISSING is not None, reason=f"netlab {MISSING}")

RATE, SIZE = 100e6, 5_000_000  # bits per second, bytes
# A transfer, then a sum over the job that netlab describes to JAX.
JOB = f"""
import os, socket, time
import jax, numpy as np
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
  server = socket.create_server(("host1", 5000))
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize()
me = jax.process_index()
assert socket.gethostname() == f"host{{me}}"
if me == 0:
  with socket.create_connection(("host1", 5000)) as peer:
    peer.sendall(bytes({SIZE}))
else:
  peer, _ = server.accept()
  start, count = time.perf_counter(), 0
  while part := peer.recv(1 << 20):
    count += len(part)
  print("received", count, time.perf_counter() - start, flush=True)
mesh = jax.make_mesh((2,), ("replica",))
rows = jax.make_array_from_process_local_data(
  jax.NamedSharding(mesh, jax.P("replica")), np.full(1, me + 1.0, np.float32)
)
print("sum", float(jax.jit(lambda x: x.sum())(rows)), flush=True)
"""


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--hosts", "9", "--", "true"], r"`hosts` must be in \[2, 8\], got 9"),
    (["--rate", "5mbit", "--", "true"], "`rate` must be from 10mbit to 1gbit, like 100mbit, got"),
    (["--rate", "fast", "--", "true"], "`rate` must be .* got 'fast'"),
    (["--delay", "1s", "--", "true"], "`delay` must be from 0ms to 1000ms, like 1ms, got '1s'"),
    (["--hosts", "2"], "`command` must be given, after --"),
  ],
)
def test_rejects(flags, message, capsys):
  with pytest.raises(SystemExit, match="2"):
    netlab.parse(flags)
  assert re.search(message, capsys.readouterr().err)


def test_reads_rates_and_delays():
  options = netlab.parse(["--rate", "1gbit", "--delay", "0.5ms", "--", "sh", "-c", "echo --x"])
  assert (options.rate, options.delay) == (1e9, 0.5)
  assert options.command == ["sh", "-c", "echo --x"]
  assert netlab.parse(["--", "true"]).rate is None


def test_says_what_it_needs(monkeypatch):
  monkeypatch.setattr(netlab.shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
  assert netlab.missing() == "needs the command `tc` (package iproute2)"
  monkeypatch.setattr(netlab.shutil, "which", lambda tool: f"/bin/{tool}")
  monkeypatch.setattr(netlab.os, "geteuid", lambda: 1000)
  assert "needs root" in netlab.missing()


@pytest.mark.slow
@needs_root
def test_two_hosts_exchange_at_the_rate_of_their_links(tmp_path):
  log = tmp_path / "bytes.jsonl"
  flags = ["--rate", "100mbit", "--log", str(log), "--"]
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [NETLAB, *flags, sys.executable, "-c", JOB],
    env=env, capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  words = [line.split() for line in done.stdout.splitlines()]
  assert [row[1] for row in words if row[0] == "sum"] == ["3.0", "3.0"]
  ((_, count, seconds),) = [row for row in words if row[0] == "received"]
  assert int(count) == SIZE
  assert float(seconds) > 0.95 * 8 * SIZE / RATE  # a busy machine may take longer
  last = json.loads(log.read_text().splitlines()[-1])
  for sent, received in ((0, 1), (1, 0)):  # what one sends the other receives
    assert last["received"][received] == pytest.approx(last["sent"][sent], abs=5000)
  assert SIZE < last["sent"][0] < 1.03 * SIZE + 100_000
  assert last["sent"][1] < 0.1 * SIZE


@pytest.mark.slow
@needs_root
def test_a_signal_reaches_the_hosts_and_nothing_is_left(tmp_path):
  script = f"trap 'echo ended; exit 0' TERM; echo $$ > {tmp_path}/$(hostname); sleep 600 & wait"
  command = [NETLAB, "--hosts", "3", "--rate", "10mbit", "--", "sh", "-c", script]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
      time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
  assert output.splitlines() == ["ended"] * 3
  assert process.returncode == 128 + signal.SIGTERM
  for host in ("host0", "host1", "host2"):
    with pytest.raises(ProcessLookupError):
      os.kill(int((tmp_path / host).read_text()), 0)


@pytest.mark.slow
@needs_root
def test_a_host_that_fails_ends_the_others():
  script = 'test "$OMPI_COMM_WORLD_RANK" = 0 || exit 3; sleep 600'
  start = time.monotonic()
  done = subprocess.run([NETLAB, "--", "sh", "-c", script], capture_output=True, timeout=60)
  assert done.returncode == 3
  assert time.monotonic() - start < 30
