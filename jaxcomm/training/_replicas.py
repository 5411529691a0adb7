"""Changing the number of replicas: named operations, never a side effect of a restore."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.training._layout import Layout, TrainState
from jaxcomm.transforms import HealthyMeanState, ShardedOuterState
from jaxcomm.transforms._states import find_states


def average_replicas(state: TrainState, layout: Layout) -> TrainState:
  """Every replica of `layout` starts from the mean of the saved ones.

  Parameters, inner optimizer state and residuals are averaged in float32; integers (counters) are
  equal on all replicas and taken from the first. Nothing that a replica learnt is dropped, but
  the mean of optimizer states is not a state any replica had. In masks of `healthy_mean` all
  replicas are alive again.

  Args:
    state: leaves that differ have a leading axis of the *saved* number of replicas.
    layout: of the run that goes on; its number of replicas and shardings are the result's.

  Raises:
    ValueError: each replica keeps its own part of an outer state (`sharded_outer`).

  Example: see `Checkpoints.restore`.
  """

  def mean(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x[0]
    return x.astype(jnp.float32).mean(0).astype(x.dtype)

  return _restack(state, layout, mean)


def broadcast_replica(state: TrainState, layout: Layout, *, index: int = 0) -> TrainState:
  """Every replica of `layout` starts from saved replica `index`; the others are dropped.

  In masks of `healthy_mean` all replicas are alive again.

  Args:
    state: leaves that differ have a leading axis of the *saved* number of replicas.
    layout: of the run that goes on; its number of replicas and shardings are the result's.
    index: which replica to keep.

  Raises:
    ValueError: `index` is not one of the saved replicas, or as `average_replicas`.
  """
  stacked = [x for x, v in zip(jax.tree.leaves(state), jax.tree.leaves(layout.varying)) if v]
  saved = stacked[0].shape[0] if stacked else 1
  if not 0 <= index < saved:
    raise ValueError(f"`index` must be in [0, {saved}), the saved replicas, got {index}.")
  return _restack(state, layout, lambda x: x[index])


def map_masks(fun: Callable[[Any], Any], state: Any) -> Any:
  """`state` with `fun` of every mask of replicas in it, which is no array per replica."""

  def healthy(x):
    return isinstance(x, HealthyMeanState)

  def leaf(x):
    return x._replace(alive=fun(x.alive)) if healthy(x) and x.alive is not None else x

  return jax.tree.map(leaf, state, is_leaf=healthy)


def check_parts(state: Any) -> None:
  """Raises ValueError if parts of an outer state are divided among the replicas."""
  if find_states(state, ShardedOuterState):
    raise ValueError(
      "every replica keeps its own part of the outer state (`outer_shards`, sharded_outer): the"
      " number of replicas cannot change. Resume with the saved number."
    )


def _restack(state: TrainState, layout: Layout, merge: Callable[[Any], Any]) -> TrainState:
  check_parts(layout.shapes)

  def change(state):
    state = map_masks(lambda _: jnp.ones(layout.num_replicas, jnp.bool_), state)
    one = jax.tree.map(lambda x, varies: merge(x) if varies else x, state, layout.varying)
    return layout.stack(one)

  return jax.jit(change, out_shardings=layout.shardings)(state)
