"""Device meshes and sharding rules."""

from parallel.mesh import AXES, make_mesh
from parallel.sharding import (
  DEFAULT_RULES,
  Rules,
  batch_spec,
  mesh_specs,
  named_shardings,
  shard_batch,
)

__all__ = [
  "AXES",
  "DEFAULT_RULES",
  "Rules",
  "batch_spec",
  "make_mesh",
  "mesh_specs",
  "named_shardings",
  "shard_batch",
]
