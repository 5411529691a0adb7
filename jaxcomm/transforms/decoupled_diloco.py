"""Decoupled DiLoCo: learners that never wait, and merges of whoever has reported."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_floating, check_transform
from jaxcomm.transforms._clock import QuorumSchedule
from jaxcomm.transforms._fragments import (
  FragmentsState,
  Pattern,
  count_fragments,
  init_state,
  make_fragments,
  outer_step,
)
from jaxcomm.transforms.pmean_over import pmean_over


def decoupled_diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  *,
  schedule: QuorumSchedule,
  fragments: Any = None,
  pattern: Pattern = "strided",
  stacked: Any = None,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""Learners of different speeds, on a simulated clock: one update is one tick.

  In a tick the learners that `schedule` names end an inner step; the others' gradients are dropped,
  as they would not exist. After it the schedule may merge a fragment p of those learners that have
  reported, M, with weights w that sum to 1, and all learners take it over:

  .. math::
    \Theta_p \leftarrow \Theta_p + \mathrm{outer}_p\Big(\sum_{i \in M} w_i\,
    (\Theta_p - \theta_{i,p})\Big), \quad \theta_{i,p} \leftarrow \Theta_p

  What learners outside M hold has no influence, also if it is NaN. With equal speeds, a quorum of
  all and no grace window this is `streaming_diloco` with no delay and `alpha=0`.

  This is for studying quorum, grace window and failures in one lockstep program; it does not make
  real machines independent of each other. After the last tick of the schedule nothing moves.

  Wire: in the ticks that merge, what the mean of `outer` sends for one fragment (a learner outside
  M sends zeros); nothing in all other ticks.

  Per replica: parameters, `inner_state` and error-feedback residuals. Equal: outer parameters and
  outer states. A restore needs the same schedule, the same number of replicas and fragments.

  Args:
    inner: optimizer of each learner, e.g. `optax.adamw(3e-4)`.
    outer: a mean over `axis_name`, then an optimizer, as for `diloco`; the mean is of
      :math:`N w_i (\Theta_p - \theta_{i,p})`. Default
      `optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))`.
    schedule: from `simulate_quorum`, for as many learners as there are replicas.
    fragments: a tree of labels, with as many fragments as the schedule has; default made by
      `fragment_labels`.
    pattern: of the layers, as in `fragment_labels`.
    stacked: leaves whose leading dimension counts layers, as in `fragment_labels`.
    axis_name: axis of the replicas.

  Returns:
    A transform with `FragmentsState`, whose `count` is of ticks.

  Raises:
    ValueError: `fragments` or the axis do not fit the schedule, or as `streaming_diloco`.

  References:
    Douillard et al., Decoupled DiLoCo for Resilient Distributed Pre-training,
    https://arxiv.org/abs/2604.21428. Merging by norm and direction, and the overlap of the
    exchange, are left out.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import pmean_over
    >>> from jaxcomm.transforms import decoupled_diloco, simulate_quorum
    >>> clock = simulate_quorum([1, 1, 4], num_ticks=2, sync_period=2, quorum=2)
    >>> outer = optax.chain(pmean_over("replica"), optax.sgd(1.0))
    >>> tx = decoupled_diloco(optax.sgd(1.0), outer, schedule=clock)
    >>> def two_ticks(grad):
    ...   p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ...   for _ in range(2):
    ...     updates, state = tx.update(grad, state, p)
    ...     p = optax.apply_updates(p, updates)
    ...   return p
    >>> jax.vmap(two_ticks, axis_name="replica")(jnp.array([1.0, 3.0, 9.0])).tolist()
    [-4.0, -4.0, -4.0]
  """
  if outer is None:
    outer = optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))
  check_transform("inner", inner)
  check_transform("outer", outer)
  num_fragments = schedule.num_fragments
  fragments = num_fragments if fragments is None else fragments
  if count_fragments(fragments) != num_fragments:
    raise ValueError(
      f"`fragments` must be as many as in `schedule`, {num_fragments}, got"
      f" {count_fragments(fragments)}."
    )
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    parts = make_fragments(params, fragments, pattern, stacked)
    return init_state(inner, outer, params, parts, num_fragments)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: the pseudo-gradient needs them.")
    works, sent, weight = _look_up(schedule, state.count, axis_name)
    parts = make_fragments(params, fragments, pattern, stacked)
    steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    updates = jax.tree.map(lambda u: jnp.where(works, u, jnp.zeros_like(u)), steps)
    inner_state = jax.tree.map(
      lambda new, old: jnp.where(works, new, old), inner_state, state.inner_state
    )

    def merge(p):
      def branch(updates, *args):
        local = optax.apply_updates(parts.take(params, p), parts.take(updates, p))
        anchor, outer_states = outer_step(
          outer, parts, p, local, *args, axis_name=axis_name, weight=weight, extra_args=extra_args
        )
        taken = (parts.take(tree, p) for tree in (anchor, params, updates))
        back = jax.tree.map(lambda a, p, u: (a - p).astype(u.dtype), *taken)
        return parts.put(updates, p, back), anchor, outer_states

      return branch

    merges = [lambda *args: args, *map(merge, range(num_fragments))]
    args = (updates, state.anchor, state.outer_states)
    updates, anchor, outer_states = _axes.switch(sent, merges, *args)
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, FragmentsState(count, sent, anchor, inner_state, outer_states)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _look_up(schedule: QuorumSchedule, tick: jax.Array, axis_name: str):
  """Of this learner in a tick: whether it works, what is merged, N times its weight in it."""
  num_ticks, num_learners = schedule.works.shape
  if (size := _axes.axis_size(axis_name)) != num_learners:
    raise ValueError(
      f"`schedule` must be of as many learners as axis `{axis_name}` has, {size}, got"
      f" {num_learners}."
    )
  learner, row = jax.lax.axis_index(axis_name), jnp.minimum(tick, num_ticks - 1)
  inside = tick < num_ticks
  works = inside & jnp.asarray(schedule.works)[row][learner]
  sent = jnp.where(inside, jnp.asarray(schedule.fragment)[row], 0)
  return works, sent, num_learners * jnp.asarray(schedule.weights)[row][learner]
