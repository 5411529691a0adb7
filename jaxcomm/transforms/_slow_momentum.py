"""The outer step of SlowMo, with the two stabilisers that CO2 adds to it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm.transforms._checks import check_decay, check_period

Gap = Callable[[optax.Updates, optax.Updates], Any]  # (last outer step, mean) -> Λ
Rate = float | jax.Array | Callable[[jax.Array], Any]


class SlowMomentumState(NamedTuple):
  """State of the outer step of `slowmo` and `co2`; equal on all replicas, float32.

  Attributes:
    rounds: int32[], outer steps taken.
    inner_lr: float32[], the inner learning rate γ that the last step divided by, else 1.
    rate: float32[], the last outer step was `-rate * momentum`.
    gap: float32[], the staleness gap Λ of the last step, 1 without a penalty (the largest entry of
      an elementwise gap).
    momentum: like the parameters, m; with `outer_shards` each replica's part of it.
  """

  rounds: jax.Array
  inner_lr: jax.Array
  rate: jax.Array
  gap: jax.Array
  momentum: optax.Updates


def slow_momentum(
  *,
  sync_period: int | jax.Array,
  outer_lr: Any,
  outer_momentum: Any,
  inner_lr: Rate | None = None,
  gap: Gap | None = None,
  clip_threshold: Any = None,
) -> optax.GradientTransformation:
  """m = clip(β m + mean / (γ Λ)), step = -α γ m."""
  check_period(sync_period)
  check_positive("outer_lr", outer_lr)
  check_decay("outer_momentum", outer_momentum)
  if clip_threshold is not None:
    check_positive("clip_threshold", clip_threshold)
  _check_inner_lr(inner_lr, sync_period)

  def init_fn(params):
    return SlowMomentumState(
      rounds=jnp.zeros((), jnp.int32),
      inner_lr=jnp.ones((), jnp.float32),
      rate=jnp.zeros((), jnp.float32),
      gap=jnp.ones((), jnp.float32),
      momentum=optax.tree.zeros_like(params, dtype=jnp.float32),
    )

  def update_fn(updates, state, params=None):
    del params
    penalty = 1.0
    if gap is not None:
      penalty = gap(jax.tree.map(lambda m: -state.rate * m, state.momentum), updates)
    lr = _inner_lr_of_round(inner_lr, state, sync_period)

    def accumulate(m, g, penalty):
      m = outer_momentum * m + g * (1 / (lr * penalty))
      return m if clip_threshold is None else jnp.clip(m, -clip_threshold, clip_threshold)

    momentum = jax.tree.map(accumulate, state.momentum, updates, _for_each(updates, penalty))
    rate = jnp.asarray(outer_lr * lr, jnp.float32)
    step = jax.tree.map(lambda m: -rate * m, momentum)
    rounds = jnp.asarray(optax.safe_increment(state.rounds))
    return step, SlowMomentumState(rounds, lr, rate, _largest(penalty), momentum)

  return optax.GradientTransformation(init_fn, update_fn)


def check_positive(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is a number above 0, or traced."""
  if isinstance(value, Tracer):
    return
  try:
    good = value > 0
  except TypeError:
    good = False
  if isinstance(value, bool) or not good:
    raise ValueError(f"`{name}` must be a number > 0, got {value!r}.")


def _check_inner_lr(inner_lr: Rate | None, sync_period: Any) -> None:
  """A schedule is looked at where the first round ends: later steps may lie past its end."""
  if inner_lr is None:
    return
  if not callable(inner_lr):
    check_positive("inner_lr", inner_lr)
  elif not isinstance(sync_period, Tracer):
    step = sync_period - 1
    with jax.ensure_compile_time_eval():
      first = float(inner_lr(jnp.asarray(step)))
    if not (first > 0 and math.isfinite(first)):
      raise ValueError(
        f"`inner_lr` must be > 0 at the last step of a round, which is divided by it; got {first}"
        f" at step {step}."
      )


def _inner_lr_of_round(inner_lr: Rate | None, state: SlowMomentumState, sync_period: Any):
  if inner_lr is None:
    return jnp.ones((), jnp.float32)
  if not callable(inner_lr):
    return jnp.asarray(inner_lr, jnp.float32)
  lr = jnp.asarray(inner_lr((state.rounds + 1) * sync_period - 1), jnp.float32)
  return jnp.where(lr > 0, lr, state.inner_lr)  # a schedule that has ended at 0


def _for_each(tree: Any, value: Any) -> Any:
  """`value` if it is a tree like `tree`, else a tree like `tree` that holds it everywhere."""
  if jax.tree.structure(value) == jax.tree.structure(tree):
    return value
  return jax.tree.map(lambda _: value, tree)


def _largest(penalty: Any) -> jax.Array:
  leaves = [jnp.max(jnp.asarray(x, jnp.float32)) for x in jax.tree.leaves(penalty)]
  return functools.reduce(jnp.maximum, leaves)
