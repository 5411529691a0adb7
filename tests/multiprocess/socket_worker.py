"""Counts the bytes that compiled programs put on the loopback device of their network namespace.

Reports for each program of `WIRES`, from process 0's reading of /proc/net/dev, what one device
sends per execution, what the wire meter says, and what an idle job sends in that time.
"""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from join import join, place, replica_mesh, report
from programs import WIRES, Program, on_mesh

from jaxcomm.inspect import collective_bytes

EXECUTIONS = 3
IDLE_SECONDS = 3.0


def bytes_sent() -> int:
  """Bytes that left through `lo` since the namespace was made, headers included."""
  for line in pathlib.Path("/proc/net/dev").read_text().splitlines():
    name, _, counters = line.partition(":")
    if name.strip() == "lo":
      return int(counters.split()[8])
  raise RuntimeError("this network namespace has no device `lo`.")


def main() -> None:
  join()
  mesh = replica_mesh()
  idle_bytes, seconds = reading(lambda: time.sleep(IDLE_SECONDS))
  idle = idle_bytes / seconds
  report({name: measure(mesh, size, program, idle) for name, (size, program) in WIRES.items()})


def measure(mesh: jax.sharding.Mesh, size: int, program: Program, idle: float) -> dict[str, Any]:
  """What one device sends per execution of `program`; `idle` bytes per second belong to nobody.

  The least of `EXECUTIONS`: on a busy machine TCP sends some segments twice.
  """
  n = jax.process_count()
  rows = np.random.default_rng(0).standard_normal((n, size), np.float32)
  x = place(mesh, rows)
  compiled = on_mesh(program, mesh).lower(x).compile()
  jax.block_until_ready(compiled(x))  # connects the sockets
  readings = [reading(lambda: jax.block_until_ready(compiled(x))) for _ in range(EXECUTIONS)]
  sent, seconds = min(readings)
  return {
    "measured": sent / n,
    "compiled": collective_bytes(compiled, mesh).total,
    "idle": idle * seconds / n,
    "seconds": seconds,
  }


def reading(work: Callable[[], None]) -> tuple[int, float]:
  """The bytes that all processes send while each does `work`, and its seconds."""
  multihost_utils.sync_global_devices("read")
  start, before = time.perf_counter(), bytes_sent()
  multihost_utils.sync_global_devices("begin")
  work()
  multihost_utils.sync_global_devices("end")
  return bytes_sent() - before, time.perf_counter() - start


if __name__ == "__main__":
  main()
