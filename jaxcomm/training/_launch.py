"""Starting a script: flags, devices, processes, and errors in one line."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from jaxcomm.training._checkpoints import CheckpointError, ReplicaChange
from jaxcomm.training._loop import NonFiniteLossError
from jaxcomm.training._run_folder import load_config

_EXPECTED = (ValueError, OSError, ImportError, NonFiniteLossError, CheckpointError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Flags that every training script has."""

  steps: int = 300
  """optimizer steps in all"""
  seed: int = 0
  """of initial weights, data order and stochastic rounding"""
  replicas: int = 4
  """replicas that exchange over the slow link"""
  data_parallel: int = 1
  """devices per replica that share its batch"""
  fsdp: int = 1
  """devices per replica that share its batch and its parameters"""
  out: str | None = None
  """run folder: metrics, checkpoints, plot"""
  resume: bool = False
  """continue the run in --out; flags not given are taken from it"""
  replica_change: ReplicaChange | None = None
  """with --resume and another number of --replicas: how to go from the old to the new"""
  dry_run: bool = False
  """compile only: memory, bytes on the wire, break-even link speed"""
  log_every: int = 10
  """steps between two lines of metrics.jsonl"""
  eval_every: int = 100
  """steps between two evaluations; 0 for never"""
  save_every: int = 100
  """steps between two checkpoints; 0: only at the end"""
  keep: int = 2
  """latest checkpoints to keep, besides the best"""
  max_devices: int | None = None
  """use at most so many devices; replicas that find no room are stacked"""
  coordinator: str | None = None
  """HOST:PORT of process 0, for several processes (default: what jax.distributed detects)"""
  num_processes: int | None = None
  """number of processes"""
  process_id: int | None = None
  """number of this process, from 0"""

  def __post_init__(self):
    for name in ("steps", "replicas", "data_parallel", "fsdp"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    for name in ("seed", "log_every", "eval_every", "save_every"):
      if getattr(self, name) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
    if self.keep < 2:
      raise ValueError(f"`keep` must be at least 2: the newest may be damaged, got {self.keep}.")
    if self.max_devices is not None and self.max_devices < 1:
      raise ValueError(f"`max_devices` must be at least 1, got {self.max_devices}.")
    if self.resume and self.out is None:
      raise ValueError("`resume` needs `out`, the folder of the run to continue.")
    several = (self.coordinator, self.num_processes, self.process_id)
    if any(x is not None for x in several) and any(x is None for x in several):
      raise ValueError(
        f"`coordinator`, `num_processes` and `process_id` must be given together, got {several}."
      )


FREE_ON_RESUME = frozenset(
  (
    "coordinator", "data_parallel", "dry_run", "eval_every", "fsdp", "keep", "log_every",
    "max_devices", "num_processes", "out", "process_id", "replica_change", "resume", "save_every",
    "steps",
  )
)  # fmt: skip
"""Flags that change neither the trajectory of a run nor what its checkpoints hold."""

# Of one start, not of the run: another start may have other processes.
_NEVER_KEPT = frozenset(
  (
    "coordinator", "dry_run", "num_processes", "out", "process_id", "replica_change", "resume",
  )
)  # fmt: skip

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def launch(
  config_type: type[ConfigT],
  main: Callable[[ConfigT], Any],
  argv: Sequence[str] | None = None,
  *,
  description: str | None = None,
) -> None:
  """Parses flags, runs `main`, and turns expected errors into one line and exit code 1.

  With `--resume` the flags not given are those of the run in `--out`. Set JAXCOMM_DEBUG=1 for the
  full traceback of an error.

  Args:
    config_type: frozen dataclass of flags.
    main: called with the parsed flags.
    argv: default the command line.
    description: text of `--help`.
  """
  import tyro

  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    default = _saved_flags(config_type, argv)
    config = tyro.cli(config_type, args=argv, default=default, description=description)
    main(config)
  except _EXPECTED as e:
    if os.environ.get("JAXCOMM_DEBUG"):
      raise
    message = " ".join(str(e).split()) or type(e).__name__
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(1) from e


def _saved_flags(config_type: type[ConfigT], argv: Sequence[str]) -> Any:
  import argparse

  import tyro

  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--out")
  first.add_argument("--resume", action="store_true")
  known, _ = first.parse_known_args(argv)
  if not known.resume or known.out is None or "--help" in argv or "-h" in argv:
    return tyro.MISSING_NONPROP
  saved = load_config(known.out)
  fields = {f.name for f in dataclasses.fields(config_type)}
  if unknown := sorted(saved.keys() - fields):
    raise ValueError(f"{known.out}/config.json has flags that this script lacks: {unknown}.")
  kept = {k: v for k, v in saved.items() if k not in _NEVER_KEPT}
  return config_type(**kept, out=known.out)


def start_devices(config: RunConfig) -> list[Any]:
  """Starts JAX on the devices that the run needs.

  Without an accelerator as many virtual CPU devices are made as the mesh needs. With several
  processes the job is joined first. The persistent compilation cache is on.

  Returns:
    Devices for the mesh: one for each place on `replicas * data_parallel * fsdp`, or only
    `data_parallel * fsdp`, on which the replicas are then stacked.

  Raises:
    ValueError: there are too few devices even for stacked replicas.
  """
  inner = config.data_parallel * config.fsdp
  needed = config.replicas * inner
  processes = config.num_processes or 1
  if needed % processes:
    raise ValueError(
      f"`replicas` * `data_parallel` * `fsdp` = {needed} must be a multiple of `num_processes`,"
      f" got {processes}."
    )
  _before_start(needed // processes, config)
  limit = needed if config.max_devices is None else config.max_devices
  devices = jax.devices()[:limit]
  if len(devices) >= needed:
    return devices[:needed]
  if len(devices) < inner:
    raise ValueError(
      f"`data_parallel` * `fsdp` = {inner} must not exceed the devices, got {len(devices)}"
      f" ({devices[0].device_kind})."
    )
  return devices[:inner]


def _before_start(local_devices: int, config: RunConfig) -> None:
  try:
    jax.config.update("jax_num_cpu_devices", local_devices)
  except RuntimeError:
    return  # called from a program that has started JAX on devices of its own
  cache = os.environ.get("JAXCOMM_CACHE")
  if cache and jax.config.jax_compilation_cache_dir is None:
    jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "xla"))
  if config.coordinator is not None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(config.coordinator, config.num_processes, config.process_id)
