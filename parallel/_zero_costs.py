"""What a partition plan costs: memory per device, and bytes per level of the mesh."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxcomm.compressors import BlockInt
from parallel._zero_plan import (
  Level,
  PartitionPlan,
  axes_of,
  check_mesh,
  layer_shapes,
  level_axes,
)
from parallel.mesh import REPLICA


def memory_per_device(
  plan: PartitionPlan,
  n_params: Any,
  mesh_shape: Mapping[str, int],
  *,
  optimizer_bytes: float = 12,
  weight_bytes: float = 2,
  grad_bytes: float = 2,
  stacked: Any = False,
) -> dict[str, float]:
  """Bytes of model state on one device, without activations.

  With psi parameters and |A| the devices over which A is sharded: weights b_w psi / |A_weights|,
  secondary b_w psi / |A_secondary|, gradients b_g psi / |A_gradients|, optimizer K psi /
  |A_optimizer|. A leaf counts with its padding.

  Args:
    plan: the plan.
    n_params: number of parameters, counted as one leaf; or a tree of arrays or
      `jax.ShapeDtypeStruct`, counted leaf by leaf.
    mesh_shape: devices per axis, such as `mesh.shape`; `replica` is not looked at.
    optimizer_bytes: K: 4 for the float32 parameters, 8 for Adam's two moments.
    weight_bytes: b_w, of the dtype that the model computes in.
    grad_bytes: b_g, of a gradient (float32 when micro-steps are accumulated).
    stacked: tree prefix of bool: leaves with a leading axis of layers, each gathered by itself.

  Raises:
    ValueError: an axis of `plan` is not in `mesh_shape`.

  >>> from parallel import PartitionPlan
  >>> shape = {"node": 1, "gpu": 4, "gcd": 2}
  >>> memory_per_device(PartitionPlan.topo(), 8_000_000, shape)["total"]
  22000000.0
  """
  check_mesh(plan, tuple(mesh_shape))
  psi = sum(count * size for size, _, count in _leaves(plan, n_params, mesh_shape, stacked))

  def share(levels) -> float:
    return psi / math.prod(mesh_shape[a] for a in axes_of(levels))

  parts = {
    "weights": weight_bytes * share(plan.weights),
    "secondary": weight_bytes * share(plan.secondary) if plan.secondary else 0.0,
    "gradients": grad_bytes * share(plan.gradients),
    "optimizer": optimizer_bytes * share(plan.optimizer),
  }
  return parts | {"total": sum(parts.values())}


def traffic_per_step(
  plan: PartitionPlan,
  n_params: Any,
  mesh_shape: Mapping[str, int],
  grad_accum: int = 1,
  *,
  weight_bytes: float = 2,
  grad_bytes: float = 2,
  stacked: Any = False,
) -> dict[str, float]:
  """Bytes that one device sends (and receives) over each level in one optimizer step.

  A gather or reduce-scatter over g devices of a buffer of F elements costs F (g - 1) / g elements.
  Per micro-step: the gather of the weights, forward, and again, backward (from `secondary` if
  there is one); the reduce-scatter of the gradient over `gradients`. Once per step: the
  reduce-scatter over the other axes of `optimizer`, an all-reduce in float32 over axes of the mesh
  that the plan does not name, and the gather that makes weights of parameters. An element costs
  b_w or b_g bytes, or bits / 8 + 4 / block_size.

  It is what the compiled step sends, but for a few scalars (loss and metrics), weights that the
  backward pass does not need (a bias, an embedding), which are not gathered again, and weights that
  several layers use (a tied embedding), which each of them gathers and reduces.

  Args:
    plan, n_params, mesh_shape, weight_bytes, grad_bytes, stacked: as in `memory_per_device`.
    grad_accum: micro-steps per optimizer step.

  Returns:
    Bytes by level: an axis, or the axes of a collective joined by commas in the order of the mesh,
    as in `jaxcomm.inspect.collective_bytes(...).by_axis`. Axes of size 1 send nothing.

  Raises:
    ValueError: an axis of `plan` is not in `mesh_shape`, or `grad_accum` is below 1.

  >>> from parallel import PartitionPlan
  >>> shape = {"node": 2, "gpu": 2, "gcd": 2}
  >>> traffic_per_step(PartitionPlan.zero(3, ("gcd", "gpu", "node")), 1024, shape)
  {'node,gpu,gcd': 5376.0}
  >>> traffic_per_step(PartitionPlan.topo(), 1024, shape)
  {'gcd': 3072.0, 'gpu': 1024.0, 'node': 512.0}
  """
  check_mesh(plan, tuple(mesh_shape))
  if grad_accum < 1:
    raise ValueError(f"`grad_accum` must be at least 1, got {grad_accum}.")
  sent: dict[str, float] = {}

  def add(level: Level, num_bytes: float) -> None:
    name = ",".join(a for a in mesh_shape if a in level_axes(level) and mesh_shape[a] > 1)
    if name:
      sent[name] = sent.get(name, 0.0) + num_bytes

  def hops(levels, whole: float, bits_of, num_bytes: float) -> None:
    """One hop per level over what the levels before leave of a buffer of `whole` elements."""
    for level in levels:
      g = _size(level, mesh_shape)
      add(level, (g - 1) * _message(whole / g, bits_of(level), plan.block_size, num_bytes))
      whole /= g

  def share(levels) -> int:
    return _size(axes_of(levels), mesh_shape)

  for padded, size, count in _leaves(plan, n_params, mesh_shape, stacked):
    to_weights = lambda _, n=size: plan.bits_of_weights(n)  # noqa: E731
    to_gradients = lambda level, n=size: plan.bits_of_gradients(level, n)  # noqa: E731
    for _ in range(count * grad_accum):
      hops(plan.weights, padded, to_weights, weight_bytes)
      hops(plan.secondary or plan.weights, padded, to_weights, weight_bytes)
      hops(plan.gradients, padded, to_gradients, grad_bytes)
    layers = padded * count  # what is sent once a step goes for all layers together
    hops(plan.last_hops, layers / share(plan.gradients), to_gradients, grad_bytes)
    hops(plan.rebuild, layers / share(plan.weights), to_weights, weight_bytes)
    copies = copied_axes(plan, mesh_shape)
    g = _size(copies, mesh_shape)
    add(copies, 2 * (g - 1) / g * 4 * layers / share(plan.optimizer))
  return sent


def copied_axes(plan: PartitionPlan, mesh_axes: Any) -> tuple[str, ...]:
  """Axes of the mesh, besides `replica`, that the plan does not name: they hold copies."""
  return tuple(a for a in mesh_axes if a != REPLICA and a not in axes_of(plan.optimizer))


def _leaves(
  plan: PartitionPlan, n_params: Any, mesh_shape: Mapping[str, int], stacked: Any
) -> Iterator[tuple[int, int, int]]:
  """(elements of a layer with padding, and without; number of layers) of every leaf."""
  if isinstance(n_params, int):
    yield plan.padded_size(n_params, mesh_shape), n_params, 1
    return
  layers = layer_shapes(n_params, stacked)
  for x, layer in zip(jax.tree.leaves(n_params), jax.tree.leaves(layers)):
    count = x.shape[0] if len(x.shape) > len(layer.shape) else 1
    yield plan.padded_size(layer.size, mesh_shape), layer.size, count


def _size(level: Level, mesh_shape: Mapping[str, int]) -> int:
  return math.prod(mesh_shape[a] for a in level_axes(level))


def _message(size: float, bits: int | None, block_size: int, num_bytes: float) -> float:
  """Bytes of one message of `size` elements."""
  if bits is None:
    return num_bytes * size
  return float(BlockInt(bits, block_size).payload_bytes((int(size),)))
