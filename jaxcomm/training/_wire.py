"""What a training step sends: read from the compiled step, split by whether a round ends."""

import dataclasses
import math
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
    always: bytes per axis of every step.
    on_sync: further bytes per axis of a step that ends a round.
    dense: bytes over `replica` of plain data parallelism: the float32 mean of all
      gradients, every step.
    logical: replicas are stacked on the devices, so that these bytes would cross the wire if each
      had its own; read from the same update compiled for one device per replica.
  """

  always: dict[str, float]
  on_sync: dict[str, float]
  dense: float
  logical: bool

  def sent(self, synced: bool) -> float:
    """Bytes per device of a step, given whether it ended a round."""
    return sum(self.always.values()) + (sum(self.on_sync.values()) if synced else 0.0)

  def per_step(self, sync_period: int | None) -> dict[str, float]:
    """Mean bytes per step and axis, with a round every `sync_period` steps (None: no rounds)."""
    axes = sorted(self.always.keys() | self.on_sync.keys())
    share = 0.0 if sync_period is None else 1.0 / sync_period
    return {a: self.always.get(a, 0.0) + share * self.on_sync.get(a, 0.0) for a in axes}

  def break_even(self, sync_period: int | None, step_seconds: float) -> float:
    """Link speed, bytes/s, below which the method beats plain data parallelism.

    Data parallelism is granted perfect overlap, `max(t, dense / v)` per step at speed `v`, and the
    method none, `t + sent / v`: they are equal at `v = (dense - sent) / t`. Zero or less means
    that the method never wins.
    """
    sent = self.per_step(sync_period).get("replica", 0.0)
    return (self.dense - sent) / step_seconds


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
  report = collective_bytes(compiled, layout.mesh)
  always, on_sync = _split(report)
  if layout.stacked:
    logical_always, logical_on_sync = _split(_logical_report(train_step.tx, train_step))
    always = always | {a: b for a, b in logical_always.items() if "replica" in a}
    on_sync = on_sync | {a: b for a, b in logical_on_sync.items() if "replica" in a}
    dense = _logical_report(optax.chain(pmean_over("replica"), optax.sgd(1.0)), train_step)
  else:
    dense = _update_report(
      optax.chain(pmean_over("replica"), optax.sgd(1.0)), train_step, layout.mesh
    )
  return StepWire(
    always=always,
    on_sync=on_sync,
    dense=dense.by_axis.get("replica", 0.0),
    logical=layout.stacked,
  )


def _split(report: WireReport) -> tuple[dict[str, float], dict[str, float]]:
  always = report.by_axis_when(False)
  full = report.by_axis_when(True)
  extra = {a: full[a] - always.get(a, 0.0) for a in full}
  return dict(always), {a: b for a, b in extra.items() if b}


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
  rows = jax.ShapeDtypeStruct((mesh.size,), jnp.float32)
  return collective_bytes(update.compile(rows), mesh)
