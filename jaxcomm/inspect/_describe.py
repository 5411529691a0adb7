"""What is printed of a program that was compiled for a target."""

import jax

from jaxcomm.inspect._wire import collective_bytes
from jaxcomm.inspect.overlap import OverlapReport
from jaxcomm.inspect.targets import Target
from jaxcomm.inspect.timeline import sensitivity


def describe_compiled(
  compiled: jax.stages.Compiled,
  mesh: jax.sharding.Mesh,
  target: Target,
  report: OverlapReport,
) -> str:
  """Memory per device against capacity, bytes sent per axis, overlap, and modelled times.

  Args:
    compiled: a program for devices of `target`.
    mesh: the mesh that it was compiled for.
    target: whose memory and rates to compare with.
    report: `overlap_report(compiled, mesh)`.
  """
  wire = collective_bytes(compiled, mesh)
  lines = [f"{target.name}: {mesh.size} of {len(target.devices)} devices"]
  lines += [_memory(compiled, target)]
  lines += [
    f"sent per device over {axis}: {sent:,.0f} bytes" for axis, sent in wire.by_axis.items()
  ]
  if wire.conditional:
    lines.append(f"  of which {wire.conditional:,.0f} bytes only when its conditionals are taken")
  return "\n".join([*lines, str(report), sensitivity(report, target.machine)])


def _memory(compiled: jax.stages.Compiled, target: Target) -> str:
  memory = compiled.memory_analysis()
  if memory is None:
    return "memory per device: the compiler does not say"
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  needed = memory.argument_size_in_bytes + fresh + memory.temp_size_in_bytes
  capacity = target.memory_bytes
  fits = "fits" if needed <= capacity else "DOES NOT FIT"
  return (
    f"memory per device: {needed / 2**30:,.2f} GiB of {capacity / 2**30:,.2f} ({fits}; arguments"
    f" {memory.argument_size_in_bytes / 2**30:,.2f}, temporary"
    f" {memory.temp_size_in_bytes / 2**30:,.2f}, new outputs {fresh / 2**30:,.2f})"
  )
