"""Device meshes, sharding rules, and what each device keeps of the training state."""

from parallel._zero_costs import memory_per_device, traffic_per_step
from parallel._zero_optimizer import clip_by_global_norm
from parallel._zero_plan import PartitionPlan
from parallel._zero_shards import (
  Shard,
  gather_params,
  partitioned,
  reduce_scatter_grads,
  shard_params,
)
from parallel.mesh import AXES, make_mesh
from parallel.sharding import (
  DEFAULT_RULES,
  Rules,
  batch_spec,
  call_with_auto_axes,
  gather_fsdp,
  mesh_specs,
  named_shardings,
  shard_batch,
)
from parallel.zero import ZeroStep, flat_specs, make_zero_step, shard_state

__all__ = [
  "AXES",
  "DEFAULT_RULES",
  "PartitionPlan",
  "Rules",
  "Shard",
  "ZeroStep",
  "batch_spec",
  "call_with_auto_axes",
  "clip_by_global_norm",
  "flat_specs",
  "gather_fsdp",
  "gather_params",
  "make_mesh",
  "make_zero_step",
  "memory_per_device",
  "mesh_specs",
  "named_shardings",
  "partitioned",
  "reduce_scatter_grads",
  "shard_batch",
  "shard_params",
  "shard_state",
  "traffic_per_step",
]
