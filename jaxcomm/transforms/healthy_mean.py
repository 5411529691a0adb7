"""Any mean, over the replicas that are healthy: the others are left out and counted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_floating, check_transform
from jaxcomm.transforms._states import find_states


class HealthyMeanState(NamedTuple):
  """State of `healthy_mean`, equal on all replicas but for what `mean` carries.

  Attributes:
    alive: bool[N], which replicas may take part; None without a mask. The host may replace it
      between steps, `optax.tree.set(opt_state, alive=mask)`, and nothing is recompiled.
    left_out: int32[], replicas left out of the last mean.
    total_left_out: int32[], the sum of these counts since the start.
    mean_state: of the mean.
  """

  alive: Any
  left_out: jax.Array
  total_left_out: jax.Array
  mean_state: optax.OptState


def healthy_mean(
  mean: optax.GradientTransformation,
  axis_name: str,
  *,
  skip_nonfinite: bool = True,
  alive: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""`mean` over the healthy replicas of `axis_name`, its weights renormalised.

  .. math:: u = \frac{1}{\sum_i w_i} \sum_i w_i g_i, \quad w_i \in \{0, 1\}

  A replica has :math:`w_i = 0` if any entry of its updates is NaN or infinite, or if the mask says
  that it is not alive. It sends zeros, and what `mean` returns is scaled by :math:`N / \sum_i w_i`;
  so any mean will do, compressed ones too. All replicas receive the result, the ones left out as
  well. If none is healthy the result is zero. With all of them healthy the result has the bits
  of `mean`.

  After a round that ended in NaN a replica goes on from the outer parameters if they reach it by
  `jaxcomm.apply_updates` (`optax.apply_updates` adds to the NaN). Its inner optimizer state is its
  own: put `optax.apply_if_finite` inside `inner`, or it stays at NaN and is left out for good. So
  does a replica of `streaming_diloco`, which adds to its parameters and never sets them.

  Wire: 4 bytes more than `mean` (an all-reduce of the number of healthy replicas).

  Args:
    mean: a mean over `axis_name`, e.g. `pmean_over` or `compressed_mean`.
    axis_name: axis of the replicas.
    skip_nonfinite: leave out replicas with a NaN or infinity.
    alive: bool[N], the first mask, if there is to be one.

  Returns:
    A transform with `HealthyMeanState`. Its update takes `alive`, bool[N], as an extra argument as
    well, in place of the mask of the state.

  Raises:
    ValueError: `mean` is not a transform, `alive` is not a vector of bool with a True, or nothing
      could be left out; in update an unbound axis, a mask of another size than the axis, or
      updates that are not floating point.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm import pmean_over
    >>> from jaxcomm.transforms import healthy_mean
    >>> tx = healthy_mean(pmean_over("replica"), "replica")
    >>> grads = jnp.array([1.0, jnp.nan, 5.0])  # three replicas
    >>> mean, state = jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="replica")(grads)
    >>> mean.tolist(), state.left_out.tolist()
    ([3.0, 3.0, 3.0], [1, 1, 1])
  """
  check_transform("mean", mean)
  if not skip_nonfinite and alive is None:
    raise ValueError("`skip_nonfinite` must be True where `alive` is None, got False.")
  _check_mask(alive)

  def init_fn(params):
    return HealthyMeanState(
      alive=None if alive is None else jnp.array(alive),
      left_out=jnp.zeros((), jnp.int32),
      total_left_out=jnp.zeros((), jnp.int32),
      mean_state=mean.init(params),
    )

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    del extra_args
    mask = state.alive if alive is None else jnp.asarray(alive)
    size = _axes.axis_size(axis_name)
    check_floating("updates", updates)
    healthy = all_finite(updates) if skip_nonfinite else jnp.ones((), jnp.bool_)
    if mask is not None:
      _check_size(mask, size, axis_name)
      healthy &= mask[jax.lax.axis_index(axis_name)]
    healthy = _axes.vary(healthy, axis_name)
    count = jax.lax.psum(healthy.astype(jnp.float32), axis_name)
    sent = jax.tree.map(lambda g: jnp.where(healthy, g, 0), updates)
    means, mean_state = mean.update(sent, state.mean_state, params)
    scale = size / jnp.maximum(count, 1)
    means = jax.tree.map(lambda m: (m * scale).astype(m.dtype), means)
    left_out = size - count.astype(jnp.int32)
    total = state.total_left_out + left_out
    return means, HealthyMeanState(state.alive, left_out, total, mean_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def left_out(opt_state: Any) -> dict[str, jax.Array]:
  """`total_left_out`, int32[], of all healthy means in a state together; empty without any."""
  states = find_states(opt_state, HealthyMeanState)
  if not states:
    return {}
  return {"total_left_out": functools.reduce(jnp.add, [x.total_left_out for x in states])}


def all_finite(tree: Any) -> jax.Array:
  """bool[]: whether no entry of any leaf is NaN or infinite."""
  finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return functools.reduce(jnp.logical_and, finite, jnp.ones((), jnp.bool_))


def _check_mask(alive: Any) -> None:
  if alive is None or isinstance(alive, Tracer):
    return
  mask = np.asarray(alive)
  if mask.dtype != np.bool_ or mask.ndim != 1 or not mask.any():
    raise ValueError(f"`alive` must be a vector of bool, one per replica, some True, got {alive}.")


def _check_size(alive: jax.Array, size: int, axis_name: str) -> None:
  if alive.shape != (size,):
    raise ValueError(
      f"`alive` must have one entry per replica of axis `{axis_name}`, {size}, got shape"
      f" {alive.shape}."
    )
