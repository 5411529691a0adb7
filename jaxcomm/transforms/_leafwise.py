"""What transforms share that exchange leaf by leaf, each device its own shard."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import jax

from jaxcomm import _axes, _shards
from jaxcomm.transforms._checks import check_floating


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the updates: its path in the tree, and its `PartitionSpec` over the inner axes."""

  path: Any
  spec: jax.sharding.PartitionSpec

  @property
  def name(self) -> str:
    return jax.tree_util.keystr(self.path)

  def key(self, seed: int, count: jax.Array) -> jax.Array:
    """A rounding key for this leaf, this shard of it and the `count`-th mean."""
    key = jax.random.fold_in(jax.random.key(seed), count)
    key = jax.random.fold_in(key, zlib.crc32(self.name.encode()))
    return _shards.fold_in_shard(key, self.spec)


def map_leaves(
  fun: Callable,
  scalars: Any,
  updates: Any,
  *states: Any,
  axis_name: str,
  specs: Any = None,
) -> tuple[Any, ...]:
  """`fun(leaf, scalars, update, *state) -> (update, *state)` for every leaf, on local shards.

  Args:
    fun: gets a `Leaf`, the scalars, and this device's shard of the leaf and of its state.
    scalars: a tree of arrays that are equal on all shards, e.g. a step counter.
    updates: the tree to map; floating point.
    states: trees like `updates`, with arrays sharded like the leaf (of its shape, or not), or
      trees without arrays at its places (None, `optax.MaskedNode()`).
    axis_name: the bound axis that `fun` exchanges over.
    specs: as in `compressed_mean`.

  Returns:
    Trees like `updates` and `states`.

  Raises:
    ValueError: as `compressed_mean` in update.
  """
  _axes.axis_size(axis_name)
  check_floating("updates", updates)
  paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
  values = [value for _, value in paths_and_leaves]
  lists = [values, *(treedef.flatten_up_to(state) for state in states)]
  if not _axes.is_manual(axis_name):
    _shards.check_unsharded(specs)
  leaf_specs = _shards.leaf_specs(values, treedef, specs)
  leaves = [Leaf(path, spec) for (path, _), spec in zip(paths_and_leaves, leaf_specs)]

  def local(scalars, *lists):
    rows = [fun(leaf, scalars, *row) for leaf, *row in zip(leaves, *lists)]
    return tuple([list(column) for column in zip(*rows)] or [[] for _ in lists])

  out = _shards.on_shards(local, leaf_specs)(scalars, *lists)
  return tuple(treedef.unflatten(column) for column in out)
