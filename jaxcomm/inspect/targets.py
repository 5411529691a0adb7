"""Devices to compile for that this machine does not have."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

from jaxcomm.inspect._machines import H100, TPU_V5E, TPU_V5P, Machine

# name -> (constants, the compiler's name of the arrangement)
_TARGETS = {
  "gpu:h100:1x8": (H100, "1x1x8"),
  "gpu:h100:4x8": (H100, "1x4x8"),
  "tpu:v5e:2x4": (TPU_V5E, "v5e:2x4"),
  "tpu:v5p:4x4x4": (TPU_V5P, "v5p:4x4x4"),
}
# platform -> (extra of this project, packages of which one must be there)
_PACKAGES = {
  "gpu": ("aot-gpu", ("jax_cuda12_plugin", "jax_cuda13_plugin")),
  "tpu": ("aot-tpu", ("libtpu",)),
}
# Read when the compilers' libraries start: no metadata server to ask, no CUDA driver to check, no
# TPU to reserve for one process.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}
_current: "Compilation | None" = None


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices that programs can be compiled for, not run on.

  Attributes:
    name: as `target` takes it.
    devices: for a `jax.sharding.Mesh`; those of one host stand together.
    machine: rates and memory of one device.
  """

  name: str
  devices: tuple[Any, ...]
  machine: Machine

  @property
  def memory_bytes(self) -> int:
    """Capacity of one device."""
    return self.machine.memory_bytes


def target(name: str) -> Target:
  """Devices for ahead-of-time compilation; no accelerator is needed.

  `jax.jit(f).lower(...).compile()` on a mesh of them gives the program that the accelerator would
  run: `memory_analysis()`, `collective_bytes`, `overlap_report`. If JAX has not started and
  nobody has chosen its platforms, it is set to start on CPU alone.

  Args:
    name: `gpu:h100:1x8` (one host of 8), `gpu:h100:4x8`, `tpu:v5e:2x4` or `tpu:v5p:4x4x4`.

  Raises:
    ValueError: an unknown name.
    ImportError: the compiler is not installed; the message names the extra that has it.

  Example:
    >>> try:
    ...   target("gpu:h200")
    ... except ValueError as e:
    ...   print(e)
    `name` must be one of gpu:h100:1x8, gpu:h100:4x8, tpu:v5e:2x4, tpu:v5p:4x4x4, got 'gpu:h200'.
  """
  if name not in _TARGETS:
    raise ValueError(f"`name` must be one of {', '.join(_TARGETS)}, got {name!r}.")
  machine, arrangement = _TARGETS[name]
  platform = name.partition(":")[0]
  extra, packages = _PACKAGES[platform]
  if not any(importlib.util.find_spec(package) for package in packages):
    raise ImportError(
      f"target {name} needs the package {packages[0]}: pip install 'jaxcomm[{extra}]'."
    )
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_platforms", "cpu")
  return Target(name, tuple(_devices(platform, arrangement)), machine)


@dataclasses.dataclass(frozen=True)
class Compilation:
  """What `compiling_for` gives: the programs that were compiled within it, with their meshes."""

  target: Target
  programs: list[tuple[jax.stages.Compiled, jax.sharding.Mesh]]


@contextlib.contextmanager
def compiling_for(chosen: Target) -> Iterator[Compilation]:
  """Within it `jaxcomm.training.start_devices` gives the devices of `chosen`.

  So the `--dry-run` of a training script compiles for them, and its step is in `programs`
  afterwards. Nothing can run there.
  """
  global _current
  before, _current = _current, Compilation(chosen, [])
  try:
    yield _current
  finally:
    _current = before


def current_compilation() -> Compilation | None:
  """That of the innermost `compiling_for`; None outside."""
  return _current


def _devices(platform: str, arrangement: str) -> list[Any]:
  from jax.experimental import topologies

  jax.devices("cpu")  # starts JAX, which registers the compilers
  if platform == "tpu":
    return topologies.get_topology_desc(platform="tpu", topology_name=arrangement).devices
  chip = (pathlib.Path(__file__).parent / "h100_sxm.txtpb").read_text()
  return topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology=arrangement, target_config=chip
  ).devices
