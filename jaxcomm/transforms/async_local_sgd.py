"""Asynchronous Local SGD on a simulated clock: workers send when they are done, nobody waits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_floating, check_transform
from jaxcomm.transforms._clock import ArrivalSchedule
from jaxcomm.transforms._local_updates import check_equal
from jaxcomm.transforms.async_outer import delayed_nesterov
from jaxcomm.transforms.pmean_over import pmean_over


class AsyncLocalSgdState(NamedTuple):
  """State of `async_local_sgd`.

  Attributes:
    count: int32[], equal on all devices; ticks so far.
    synced: bool[], equal on all devices; whether a pseudo-gradient arrived in the last one.
    anchor: like the parameters, float32, equal: the server's outer parameters.
    fetched: likewise, differs per replica: those that this worker started from.
    inner_state: of the inner optimizer, differs per replica.
    mean_state: of the mean that carries a pseudo-gradient to all.
    outer_state: of the server's optimizer, equal.
  """

  count: jax.Array
  synced: jax.Array
  anchor: optax.Params
  fetched: optax.Params
  inner_state: optax.OptState
  mean_state: optax.OptState
  outer_state: optax.OptState


def async_local_sgd(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  *,
  schedule: ArrivalSchedule,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Workers of different speeds, whose pseudo-gradients reach a server one by one.

  One update is one tick of the clock. A worker that `schedule` lets work ends an inner step; of one
  that waits the gradient is dropped, as it would not exist. Where worker i arrives, s arrivals
  after it fetched :math:`\Theta^{(i)}`,

  .. math::
    \Theta \leftarrow \Theta + \mathrm{outer}(\Theta^{(i)} - \theta_i; s), \quad
    \theta_i \leftarrow \Theta^{(i)} \leftarrow \Theta

  and the other workers go on from where they are.

  This is for studying staleness in one lockstep program, in which every device plays the server; it
  does not make real machines independent of each other. After the last tick nothing moves.

  Wire: in the ticks with an arrival, what `mean` sends for one tree of parameters (of the workers
  that do not arrive, zeros); nothing in all other ticks. A real server is sent one copy of the
  parameters, and sends one back.

  Per replica: parameters, `fetched`, `inner_state`, error-feedback residuals. Equal: the rest. A
  restore needs the same schedule and number of replicas.

  Args:
    inner: optimizer of each worker, e.g. `optax.adamw(3e-4)`.
    outer: of the server, e.g. `async_outer(...)`, without a mean; its update gets `age`, int32[].
      Default `delayed_nesterov(0.7, 0.9, num_workers=N)`.
    schedule: from `simulate_async`, for as many workers as there are replicas.
    axis_name: axis of the replicas.
    mean: carries a pseudo-gradient to all, e.g. `compressed_mean("replica", int4())`; default
      `pmean_over`.

  Raises:
    ValueError: `inner`, `outer` or `mean` is not a transform, parameters are not floating point;
      in update missing parameters, or an axis of another size than the schedule.

  References:
    Liu et al., Asynchronous Local-SGD Training for Language Modeling,
    https://arxiv.org/abs/2401.09135. The ticks, and one arrival per tick, are ours.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import async_local_sgd, simulate_async
    >>> clock = simulate_async([1, 2], num_ticks=4, sync_period=2)
    >>> clock.arrival.tolist(), clock.age.tolist()
    ([0, 1, 0, 1], [0, 0, 0, 0])
    >>> tx = async_local_sgd(optax.sgd(1.0), optax.sgd(1.0), schedule=clock)
    >>> def four_ticks(grad):
    ...   p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ...   for _ in range(4):
    ...     updates, state = tx.update(grad, state, p)
    ...     p = optax.apply_updates(p, updates)
    ...   return p
    >>> jax.vmap(four_ticks, axis_name="replica")(jnp.array([1.0, 5.0])).tolist()
    [-4.0, -10.0]
  """
  num_workers = schedule.works.shape[1]
  outer = delayed_nesterov(0.7, 0.9, num_workers=num_workers) if outer is None else outer
  mean = pmean_over(axis_name) if mean is None else mean
  for name, transform in (("inner", inner), ("outer", outer), ("mean", mean)):
    check_transform(name, transform)
  inner, outer, mean = map(optax.with_extra_args_support, (inner, outer, mean))

  def init_fn(params):
    check_floating("params", params)
    anchor = optax.tree.cast(params, jnp.float32)
    return AsyncLocalSgdState(
      count=jnp.zeros((), jnp.int32),
      synced=jnp.zeros((), jnp.bool_),
      anchor=jax.tree.map(jnp.copy, anchor),
      fetched=jax.tree.map(jnp.copy, anchor),
      inner_state=inner.init(params),
      mean_state=mean.init(anchor),
      outer_state=outer.init(anchor),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: the pseudo-gradient needs them.")
    works, arrival, age = _look_up(schedule, state.count, axis_name)
    steps, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    updates = _where(works, steps, jax.tree.map(jnp.zeros_like, steps))
    inner_state = _where(works, inner_state, state.inner_state)

    def arrive(updates, anchor, fetched, mean_state, outer_state):
      mine = jax.lax.axis_index(axis_name) == arrival - 1
      local = optax.apply_updates(params, updates)
      moved = jax.tree.map(lambda f, p: f - p.astype(jnp.float32), fetched, local)
      sent = jax.tree.map(lambda x: jnp.where(mine, num_workers * x, 0), moved)
      received, mean_state = mean.update(sent, mean_state, anchor)
      step, outer_state = outer.update(received, outer_state, anchor, age=age)
      check_equal(step, axis_name)
      anchor = jax.tree.map(jnp.add, anchor, step)
      back = jax.tree.map(lambda a, p, u: (a - p).astype(u.dtype), anchor, params, updates)
      return (
        _where(mine, back, updates), anchor, _where(mine, anchor, fetched), mean_state, outer_state
      )  # fmt: skip

    synced = arrival > 0
    updates, anchor, fetched, mean_state, outer_state = _axes.cond(
      synced, arrive, lambda *args: args,
      updates, state.anchor, state.fetched, state.mean_state, state.outer_state,
    )  # fmt: skip
    count = jnp.asarray(optax.safe_increment(state.count))
    return updates, AsyncLocalSgdState(
      count, synced, anchor, fetched, inner_state, mean_state, outer_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _where(condition: jax.Array, tree: Any, other: Any) -> Any:
  return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def _look_up(schedule: ArrivalSchedule, tick: jax.Array, axis_name: str):
  """Whether this worker works in a tick, who arrives (from 1; 0: nobody), and how late."""
  num_ticks, num_workers = schedule.works.shape
  if (size := _axes.axis_size(axis_name)) != num_workers:
    raise ValueError(
      f"`schedule` must be of as many workers as axis `{axis_name}` has, {size}, got {num_workers}."
    )
  worker, row = jax.lax.axis_index(axis_name), jnp.minimum(tick, num_ticks - 1)
  inside = tick < num_ticks
  works = inside & jnp.asarray(schedule.works)[row][worker]
  arrival = jnp.where(inside, jnp.asarray(schedule.arrival)[row], 0)
  return works, arrival, jnp.asarray(schedule.age)[row]
