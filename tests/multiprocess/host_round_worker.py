"""One of several hosts: rounds whose mean crosses the sockets on a background thread."""

import pathlib

import jax
import numpy as np
from host_round_problem import run_host
from join import join, replica_mesh, report

from jaxcomm.transforms import ProcessMean


def main() -> None:
  (folder,) = join()
  me = jax.process_index()
  history = run_host(me, ProcessMean(replica_mesh()))
  np.save(pathlib.Path(folder) / f"params{me}.npy", history)
  report({"process": me})


if __name__ == "__main__":
  main()
