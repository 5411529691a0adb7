"""A weight that every device has a part of: gathered before use, its gradient scattered after it.

All of this runs inside `jax.shard_map`, manual over the axes of the plan.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from parallel._zero_hops import (
  axis_sizes,
  flatten,
  gather_levels,
  own_part,
  scatter_levels,
  unflatten,
  vary_all,
)
from parallel._zero_plan import PartitionPlan, axes_of, layer_shapes, levels_after

_SECONDARY = "secondary weights"


class Shard(struct.PyTreeNode):
  """This device's part of one weight, as `gather_params` takes it.

  Attributes:
    weight: [..., c], in the dtype of the computation; a leading axis of layers if stacked.
    slot: zeros like this device's part of the gradient. The derivative with respect to it is that
      part of the gradient; the derivative with respect to `weight`, whose part is another one, is
      not computed.
    key: for stochastic rounding of the gradient, one per layer; None without.
    shape: of the weight of one layer.
  """

  weight: jax.Array
  slot: jax.Array
  key: jax.Array | None
  shape: tuple[int, ...] = struct.field(pytree_node=False)


def is_shard(x: Any) -> bool:
  """Whether `x` is a `Shard`, for `is_leaf`."""
  return isinstance(x, Shard)


def make_weights(masters: Any, shapes: Any, plan: PartitionPlan, dtype: Any) -> Any:
  """This device's parts of the weights, from its float32 parts over `plan.optimizer`.

  Wire: a gather over `plan.rebuild`, in `dtype` or with `plan.weight_bits`.
  """

  def weight(master, like):
    bits = plan.bits_of_weights(like.size)
    return gather_levels(master.astype(dtype), plan.rebuild, bits, plan.block_size)

  return jax.tree.map(weight, masters, shapes)


def make_shards(weights: Any, shapes: Any, plan: PartitionPlan, key: jax.Array | None) -> Any:
  """Tree of `Shard` of the parts that `make_weights` returns."""
  sizes = axis_sizes(plan)
  share = math.prod(sizes[a] for a in axes_of(plan.gradients))

  def shard(path, weight, like):
    lead = weight.shape[:-1]
    slot = jnp.zeros((*lead, plan.padded_size(like.size, sizes) // share), weight.dtype)
    return vary_all(Shard(weight, slot, leaf_keys(key, path, lead), like.shape))

  return jax.tree_util.tree_map_with_path(shard, weights, shapes)


def leaf_keys(key: jax.Array | None, path: Any, lead: tuple[int, ...]) -> jax.Array | None:
  """A key for each layer of the leaf at `path`, of its own on every device."""
  if key is None:
    return None
  key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
  axes = tuple(sorted(jax.sharding.get_abstract_mesh().manual_axes))
  key = jax.random.fold_in(key, jax.lax.axis_index(axes))
  return jax.random.split(key, lead) if lead else key


def shard_params(
  params: Any,
  plan: PartitionPlan,
  *,
  dtype: Any = jnp.float32,
  stacked: Any = False,
  key: jax.Array | None = None,
) -> Any:
  """This device's `Shard` of every parameter; nothing crosses the wire.

  For parameters that every device has. Inside `jax.shard_map`, manual over the axes of `plan`;
  training does not come here, see `make_zero_step`.

  Args:
    params: tree of floating-point arrays, equal on all devices.
    plan: the plan.
    dtype: that the model computes in.
    stacked: tree prefix of bool: leaves with a leading axis of layers.
    key: for stochastic rounding, where `plan.grad_bits` is given.

  Raises:
    ValueError: a leaf is not floating point, or an axis of the plan is not bound.
  """
  sizes, shapes = axis_sizes(plan), layer_shapes(params, stacked)

  def part(x, like):
    flat = flatten(x, like.shape, plan.padded_size(like.size, sizes))
    return own_part(flat.astype(dtype), plan.weights)

  return make_shards(jax.tree.map(part, params, shapes), shapes, plan, key)


def gather_params(shards: Any, plan: PartitionPlan) -> Any:
  """The weights behind `shards`, all of them on every device, bit for bit the same.

  Wire: a gather over each level of `plan.weights`, the slowest link first, c (g - 1) elements a
  level in the weights' dtype or `plan.weight_bits`. The derivative with respect to `Shard.slot` is
  `reduce_scatter_grads` of the cotangent; those of `weight` are not defined.

  Args:
    shards: tree of `Shard`; stacked ones are gathered layer by layer, e.g. by `jax.lax.scan`, and
      must be single layers here.
    plan: the plan of `shards`.

  Returns:
    Tree of arrays of the shapes `Shard.shape`.

  Raises:
    ValueError: a shard still has its axis of layers, or the call is not inside `jax.shard_map`.
  """

  def gather(shard: Shard) -> jax.Array:
    if shard.weight.ndim != 1:
      raise ValueError(
        "`shards` must be single layers: scan over stacked ones, got a weight of shape"
        f" {shard.weight.shape}."
      )
    part = shard.weight
    if plan.secondary is not None:  # named out here: a policy does not look into a custom_vjp
      levels = levels_after(plan.weights, plan.secondary)
      bits = plan.bits_of_weights(math.prod(shard.shape))
      part = checkpoint_name(gather_levels(part, levels, bits, plan.block_size), _SECONDARY)
    return _gathered(plan, shard.shape, part, shard.slot, shard.key)

  axis_sizes(plan)  # raises outside of shard_map
  return jax.tree.map(gather, shards, is_leaf=is_shard)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(plan, shape, part, slot, key):
  """The whole weight, as if `slot`, which is zero, were added to this device's part."""
  del slot, key
  bits = plan.bits_of_weights(math.prod(shape))
  levels = plan.weights if plan.secondary is None else plan.secondary
  return vary_all(unflatten(gather_levels(part, levels, bits, plan.block_size), shape))


def _gathered_forward(plan, shape, part, slot, key):
  return _gathered(plan, shape, part, slot, key), key


def _gathered_backward(plan, shape, key, ct):
  return None, _scatter_one(plan, shape, ct, key), None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _scatter_one(plan, shape, grad, key) -> jax.Array:
  padded = plan.padded_size(math.prod(shape), axis_sizes(plan))
  return scatter_levels(flatten(grad, shape, padded), plan.gradients, plan, math.prod(shape), key)


def reduce_scatter_grads(grads: Any, plan: PartitionPlan, key: jax.Array | None = None) -> Any:
  """This device's part of the mean of `grads` over the axes of `plan.gradients`.

  Wire: over each level, the fastest link first, (g - 1) / g of what the level before left, in the
  gradients' dtype (sums in float32), or with `plan.grad_bits`.

  Args:
    grads: tree of floating-point arrays of whole layers, one gradient per device.
    plan: the plan.
    key: for stochastic rounding, where `plan.grad_bits` is given.

  Returns:
    Tree of flat, padded arrays: the mean, not the sum, whatever the shape of the leaf.

  Raises:
    ValueError: a leaf is not floating point, the key is missing, or an axis is not bound.
  """

  def scatter(path, grad, like):
    return _scatter_one(plan, like.shape, vary_all(grad), leaf_keys(key, path, ()))

  return jax.tree_util.tree_map_with_path(scatter, grads, layer_shapes(grads, False))


def partitioned(
  fn: Callable[..., Any],
  plan: PartitionPlan,
  *,
  policy: Callable[..., bool] | None = None,
) -> Callable[..., Any]:
  """`fn(weights, *args)` as a function of shards: the weights exist only while `fn` runs.

  The backward pass gathers them again, from the secondary copy if the plan has one, and computes
  `fn` again from `args`, except what `policy` keeps; so wrap a layer, not a model. Without
  `plan.weights` nothing is gathered, and nothing computed again.

  Args:
    fn: of a tree of weights and further arguments; closes over no traced value that is
      differentiated.
    plan: the plan.
    policy: of `jax.checkpoint`, saying what is kept by name or operation, such as
      `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`; default nothing. A policy that
      keeps everything but some names would keep the gathered weights.

  Example: see `make_zero_step`.
  """

  def on_shards(shards, *args):
    return fn(gather_params(shards, plan), *args)

  def call(shards, *args):
    return run(shards, *vary_all(args))

  if not plan.weights:
    run = on_shards
    return call
  policies = jax.checkpoint_policies
  kept = policies.save_only_these_names(*([_SECONDARY] if plan.secondary else []))
  run = jax.checkpoint(
    on_shards, policy=kept if policy is None else policies.save_from_both_policies(kept, policy)
  )
  return call
