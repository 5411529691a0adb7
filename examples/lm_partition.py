"""Flags of `--partition` in `train_lm.py`, and the training step that they ask for."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import optax
from lm_methods import MethodConfig

from parallel import (
  PartitionPlan,
  ZeroStep,
  clip_by_global_norm,
  flat_specs,
  make_zero_step,
  partitioned,
)

AXES = ("gcd", "gpu", "node")  # the fastest link first


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionConfig(MethodConfig):
  """Flags that choose what each device of a replica keeps; a resumed run may change them."""

  free_on_resume: ClassVar[frozenset[str]] = MethodConfig.free_on_resume | {"partition", "levels"}

  partition: Literal["none", "zero1", "zero2", "zero3", "zeropp", "topo"] = "none"
  """what the --fsdp devices of a replica share; zero: optimizer state (1), and gradients (2), and
  weights (3); zeropp: 8-bit weights, 4-bit gradients, a copy per node; topo: each on its own level;
  none: by the compiler, like zero3"""
  levels: list[int] = dataclasses.field(default_factory=list)
  """with --partition: nodes, GPUs per node, dies per GPU of a replica; their product is --fsdp"""

  def __post_init__(self):
    super().__post_init__()
    if self.partition == "none":
      if self.levels:
        raise ValueError(
          f"`levels` has no effect without a `partition`, got {self.levels} (an empty --levels"
          " drops those of a resumed run)."
        )
      return
    if len(self.levels) != 3 or min(self.levels) < 1 or math.prod(self.levels) != self.fsdp:
      raise ValueError(
        f"`levels` must be three positive numbers whose product is `fsdp` = {self.fsdp}, with"
        f" `partition`, got {self.levels}."
      )
    if self.method in ("powersgd", "demo"):
      raise ValueError(f"`method` {self.method!r} needs matrices, `partition` has flat parts.")
    if self.method == "streaming_diloco":
      raise ValueError("`method` 'streaming_diloco' needs layers, `partition` has flat parts.")
    if self.method == "ddp" and self.overlap:
      raise ValueError("`overlap` of method 'ddp' needs whole gradients, `partition` shards them.")
    if self.method == "dfedsam":
      raise ValueError("`method` 'dfedsam' needs whole gradients, `partition` shards them.")
    for name in ("data_parallel", "stages", "seq_shards", "tensor"):
      if (value := getattr(self, name)) != 1:
        raise ValueError(f"`{name}` must be 1 with `partition`, got {value}.")


def build_plan(config: PartitionConfig) -> PartitionPlan:
  """The plan that `--partition` asks for."""
  if config.partition == "topo":
    return PartitionPlan.topo(AXES)
  if config.partition == "zeropp":
    return PartitionPlan.zeropp(AXES, AXES[:2])
  return PartitionPlan.zero(int(config.partition[-1]), AXES)


def make_partitioned_step(
  config: PartitionConfig,
  loss: Callable[..., Any],
  init: Callable[[jax.Array], Any],
  build_transform: Callable[..., optax.GradientTransformation],
  devices: list[Any],
  *,
  dtype: str,
  stacked: Any,
  policy: Any,
) -> ZeroStep:
  """The step of `config.partition` on a mesh (replica, node, gpu, gcd).

  Args:
    config: flags.
    loss: `(shards, batch, partition=...) -> (loss, aux)`.
    init: `key -> params`.
    build_transform: `(specs, mesh, clip) -> transform`.
    devices: one for each replica's shard; neighbours share the fastest link.
    dtype, stacked: as in `make_zero_step`.
    policy: as in `partitioned`.
  """
  if len(devices) != config.replicas * config.fsdp:
    raise ValueError(
      f"`partition` needs a device for each of `replicas` * `fsdp` = {config.replicas} *"
      f" {config.fsdp} shards, got {len(devices)}: it does not stack replicas."
    )
  grid = np.asarray(devices).reshape(config.replicas, *config.levels)
  auto = (jax.sharding.AxisType.Auto,) * 4
  mesh = jax.sharding.Mesh(grid, ("replica", *AXES[::-1]), axis_types=auto)
  plan = build_plan(config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  tx = build_transform(
    flat_specs(shapes, plan, stacked=stacked), mesh, clip_by_global_norm(1.0, AXES)
  )
  wrap = functools.partial(partitioned, plan=plan, policy=policy)

  def loss_on_shards(shards, batch):
    return loss(shards, batch, partition=wrap)

  return make_zero_step(
    loss_on_shards, init, tx, mesh, plan, dtype=dtype, stacked=stacked, seed=config.seed
  )
