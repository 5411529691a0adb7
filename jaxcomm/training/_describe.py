"""What is printed of a run before and while it trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax

from jaxcomm.training._compiler_options import overlap_options
from jaxcomm.training._progress import format_bytes
from jaxcomm.training._wire import StepWire, bytes_over_replica

if TYPE_CHECKING:
  from jaxcomm.training._run import Task

# Rough rates for estimates before the first step; bf16 matrix peak at 40 % where known.
_FLOPS_PER_SECOND = {"H100": 0.4 * 989e12, "H200": 0.4 * 989e12, "A100": 0.4 * 312e12}
_FLOPS_PER_SECOND |= {"TPU v5 lite": 0.4 * 197e12, "TPU v5": 0.4 * 459e12, "TPU v4": 0.4 * 275e12}
_CPU_FLOPS_PER_SECOND = 4e10  # a laptop's whole processor
_SHOWN = ("replica", "data", "fsdp")  # axes that are named at size 1, too


def num_params(task: Task) -> int:
  """Parameters of one replica."""
  layout = task.train_step.logical_layout
  leaves = zip(jax.tree.leaves(layout.shapes.params), jax.tree.leaves(layout.varying.params))
  return sum(math.prod(s.shape[1:] if varies else s.shape) for s, varies in leaves)


def describe_run(task: Task) -> str:
  """Title, parameters and mesh."""
  layout = task.train_step.layout
  sizes = layout.mesh.shape.items()
  mesh = ", ".join(f"{name} {size}" for name, size in sizes if size > 1 or name in _SHOWN)
  device = layout.mesh.devices.flat[0].device_kind
  stacked = f", {layout.num_replicas} replicas stacked on the devices" if layout.stacked else ""
  options = overlap_options(layout.mesh.devices.flat[0])
  given = ", ".join(f"{name}={value}" for name, value in options.items())
  return (
    f"{task.title}\nparameters: {num_params(task):,}\n"
    f"mesh: {mesh} on {layout.mesh.size} x {device}{stacked}"
    + (f"\ncompiler options: {given}" if given else "")
  )


def describe_setting(task: Task) -> str:
  """Parameters, replicas and devices on one line, for people."""
  layout = task.train_step.layout
  device = layout.mesh.devices.flat[0].device_kind
  replicas = f"{layout.num_replicas} replica" + ("s" if layout.num_replicas > 1 else "")
  count = format_count(num_params(task))
  return f"{count} parameters, {replicas}, {layout.mesh.size} x {device}"


def format_count(count: int) -> str:
  """A number with three digits and a unit: 131k, 1.24B."""
  for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
    if count >= size:
      return f"{count / size:.3g}{unit}"
  return str(count)


def describe_wire(task: Task, wire: StepWire, step_seconds: float, how: str) -> str:
  """Bytes per step and axis, and the link speed below which the method wins."""
  kind = "logical, " if wire.logical else ""
  lines = [f"bytes sent per device and step ({kind}mean over a round):"]
  per_step = wire.per_step(task.exchange_shares)
  lines += [f"  {axis:<10} {format_bytes(sent)}" for axis, sent in per_step.items()]
  sent = bytes_over_replica(per_step)
  ratio = f", {wire.dense / sent:,.1f} times as much" if sent else ""
  lines.append(f"  data parallel over replica would send {format_bytes(wire.dense)}{ratio}")
  speed = wire.break_even(task.exchange_shares, step_seconds)
  claim = f"below {speed * 8 / 1e6:,.1f} Mbit/s per device" if speed > 0 else "at no link speed"
  lines.append(
    f"faster than data parallel {claim} (at {1000 * step_seconds:.1f} ms of computation per step,"
    f" {how}; data parallel granted perfect overlap)"
  )
  return "\n".join(lines)


def describe_memory(compiled: jax.stages.Compiled) -> str:
  """Bytes that the step needs on each device."""
  memory = compiled.memory_analysis()
  if memory is None:
    return "memory per device: the compiler does not say"
  state = memory.argument_size_in_bytes
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporary = memory.temp_size_in_bytes
  return (
    f"memory per device: {format_bytes(state + fresh + temporary)} (state and batch"
    f" {format_bytes(state)}, temporary {format_bytes(temporary)}, new outputs"
    f" {format_bytes(fresh)})"
  )


def guess_step_seconds(task: Task) -> float:
  """Computation of a step, from FLOPs and a rough rate of the devices."""
  mesh = task.train_step.layout.mesh
  kind = mesh.devices.flat[0].device_kind
  rate = next((v for k, v in _FLOPS_PER_SECOND.items() if k in kind), None)
  total = _CPU_FLOPS_PER_SECOND if rate is None else rate * mesh.size
  return task.flops_per_step / total
