"""A whole step of MASHA or extragradient: both operator values, the exchange, and the refresh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms.extragradient import ExtragradientTransformation

Operator = Callable[..., Any]


def masha_step(
  operator: Operator, tx: ExtragradientTransformation, *, minibatch: bool = False
) -> Callable[..., Any]:
  """`step(params, state, batch) -> (params, state, metrics)`, for jit.

  The refresh, with its operator value and its dense mean, is inside a `jax.lax.cond`.

  Args:
    operator: `(params, batch) -> F_m(params)`, a tree like the parameters, from this worker's data.
    tx: `masha1`, `masha2` or `extragradient`.
    minibatch: whether `batch` differs from step to step. Then both operators of a difference are
      taken on it (three values in a step without refresh become four), and `step` takes
      `refresh_batch`, a large one, for refreshes.

  Returns:
    `step(params, state, batch, *, refresh_batch=None, do_refresh=None)`. `do_refresh` is for
    `refresh="host"`: a Python bool compiles one of two programs without a cond. `metrics` has
    `refreshed` (bool[], equal) and `operator_change` (float32[], this worker's
    ||F_m(half) - F_m(w)||).

  Raises:
    ValueError: `minibatch` without `refresh_batch`, or the reverse; and what `tx` raises.

  Example: see `masha1`.
  """

  def step(params, state, batch, *, refresh_batch=None, do_refresh=None):
    if minibatch != (refresh_batch is not None):
      raise ValueError(
        f"`refresh_batch` must be given exactly with `minibatch`, got {minibatch=} and"
        f" {'none' if refresh_batch is None else 'one'}."
      )
    half, state = tx.extrapolate(params, state)
    value = operator(half, batch)
    there = operator(_like(half, state.reference), batch) if minibatch else None
    old = getattr(state, "local_operator", state.mean_operator) if there is None else there
    options = {} if do_refresh is None else {"do_refresh": do_refresh}
    params, state, refreshed = tx.update(value, params, state, reference_value=there, **options)

    def refresh(state):
      fresh = operator(_like(half, state.reference), refresh_batch if minibatch else batch)
      return tx.refresh(fresh, state)

    if isinstance(do_refresh, bool):
      state = refresh(state) if do_refresh else state
    else:
      state = _axes.cond(refreshed, refresh, lambda state: state, state)
    change = optax.tree.norm(jax.tree.map(jnp.subtract, value, old))
    return params, state, {"refreshed": refreshed, "operator_change": change.astype(jnp.float32)}

  return step


def _like(half: Any, point: Any) -> Any:
  """`point`, typed as differing per worker like `half`: a gradient there is this worker's own."""
  for axis in sorted({a for x in jax.tree.leaves(half) for a in _axes.varying_axes(x)}):
    point = _axes.vary(point, axis)
  return point
