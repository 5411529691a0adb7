"""Runs every program on the devices of all processes; saves this process's row of each result."""

import pathlib

import jax
import numpy as np
from join import join, place, replica_mesh, report
from programs import PROGRAMS, inputs, on_mesh


def main() -> None:
  (folder,) = join()
  mesh = replica_mesh()
  x = place(mesh, inputs(jax.process_count()))
  rows = {}
  for name, program in PROGRAMS.items():
    result = on_mesh(program, mesh)(x)
    (shard,) = result.addressable_shards
    rows[name] = np.asarray(shard.data)[0]
  np.savez(pathlib.Path(folder) / f"rows{jax.process_index()}.npz", **rows)
  report({"process": jax.process_index(), "programs": list(rows)})


if __name__ == "__main__":
  main()
