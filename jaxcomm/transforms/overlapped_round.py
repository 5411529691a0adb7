"""A round as one program, whose exchange may start before the inner steps and end after them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_count, check_floating, check_transform
from jaxcomm.transforms._local_updates import LocalUpdatesState, check_equal
from jaxcomm.transforms.delayed import DelayedState

ValueAndGrad = Callable[[Any, Any], tuple[Any, Any]]
RoundFn = Callable[[Any, LocalUpdatesState, Any], tuple[Any, LocalUpdatesState, Any]]


def overlapped_round(
  value_and_grad: ValueAndGrad,
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  *,
  sync_period: int,
  axis_name: str = "replica",
) -> RoundFn:
  """One round of `diloco(inner, delayed(outer))` as a function to be compiled as a whole.

  The exchange of the round before, and the outer step on it, come first: their operands are in the
  state. The `sync_period` inner steps are a `jax.lax.scan` that neither needs their result nor
  feeds them. So the compiler may start the collective, run the loop, and wait for the collective
  afterwards; whether it does depends on the back end (XLA:CPU does not) and its options. The
  numbers are those of the simulated delay, and the state is the same: a run may change from one to
  the other at any end of a round.

  Wire: what `outer` sends, once.

  Args:
    value_and_grad: `(params, batch) -> (value, grads)`, as from `jax.value_and_grad`.
    inner: optimizer of each replica.
    outer: a mean over `axis_name`, then an optimizer, not delayed: `co2_outer(...)`, or what
      `diloco` takes.
    sync_period: inner steps per round.
    axis_name: axis of the replicas, bound by `jax.shard_map` or `jax.vmap(axis_name=...)` where
      the returned function is called.

  Returns:
    `round_fn(params, state, batches) -> (params, state, values)`: `state` is that of
    `co2(inner, ...)` or `diloco(inner, delayed(outer), ...)` at the beginning of a round, every
    array of `batches` has a leading axis of size `sync_period`, and so have those of `values`.

  Raises:
    ValueError: `sync_period` is not an integer of at least 1, `inner` or `outer` is not a
      transform; in `round_fn` an unbound axis, a state without a delay, batches of another number
      of steps, or an `outer` without a mean.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import co2
    >>> from jaxcomm.transforms import co2_outer, overlapped_round
    >>> loss = lambda p, target: 0.5 * (p - target) ** 2
    >>> inner, options = optax.sgd(0.5), {"sync_period": 2, "outer_momentum": 0.0}
    >>> round_fn = overlapped_round(
    ...   jax.value_and_grad(loss), inner, co2_outer(**options), sync_period=2
    ... )
    >>> def two_rounds(target):
    ...   p, batches = jnp.zeros(()), jnp.broadcast_to(target, (2,))
    ...   state = co2(inner, **options).init(p)
    ...   p, state, _ = round_fn(p, state, batches)
    ...   return round_fn(p, state, batches)[0]
    >>> jax.vmap(two_rounds, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [1.5, 1.5]
  """
  check_count("sync_period", sync_period, at_least=1)
  check_transform("inner", inner)
  check_transform("outer", outer)

  def round_fn(params, state, batches):
    _axes.axis_size(axis_name)
    check_floating("params", params)
    check_round(state, batches, sync_period)
    late = state.outer_state
    step, outer_state = outer.update(late.inflight, late.outer_state, state.anchor)
    check_equal(step, axis_name)
    local, inner_state, values = inner_steps(
      value_and_grad, inner, _axes.vary(params, axis_name), state.inner_state, batches
    )
    params, state = end_of_round(state, local, inner_state, step, outer_state, sync_period)
    return _axes.vary(params, axis_name), state, values

  return round_fn


def inner_steps(value_and_grad, inner, params, inner_state, batches):
  """A step of `inner` per leading index of `batches`: `(params, inner_state, values)`."""

  def one(carry, batch):
    params, inner_state = carry
    value, grads = value_and_grad(params, batch)
    updates, inner_state = inner.update(grads, inner_state, params)
    return (optax.apply_updates(params, updates), inner_state), value

  (params, inner_state), values = jax.lax.scan(one, (params, inner_state), batches)
  return params, inner_state, values


def end_of_round(state, local, inner_state, step, outer_state, sync_period):
  """`(params, state)` at the next anchor, with what the replica moved in flight."""
  moved = jax.tree.map(lambda a, p: a - p.astype(jnp.float32), state.anchor, local)
  anchor = jax.tree.map(jnp.add, state.anchor, step)
  params = jax.tree.map(lambda a, p: a.astype(p.dtype), anchor, local)
  count = state.count + sync_period
  late = DelayedState(moved, outer_state)
  return params, LocalUpdatesState(count, jnp.ones((), jnp.bool_), anchor, inner_state, late)


def check_round(state: Any, batches: Any, sync_period: int) -> None:
  """Raises ValueError unless a round of so many steps can be made of these."""
  if not isinstance(getattr(state, "outer_state", None), DelayedState):
    raise ValueError(
      "`state` must be that of co2(inner, ...) or diloco(inner, delayed(outer), ...), got"
      f" {type(state).__name__}."
    )
  lengths = sorted({jnp.shape(x)[:1] for x in jax.tree.leaves(batches)})
  if lengths != [(sync_period,)]:
    raise ValueError(
      f"`batches` must be arrays with a leading axis of `sync_period`={sync_period} steps, got"
      f" leading axes {lengths}."
    )
