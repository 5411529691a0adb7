"""What a training step sends: read from the compiled step, by how much of it a step exchanges."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm.inspect import WireReport, collective_bytes
from jaxcomm.training._step import TrainStep, make_train_step
from jaxcomm.transforms import pmean_over

P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWire:
  """Bytes that one device sends in one training step, by mesh axis.

  Attributes:
    levels: bytes per axis of a step, for every level of exchange that the compiled step has, in
      rising order: one if all steps send the same; two for a method with rounds (0 for a local
      step, 1 for a step that ends a round). `jaxcomm.transforms.exchange_level` says which a step
      had.
    dense: bytes over `replica` of plain data parallelism: the float32 mean of all
      gradients, every step.
    logical: replicas are stacked on the devices, so that these bytes would cross the wire if each
      had its own; read from the same update compiled for one device per replica.
  """

  levels: tuple[dict[str, float], ...]
  dense: float
  logical: bool

  def sent(self, level: int) -> float:
    """Bytes per device of a step with this level of exchange."""
    return sum(_at(self.levels, level).values())

  def per_step(self, shares: Sequence[float]) -> dict[str, float]:
    """Mean bytes per step and axis, if `shares[i]` of the steps have level i."""
    levels = [_at(self.levels, i) for i in range(len(shares))]
    axes = sorted({axis for level in levels for axis in level})
    return {a: sum(w * x.get(a, 0.0) for w, x in zip(shares, levels)) for a in axes}

  def break_even(self, shares: Sequence[float], step_seconds: float) -> float:
    """Link speed, bytes/s, below which the method beats plain data parallelism.

    Data parallelism is granted perfect overlap, `max(t, dense / v)` per step at speed `v`, and the
    method none, `t + sent / v`: they are equal at `v = (dense - sent) / t`. Zero or less means
    that the method never wins.
    """
    sent = bytes_over_replica(self.per_step(shares))
    return (self.dense - sent) / step_seconds


def bytes_over_replica(by_axis: Mapping[str, float]) -> float:
  """Of bytes by mesh axis, those between replicas: over `replica` alone or with other axes.

  Example:
    >>> from jaxcomm.training import bytes_over_replica
    >>> bytes_over_replica({"replica": 4.0, "replica,stage": 2.0, "tensor": 1.0})
    6.0
  """
  return sum(sent for axes, sent in by_axis.items() if "replica" in axes.split(","))


def step_wire(train_step: TrainStep, compiled: jax.stages.Compiled) -> StepWire:
  """Reads `StepWire` from the compiled step.

  Args:
    train_step: the step, for its transform and layout.
    compiled: `train_step.compile(batch)`.

  Raises:
    ValueError: replicas are stacked and the process has fewer CPU devices than replicas, on which
      the update alone is compiled: set `jax_num_cpu_devices`.
  """
  layout = train_step.layout
  levels = _levels(collective_bytes(compiled, layout.mesh))
  if layout.stacked:
    logical = _levels(_logical_report(train_step.tx, train_step))
    inner = [{a: x for a, x in level.items() if "replica" not in a} for level in levels]
    outer = [{a: x for a, x in level.items() if "replica" in a} for level in logical]
    last = max(len(inner), len(outer))
    levels = tuple(_at(inner, i) | _at(outer, i) for i in range(last))
  return StepWire(levels=levels, dense=_dense_bytes(train_step), logical=layout.stacked)


def _dense_bytes(train_step: TrainStep) -> float:
  """Of plain data parallelism over `replica`, per device and step."""
  layout = train_step.layout
  if layout.num_replicas == 1:  # nothing; and XLA fails on a sharded mean over an axis of size 1
    return 0.0
  ddp = optax.chain(pmean_over("replica"), optax.sgd(1.0))
  if layout.stacked:
    report = _logical_report(ddp, train_step)
  else:
    report = _update_report(ddp, train_step, layout.mesh)
  return report.by_axis.get("replica", 0.0)


def _at(levels: Sequence[dict[str, float]], i: int) -> dict[str, float]:
  return levels[min(i, len(levels) - 1)]


def _levels(report: WireReport) -> tuple[dict[str, float], ...]:
  """Bytes per axis of everything that the step may send, in rising order of the sum.

  One conditional of more than two branches (a method that sends fragments): as the branches are
  counted. Independent conditionals (two methods with rounds of their own) could be combined in many
  ways: then only nothing of it and all of it.
  """
  branches = {op.branch for op in report.ops if op.branch}
  if len({b[0].conditional for b in branches}) == 1:
    if all(len(b) == 1 and b[0].num_branches > 2 for b in branches):
      return tuple(report.by_axis_of_paths())
  try:
    paths = report.by_axis_of_paths()
  except ValueError:  # too many
    paths = [report.by_axis_when(False), report.by_axis_when(True)]
  found = {sum(x.values()): x for x in paths}
  levels = tuple(dict(found[total]) for total in sorted(found))
  return levels if len(levels) <= 3 else (levels[0], levels[-1])


def _logical_report(tx: optax.GradientTransformation, train_step: TrainStep) -> WireReport:
  """The update compiled for CPU devices, as many as if replicas were not stacked."""
  stacked = train_step.layout.mesh
  sizes = {**stacked.shape, "replica": train_step.layout.num_replicas}
  needed = math.prod(sizes.values())
  try:
    devices = jax.devices("cpu")
  except RuntimeError:
    devices = []
  if len(devices) < needed:
    raise ValueError(
      f"reading the logical bytes of {sizes['replica']} stacked replicas needs {needed} CPU"
      f" devices, got {len(devices)}: allow the platform cpu and set"
      f" jax.config.update('jax_num_cpu_devices', {needed}) first."
    )
  grid = np.asarray(devices[:needed]).reshape(tuple(sizes.values()))
  mesh = jax.sharding.Mesh(grid, tuple(sizes), axis_types=stacked.axis_types)
  return _update_report(tx, train_step, mesh)


def _update_report(
  tx: optax.GradientTransformation, train_step: TrainStep, mesh: jax.sharding.Mesh
) -> WireReport:
  layout = train_step.layout

  def shape_of(shape: Any, varies: bool) -> Any:
    return jnp.zeros(shape.shape[1:] if varies else shape.shape, shape.dtype)

  def init_params(key):
    del key
    return jax.tree.map(shape_of, layout.shapes.params, layout.varying.params)

  def quadratic(params, batch):
    del batch
    sums = [jnp.sum(p.astype(jnp.float32) ** 2) for p in jax.tree.leaves(params)]
    return jnp.stack(sums).sum(), {}

  update = make_train_step(quadratic, init_params, tx, mesh, param_specs=layout.param_specs)
  rows = jax.ShapeDtypeStruct((mesh.size, mesh.size), jnp.float32)  # any axis divides them
  return collective_bytes(update.compile(rows), mesh)
