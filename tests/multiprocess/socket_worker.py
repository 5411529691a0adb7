"""Counts the bytes that a compiled program puts on the loopback device of its network namespace.

Arguments: the name of a program of `WIRES`. Reports, from process 0's reading of /proc/net/dev,
what one device sends per execution, what the wire meter says, and what an idle job sends.
"""

import pathlib
import time

import jax
import numpy as np
from jax.experimental import multihost_utils
from join import join, place, replica_mesh, report
from programs import WIRES, on_mesh

from jaxcomm.inspect import collective_bytes

EXECUTIONS = 5
IDLE_SECONDS = 3.0


def bytes_sent() -> int:
  """Bytes that left through `lo` since the namespace was made, headers included."""
  for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
    name, _, counters = line.partition(":")
    if name.strip() == "lo":
      return int(counters.split()[8])
  raise RuntimeError("this network namespace has no device `lo`.")


def main() -> None:
  (name,) = join()
  size, program = WIRES[name]
  mesh, n = replica_mesh(), jax.process_count()
  rows = np.random.default_rng(0).standard_normal((n, size), np.float32)
  x = place(mesh, rows)
  compiled = on_mesh(program, mesh).lower(x).compile()
  jax.block_until_ready(compiled(x))  # connects the sockets
  readings = []
  for work in (lambda: time.sleep(IDLE_SECONDS), lambda: execute(compiled, x)):
    multihost_utils.sync_global_devices("read")
    start, before = time.perf_counter(), bytes_sent()
    multihost_utils.sync_global_devices("begin")
    work()
    multihost_utils.sync_global_devices("end")
    readings.append((bytes_sent() - before, time.perf_counter() - start))
  (idle, idle_seconds), (sent, seconds) = readings
  report(
    {
      "measured": sent / n / EXECUTIONS,
      "compiled": collective_bytes(compiled, mesh).total,
      "idle": idle / idle_seconds * seconds / n / EXECUTIONS,
      "seconds": seconds,
    }
  )


def execute(compiled: jax.stages.Compiled, x: jax.Array) -> None:
  for _ in range(EXECUTIONS):
    jax.block_until_ready(compiled(x))


if __name__ == "__main__":
  main()
