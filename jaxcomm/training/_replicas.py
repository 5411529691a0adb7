"""Changing the number of replicas: named operations, never a side effect of a restore."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.training._layout import Layout, TrainState


def average_replicas(state: TrainState, layout: Layout) -> TrainState:
  """Every replica of `layout` starts from the mean of the saved ones.

  Parameters, inner optimizer state and residuals are averaged in float32; integers (counters) are
  equal on all replicas and taken from the first. Nothing that a replica learnt is dropped, but
  the mean of optimizer states is not a state any replica had.

  Args:
    state: leaves that differ have a leading axis of the *saved* number of replicas.
    layout: of the run that goes on; its number of replicas and shardings are the result's.

  Example: see `Checkpoints.restore`.
  """

  def mean(x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x[0]
    return x.astype(jnp.float32).mean(0).astype(x.dtype)

  return _restack(state, layout, mean)


def broadcast_replica(state: TrainState, layout: Layout, *, index: int = 0) -> TrainState:
  """Every replica of `layout` starts from saved replica `index`; the others are dropped.

  Args:
    state: leaves that differ have a leading axis of the *saved* number of replicas.
    layout: of the run that goes on; its number of replicas and shardings are the result's.
    index: which replica to keep.

  Raises:
    ValueError: `index` is not one of the saved replicas.
  """
  stacked = [x for x, v in zip(jax.tree.leaves(state), jax.tree.leaves(layout.varying)) if v]
  saved = stacked[0].shape[0] if stacked else 1
  if not 0 <= index < saved:
    raise ValueError(f"`index` must be in [0, {saved}), the saved replicas, got {index}.")
  return _restack(state, layout, lambda x: x[index])


def _restack(state: TrainState, layout: Layout, merge: Callable[[Any], Any]) -> TrainState:
  def change(state):
    one = jax.tree.map(lambda x, varies: merge(x) if varies else x, state, layout.varying)
    return layout.stack(one)

  return jax.jit(change, out_shardings=layout.shardings)(state)
