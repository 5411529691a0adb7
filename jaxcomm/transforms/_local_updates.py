"""The skeleton shared by all methods that exchange rarely: inner steps, then an outer step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_floating, check_period, check_transform
from jaxcomm.transforms._states import find_states
from jaxcomm.transforms.healthy_mean import HealthyMeanState


class LocalUpdatesState(NamedTuple):
  """State of `local_sgd`, `diloco` and `eager_diloco`.

  Attributes:
    count: int32[], equal on all devices; inner steps taken.
    synced: bool[], equal on all devices; whether the last update ended a round.
    anchor: like the parameters, float32, equal on all replicas (but in `eager_diloco`): the outer
      parameters.
    inner_state: of the inner optimizer, differs per replica.
    outer_state: of the outer chain, equal on all replicas except error-feedback residuals.
  """

  count: jax.Array
  synced: jax.Array
  anchor: optax.Params
  inner_state: optax.OptState
  outer_state: optax.OptState


def local_updates(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  *,
  sync_period: int | jax.Array,
  axis_name: str,
  replicas_agree: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """`sync_period` inner steps per replica, then one step of `outer` on the pseudo-gradient.

  Where not `replicas_agree`, every replica has outer parameters of its own. Extra arguments of
  update reach both; `alive` needs a mean that takes it.
  """
  check_period(sync_period)
  check_transform("inner", inner)
  inner, outer = map(optax.with_extra_args_support, (inner, outer))

  def init_fn(params):
    check_floating("params", params)
    anchor = optax.tree.cast(params, jnp.float32)
    return LocalUpdatesState(
      count=jnp.zeros((), jnp.int32),
      synced=jnp.zeros((), jnp.bool_),
      anchor=jax.tree.map(jnp.copy, anchor),  # donation: never the parameters' own buffer
      inner_state=inner.init(params),
      outer_state=outer.init(anchor),
    )

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: the pseudo-gradient needs them.")
    _axes.axis_size(axis_name)
    check_alive(extra_args, state.outer_state)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    count = jnp.asarray(optax.safe_increment(state.count))
    synced = jnp.equal(count % sync_period, 0)

    def sync(updates, anchor, outer_state):
      local = optax.apply_updates(params, updates)
      pseudo_gradient = jax.tree.map(lambda a, p: a - p.astype(jnp.float32), anchor, local)
      step, outer_state = outer.update(pseudo_gradient, outer_state, anchor, **extra_args)
      if replicas_agree:
        check_equal(step, axis_name)
      anchor = jax.tree.map(jnp.add, anchor, step)
      back = jax.tree.map(lambda a, p, u: (a - p).astype(u.dtype), anchor, params, updates)
      return back, anchor, outer_state

    def keep(*args):
      return args

    updates, anchor, outer_state = _axes.cond(
      synced, sync, keep, updates, state.anchor, state.outer_state
    )
    return updates, LocalUpdatesState(count, synced, anchor, inner_state, outer_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def outer_params(opt_state: Any) -> optax.Params | None:
  """The outer parameters Θ (float32) inside any optax state; None if no method keeps them.

  Where `optax.masked` or `optax.partition` hides parameters from every method that keeps them, the
  tree holds `optax.MaskedNode()`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from jaxcomm import local_sgd, outer_params
    >>> tx = local_sgd(optax.sgd(0.1), sync_period=4)
    >>> outer_params(tx.init({"w": jnp.ones(2)}))["w"].tolist()
    [1.0, 1.0]
  """
  anchors = [state.anchor for state in _find(opt_state)]
  return functools.reduce(_fill_masked, anchors) if anchors else None


def just_synced(opt_state: Any) -> jax.Array | None:
  """bool[]: whether the last update exchanged over the slow axis; None if every update does.

  With several methods in one state (`optax.partition`): whether any of them did.
  """
  synced = [state.synced for state in _find(opt_state)]
  return functools.reduce(jnp.logical_or, synced) if synced else None


def exchange_level(opt_state: Any) -> jax.Array | None:
  """int32[]: how much the last update sent, from 0; None if every update sends the same.

  1 for the end of a round (`just_synced`), and one more for an exact mean in place of a compressed
  one (the states of `one_bit_adam`, `zero_one_adam` and `powersgd_mean` have a field `exact`). Of a
  method that sends fragments: which one, from 1 (the field `sent` of its state).

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from jaxcomm import local_sgd
    >>> from jaxcomm.transforms import exchange_level
    >>> tx = local_sgd(optax.sgd(0.1), sync_period=4)
    >>> int(exchange_level(tx.init({"w": jnp.ones(2)})))
    0
  """
  tells = lambda x: hasattr(x, "exact")  # noqa: E731
  levels = [x.exact for x in jax.tree.leaves(opt_state, is_leaf=tells) if tells(x)]
  found = _find(opt_state)
  levels += [x.sent for x in found if hasattr(x, "sent")]
  if rounds := [x.synced for x in found if not hasattr(x, "sent")]:
    levels.append(functools.reduce(jnp.logical_or, rounds))
  return functools.reduce(jnp.add, [x.astype(jnp.int32) for x in levels]) if levels else None


def apply_updates(params: optax.Params, updates: optax.Updates, opt_state: Any) -> optax.Params:
  """`optax.apply_updates`, and after a synchronisation exactly the outer parameters.

  `p + (Θ - p)` differs from Θ in the last bit, by another amount on every replica. With
  `optax.apply_updates` replicas therefore agree after a sync up to rounding; with this function
  they agree bit for bit. The method must be the last of its chain. Parameters that
  `optax.masked` or `optax.partition` hides from the method get their plain updates.

  Args:
    params: parameters before the step.
    updates: what `tx.update` returned.
    opt_state: the *new* state that `tx.update` returned.

  Returns:
    New parameters, each leaf in its own dtype.

  Example:
    >>> import jax, jax.numpy as jnp, optax, jaxcomm
    >>> tx = jaxcomm.local_sgd(optax.sgd(0.1), sync_period=1)
    >>> def step(p, g):
    ...   updates, state = tx.update(g, tx.init(p), p)
    ...   return jaxcomm.apply_updates(p, updates, state)
    >>> jax.vmap(step, axis_name="replica")(jnp.ones(2), jnp.array([0.0, 2.0])).tolist()
    [0.8999999761581421, 0.8999999761581421]
  """
  new = optax.apply_updates(params, updates)
  for state in _find(opt_state):
    if not isinstance(state, LocalUpdatesState):  # its replicas need not agree on what they sent
      continue
    exact = _fill_masked(state.anchor, new)
    choose = functools.partial(jnp.where, state.synced)
    new = jax.tree.map(lambda p, a, c=choose: c(a.astype(p.dtype), p), new, exact)
  return new


def at_outer_params(params: optax.Params, opt_state: Any) -> optax.Params:
  """`params` with the outer parameters in place of all that some method keeps, in their dtypes."""
  chosen = select_outer_params(params, opt_state)
  return jax.tree.map(lambda x, p: x.astype(p.dtype), chosen, params)


def select_outer_params(params: Any, opt_state: Any) -> Any:
  """Leaf by leaf what `opt_state` has as outer parameters, else what `params` has."""
  anchor = outer_params(opt_state)
  return params if anchor is None else _fill_masked(anchor, params)


def _find(opt_state: Any) -> list[Any]:
  """The states that keep outer parameters: `LocalUpdatesState` and its like."""
  is_state = lambda x: hasattr(x, "anchor") and hasattr(x, "synced")  # noqa: E731
  return [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]


def _fill_masked(tree: Any, other: Any) -> Any:
  """`tree` with what `other` has where `tree` is masked."""
  masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
  return jax.tree.map(lambda x, y: y if masked(x) else x, tree, other, is_leaf=masked)


def check_alive(extra_args: dict[str, Any], outer_state: Any) -> None:
  """Raises ValueError if update is given a mask that no mean of `outer_state` takes."""
  if extra_args.get("alive") is not None and not find_states(outer_state, HealthyMeanState):
    raise ValueError(
      "`alive` needs a mean that can leave replicas out: wrap it in healthy_mean, or give"
      " pmean_over `skip_nonfinite=True`."
    )


def check_equal(step: Any, axis_name: str) -> None:
  """Raises ValueError if the types of an outer step tell that it differs per replica."""
  if any(axis_name in _axes.varying_axes(x) for x in jax.tree.leaves(step)):
    raise ValueError(
      f"`outer` must average over axis `{axis_name}`, but its updates differ per replica: put"
      f' pmean_over("{axis_name}") or compressed_mean("{axis_name}", ...) first in its chain, and'
      " pass its momentum into jax.shard_map as equal on all replicas."
    )
