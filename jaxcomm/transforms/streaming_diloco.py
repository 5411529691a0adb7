"""Streaming DiLoCo: one fragment of the parameters at a time, merged steps after it is sent."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_count, check_floating, check_transform
from jaxcomm.transforms._fragments import (
  FragmentsState,
  Pattern,
  check_spacing,
  count_fragments,
  init_state,
  make_fragments,
  outer_step,
)
from jaxcomm.transforms.pmean_over import pmean_over


def streaming_diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  *,
  sync_period: int,
  fragments: int | Any = 4,
  delay: int = 0,
  alpha: float = 0.5,
  pattern: Pattern = "strided",
  stacked: Any = None,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""DiLoCo whose parameters travel in F fragments, one every `sync_period / F` steps.

  Fragment p is sent after step t, and `delay` steps of `inner` later merged into the local
  parameters, which have moved on meanwhile:

  .. math::
    \Delta_{i,p} = \Theta_p - \theta_{i,p}(t), \quad
    \Theta_p \leftarrow \Theta_p + \mathrm{outer}_p(\mathrm{mean}_i\,\Delta_{i,p}), \quad
    \theta_{i,p} \leftarrow \alpha\,\theta_{i,p}(t + \tau) + (1 - \alpha)\,\Theta_p

  Fragment p of F is merged after the steps :math:`(p + 1) H / F + k H`. Every fragment has a state
  of `outer` of its own. `alpha=0` drops what replicas learnt while it was on its way; `alpha=1`
  never pulls them together. With one fragment, no delay and `alpha=0` this is `diloco`.

  The mean is the first transform of `outer`, so that any mean will do; the paper's message is
  `compressed_mean("replica", e3m0())`.

  With a `delay` the mean is taken in the update after the one that sends, from the parameters that
  this one was given, and nothing but the state needs it before the update ends: where a program
  runs what is ready (XLA on CPU, between processes) the exchange and a forward and backward pass
  go side by side. Longer delays only simulate the latency of a slower link.

  Wire: in the updates that exchange, what the mean sends for one fragment: with `pmean_over`
  :math:`2\frac{N-1}{N} 4 P_p` bytes per device for its :math:`P_p` parameters; nothing in all other
  steps. Per round as much as `diloco`, at the peak about a F-th.

  Per replica: parameters, `inner_state` and error-feedback residuals. Equal: outer parameters and
  outer states. Fragments in flight are part of the state (`anchor`): a resume at any step is exact.
  A restore needs the same number of fragments and replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    outer: a mean over `axis_name`, then an optimizer; default
      `optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))`.
    sync_period: inner steps between two merges of the same fragment (H).
    fragments: how many, made by `fragment_labels`; or a tree of labels like it returns, for example
      `jax.tree_util.tree_map_with_path` of your own rule.
    delay: inner steps from sending to merging (τ), fewer than `sync_period / fragments`: one
      fragment is in flight at a time.
    alpha: share of the local parameters in the merge, in [0, 1].
    pattern: of the layers, as in `fragment_labels`; for an integer `fragments`.
    stacked: leaves whose leading dimension counts layers, as in `fragment_labels`. That dimension
      must not be sharded: its slices would be gathered.
    axis_name: axis of the replicas.

  Returns:
    A transform with `FragmentsState`.

  Raises:
    ValueError: an argument outside these rules, `fragments` does not divide `sync_period`, a
      fragment would be empty, parameters are not floating point, `params` are missing in update,
      the axis is unbound, or `outer` holds no mean over it (which types tell: under
      `jax.shard_map` with replication checks).

  References:
    Douillard et al., Streaming DiLoCo with overlapping communication,
    https://arxiv.org/abs/2501.18512.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import pmean_over, streaming_diloco
    >>> outer = optax.chain(pmean_over("replica"), optax.sgd(1.0))
    >>> tx = streaming_diloco(optax.sgd(1.0), outer, sync_period=2, fragments=2, alpha=0.0)
    >>> def two_steps(grad):  # the first leaf is exchanged after step 1, the second after step 2
    ...   p = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    ...   state = tx.init(p)
    ...   for _ in range(2):
    ...     updates, state = tx.update({"a": grad, "b": grad}, state, p)
    ...     p = optax.apply_updates(p, updates)
    ...   return p
    >>> p = jax.vmap(two_steps, axis_name="replica")(jnp.array([1.0, 3.0]))
    >>> p["a"].tolist(), p["b"].tolist()
    ([-3.0, -5.0], [-4.0, -4.0])
  """
  if outer is None:
    outer = optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))
  check_transform("inner", inner)
  check_transform("outer", outer)
  num_fragments = count_fragments(fragments)
  every = check_spacing(sync_period, num_fragments)
  _check_merge(delay, alpha, every)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    parts = make_fragments(params, fragments, pattern, stacked)
    return init_state(inner, outer, params, parts, num_fragments)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: the pseudo-gradient needs them.")
    _axes.axis_size(axis_name)
    parts = make_fragments(params, fragments, pattern, stacked)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    count = jnp.asarray(optax.safe_increment(state.count))

    def send(p):
      def branch(moves, *args):
        local = parts.take(params, p)
        local = local if delay else optax.apply_updates(local, parts.take(moves, p))
        return outer_step(outer, parts, p, local, *args, axis_name=axis_name, extra_args=extra_args)

      return branch

    def merge(p):
      def branch(updates, anchor):
        taken = (parts.take(tree, p) for tree in (params, updates, anchor))
        return parts.put(updates, p, _merge(alpha, *taken))

      return branch

    # After a step, or before the next one: then the exchange does not wait for gradients.
    sent = _turn(count + max(delay - 1, 0), every, num_fragments)
    sends = [lambda moves, *args: args, *map(send, range(num_fragments))]
    args = (() if delay else updates, state.anchor, state.outer_states)
    anchor, outer_states = _axes.switch(sent, sends, *args)
    merges = [lambda updates, anchor: updates, *map(merge, range(num_fragments))]
    updates = _axes.switch(_turn(count, every, num_fragments), merges, updates, anchor)
    return updates, FragmentsState(count, sent, anchor, inner_state, outer_states)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _turn(count: jax.Array, every: int, num_fragments: int) -> jax.Array:
  """The fragment, from 1, whose turn it is at step `count`; 0 if it is nobody's."""
  return jnp.where(count % every == 0, 1 + (count // every - 1) % num_fragments, 0)


def _merge(alpha: Any, params: Any, updates: Any, anchor: Any) -> Any:
  """Updates that bring `params` to the mixture of where `updates` would, and `anchor`."""

  def leaf(old, update, new, a):
    return ((1 - alpha) * a + alpha * new.astype(jnp.float32) - old).astype(update.dtype)

  return jax.tree.map(leaf, params, updates, optax.apply_updates(params, updates), anchor)


def _check_merge(delay: Any, alpha: Any, every: int) -> None:
  check_count("delay", delay, at_least=0)
  if delay >= every:
    raise ValueError(
      "`delay` must be below `sync_period` / `fragments`, since one fragment is in flight at a"
      f" time: below {every}, got {delay}."
    )
  if not isinstance(alpha, Tracer) and not 0 <= alpha <= 1:
    raise ValueError(f"`alpha` must be in [0, 1], got {alpha!r}.")
