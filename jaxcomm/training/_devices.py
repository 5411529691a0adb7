"""The devices of a run: of one process, or of all that take part."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxcomm.inspect import current_compilation
from jaxcomm.training._cluster import join, launched_processes
from jaxcomm.training._compiler_options import change_options
from jaxcomm.training._launch import REPLICA_SIZES, RunConfig


def start_devices(config: RunConfig) -> list[Any]:
  """Starts JAX on the devices that the run needs.

  Without an accelerator as many virtual CPU devices are made as the mesh needs. With several
  processes the job is joined first: by the flags, or as Slurm, Open MPI or a TPU pod tell. Compiled
  programs are kept in $JAXCOMM_CACHE/xla, by default ~/.cache/jaxcomm/xla, unless JAX has been
  given another folder. Within `jaxcomm.inspect.compiling_for` the devices are those of its target.

  Returns:
    Devices for the mesh: one for each of `replicas * config.devices_per_replica` places, those of
    one process together; or only those of one replica, on which all are then stacked.

  Raises:
    ValueError: there are too few devices even for stacked replicas, replicas whose sequences are
      cut would be stacked, or the processes cannot share the mesh evenly.
  """
  inner = config.devices_per_replica
  needed = config.replicas * inner
  processes = config.num_processes or launched_processes()
  _check_shares(config, needed, processes)
  _before_start(needed // processes, config)
  processes = jax.process_count()  # a TPU pod counts its hosts itself
  _check_shares(config, needed, processes)
  if processes > 1 and config.max_devices is not None and config.max_devices < needed:
    raise ValueError(
      f"`max_devices` = {config.max_devices} would stack replicas, which needs one process, got"
      f" {processes}."
    )
  limit = needed if config.max_devices is None else min(config.max_devices, needed)
  change_options(config.compiler_options)
  compilation = current_compilation()
  if compilation is None:
    devices = _of_each_process(jax.devices(), limit // processes)
  else:  # a dry run for devices that are not here
    devices = list(compilation.target.devices[:limit])
  if len(devices) == needed:
    return devices
  if processes > 1:
    raise ValueError(
      f"{_sizes(config, 'replicas')} = {needed} must not exceed the {len(devices)} devices of"
      f" {processes} processes: replicas are stacked only within one process."
    )
  if len(devices) < inner:
    raise ValueError(
      f"{_sizes(config)} = {inner} must not exceed the devices, got {len(devices)}"
      f" ({devices[0].device_kind})."
    )
  for name, cut in (("seq_shards", "sequences"), ("stages", "layers")):
    if (value := getattr(config, name)) > 1:
      raise ValueError(
        f"`{name}` = {value} needs a device for each of {_sizes(config, 'replicas')} = {needed}"
        f" places, got {len(devices)}: replicas with cut {cut} cannot be stacked."
      )
  return devices[:inner]


def _check_shares(config: RunConfig, needed: int, processes: int) -> None:
  if needed % processes:
    raise ValueError(
      f"{_sizes(config, 'replicas')} = {needed} must be a multiple of the number of processes, got"
      f" {processes}."
    )


def _sizes(config: RunConfig, *names: str) -> str:
  """The flags, of `names` and of one replica, whose product is a number of devices above 1."""
  larger = [name for name in (*names, *REPLICA_SIZES) if getattr(config, name) > 1]
  return " * ".join(f"`{name}`" for name in larger)


def _of_each_process(devices: Sequence[Any], count: int) -> list[Any]:
  """The first `count` devices of each process, process by process."""
  groups: dict[int, list[Any]] = {}
  for device in devices:
    groups.setdefault(device.process_index, []).append(device)
  return [device for process in sorted(groups) for device in groups[process][:count]]


def _before_start(local_devices: int, config: RunConfig) -> None:
  try:
    jax.config.update("jax_num_cpu_devices", local_devices)
  except RuntimeError:
    if config.coordinator is not None:
      raise ValueError(
        "`coordinator` comes too late: this process has already started JAX by itself."
      ) from None
    return  # called from a program that has started JAX on devices of its own
  if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
    cache = pathlib.Path(os.environ.get("JAXCOMM_CACHE") or "~/.cache/jaxcomm").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
  join(config.coordinator, config.num_processes, config.process_id)
