"""Device meshes and sharding rules."""

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

__all__ = [
  "AXES",
  "DEFAULT_RULES",
  "Rules",
  "batch_spec",
  "call_with_auto_axes",
  "gather_fsdp",
  "make_mesh",
  "mesh_specs",
  "named_shardings",
  "shard_batch",
]
