"""Joining a job of several processes: by flags, or as Slurm, Open MPI or a TPU pod tell."""

import contextlib
import os

import jax

# All of them, or JAX takes the process for one outside a job step.
_SLURM = (
  "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
)  # fmt: skip


def launched_processes() -> int:
  """Processes that `mpirun` or `srun` started together with this one; 1 where neither did.

  A Slurm script without `srun` is one process, whatever the job asked for. The hosts of a TPU pod
  are not counted: its runtime does that.

  Raises:
    ValueError: Open MPI started several, but does not tell the address of the first.
  """
  size = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
  if size > 1:
    if "OMPI_MCA_orte_hnp_uri" not in os.environ:
      raise ValueError(
        f"`coordinator` must be given: this Open MPI started {size} processes and does not tell the"
        f" address of the first. Add --coordinator HOST:PORT --num-processes {size}"
        " --process-id $OMPI_COMM_WORLD_RANK."
      )
    return size
  return int(os.environ["SLURM_NTASKS"]) if all(name in os.environ for name in _SLURM) else 1


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the job that this process belongs to, if any; before JAX starts its devices.

  Args:
    coordinator: HOST:PORT of process 0; None for what the environment tells.
    num_processes: given with `coordinator`.
    process_id: given with `coordinator`.
  """
  if coordinator is not None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes, process_id)
  elif launched_processes() > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize()
  elif _on_tpu():
    with contextlib.suppress(ValueError):  # one host that belongs to no pod
      jax.distributed.initialize()


def _on_tpu() -> bool:
  """Whether JAX will use TPUs: where it finds chips it puts them first by itself."""
  platforms = getattr(jax.config, "jax_platforms", None) or ""
  return platforms.split(",")[0] == "tpu"
