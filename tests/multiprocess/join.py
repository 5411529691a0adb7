"""What every worker process does first and last."""

import argparse
import json
from typing import Any

import jax
import numpy as np

P = jax.sharding.PartitionSpec


def join() -> list[str]:
  """Joins the job given by the flags of `launch.job_flags`, with one CPU device.

  Returns:
    The worker's own arguments.
  """
  parser = argparse.ArgumentParser()
  parser.add_argument("--coordinator", required=True)
  parser.add_argument("--num-processes", type=int, required=True)
  parser.add_argument("--process-id", type=int, required=True)
  flags, rest = parser.parse_known_args()
  jax.config.update("jax_num_cpu_devices", 1)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.config.update("jax_numpy_rank_promotion", "raise")
  jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)
  if (jax.process_count(), jax.local_device_count()) != (flags.num_processes, 1):
    raise RuntimeError(f"joined {jax.process_count()} processes, expected {flags.num_processes}.")
  return rest


def report(result: Any) -> None:
  """Hands `result` to `launch.run_workers`: the last line of standard output."""
  print(json.dumps(result), flush=True)


def replica_mesh() -> jax.sharding.Mesh:
  """All devices of the job on one axis, `replica`."""
  return jax.make_mesh((jax.device_count(),), ("replica",))


def place(mesh: jax.sharding.Mesh, x: np.ndarray) -> jax.Array:
  """The global array `x`, known to every process, a row for each device of `mesh`."""
  sharding = jax.NamedSharding(mesh, P("replica"))
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
