"""Device meshes, sharding rules, and what each device keeps of the training state."""

from parallel._blockwise import merge_partials
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
from parallel.allgather_attention import allgather_attention
from parallel.context import ContextParallel
from parallel.decode_attention import decode_attention
from parallel.mean_in_backward import average_gradient, mean_in_backward
from parallel.mesh import AXES, make_mesh
from parallel.pipeline import (
  PipelineParallel,
  pipeline,
  pipeline_loss,
  pipeline_value_and_grad,
  stack_stages,
  unstack_stages,
)
from parallel.ring_attention import ring_attention, ring_attention_bytes
from parallel.routing import RandomRoute, random_route
from parallel.schedule import bubble_fraction, peak_activations, schedule_table
from parallel.sequence_layout import (
  Layout,
  causal_balance,
  causal_work,
  context_permutation,
  shard_tokens,
)
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
from parallel.ulysses import ulysses_attention, ulysses_attention_bytes
from parallel.zero import ZeroStep, flat_specs, make_zero_step, shard_state

__all__ = [
  "AXES",
  "DEFAULT_RULES",
  "ContextParallel",
  "Layout",
  "PartitionPlan",
  "PipelineParallel",
  "RandomRoute",
  "Rules",
  "Shard",
  "ZeroStep",
  "allgather_attention",
  "average_gradient",
  "batch_spec",
  "bubble_fraction",
  "call_with_auto_axes",
  "causal_balance",
  "causal_work",
  "clip_by_global_norm",
  "context_permutation",
  "decode_attention",
  "flat_specs",
  "gather_fsdp",
  "gather_params",
  "make_mesh",
  "make_zero_step",
  "mean_in_backward",
  "memory_per_device",
  "merge_partials",
  "mesh_specs",
  "named_shardings",
  "partitioned",
  "peak_activations",
  "pipeline",
  "pipeline_loss",
  "pipeline_value_and_grad",
  "random_route",
  "reduce_scatter_grads",
  "ring_attention",
  "ring_attention_bytes",
  "schedule_table",
  "shard_batch",
  "shard_params",
  "shard_state",
  "shard_tokens",
  "stack_stages",
  "traffic_per_step",
  "ulysses_attention",
  "ulysses_attention_bytes",
  "unstack_stages",
]
