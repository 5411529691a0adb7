"""NoLoCo: DiLoCo's outer step between random pairs of replicas, without any all-reduce."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm import _axes
from jaxcomm.collectives import random_matching
from jaxcomm.transforms._checks import check_decay, check_floating, check_period, check_transform
from jaxcomm.transforms._gossip import check_positive, difference, gossip_average
from jaxcomm.transforms._local_updates import LocalUpdatesState


def noloco(
  inner: optax.GradientTransformation,
  *,
  sync_period: int | jax.Array = 50,
  outer_lr: float | jax.Array = 0.7,
  outer_momentum: float | jax.Array = 0.5,
  consensus_lr: float | jax.Array | None = None,
  axis_name: str = "replica",
  seed: int = 0,
  allow_idle: bool = False,
  check_stability: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""`sync_period` steps of `inner` per replica, then a momentum step on the mean of a random pair.

  With slow weights :math:`\phi_i`, fast ones :math:`\theta_i` after the inner steps, and a bar for
  the mean of the pair:

  .. math::
    \delta_i \leftarrow \alpha\,\delta_i + \beta (\bar\theta - \bar\phi)
    + \gamma (\bar\phi - \phi_i), \quad \phi_i \leftarrow \phi_i + \delta_i,
    \quad \theta_i \leftarrow \phi_i

  With :math:`\gamma = \beta`, the default, this is :math:`\beta (\bar\theta - \phi_i)`: the slow
  weights cancel and need not travel. Pairs are drawn anew at every exchange, from `seed` and the
  number of the exchange, which all replicas know. The momentum is heavy-ball; the state of `inner`
  is kept and not averaged.

  The differences between replicas die out only below a bound for :math:`\gamma`, see
  `noloco_stability_bound`: DiLoCo's momentum of 0.9 is too much for :math:`\gamma = 0.7`.

  Wire, per device: nothing for `sync_period - 1` steps, then one message to one partner: the
  parameters in their own dtype, `gossip_mix_bytes` (4P bytes for P float32 parameters); with a
  `consensus_lr` of its own as much again for the slow weights, in float32.

  Per replica, never equal: parameters, slow weights (`anchor`), momentum (`outer_state`, float32)
  and `inner_state`. A restore needs the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    sync_period: inner steps per round (H).
    outer_lr: β > 0.
    outer_momentum: α in [0, 1).
    consensus_lr: γ > 0; None for γ = β.
    axis_name: axis of the replicas.
    seed: of the pairs.
    allow_idle: with an odd number of replicas, let one, drawn too, take its step alone.
    check_stability: refuse γ at or above the bound (numbers that optax injects are not checked).

  Returns:
    A transform with `LocalUpdatesState`; its update takes `alive`, bool[N], as an extra argument:
    whose partner is dead takes its step alone. After an exchange `jaxcomm.apply_updates` makes the
    parameters exactly the slow weights.

  Raises:
    ValueError: an argument outside these rules, `inner` is no transform, parameters are not
      floating point, `params` are missing in update, the axis is unbound, an odd number of replicas
      (unless `allow_idle`), or an unstable γ.

  References:
    Kolehmainen et al., NoLoCo, https://arxiv.org/abs/2506.10911; γ = β as in the authors' code.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import noloco
    >>> tx = noloco(optax.sgd(0.5), sync_period=1, outer_lr=0.5)
    >>> def step(target):
    ...   p = jnp.zeros(())
    ...   updates, _ = tx.update(p - target, tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [0.5, 0.5]
  """
  check_period(sync_period)
  check_transform("inner", inner)
  check_decay("outer_momentum", outer_momentum)
  check_positive("outer_lr", outer_lr)
  if consensus_lr is not None:
    check_positive("consensus_lr", consensus_lr)
  inner = optax.with_extra_args_support(inner)
  pairs = random_matching(seed)

  def init_fn(params):
    check_floating("params", params)
    slow = optax.tree.cast(params, jnp.float32)
    return LocalUpdatesState(
      count=jnp.zeros((), jnp.int32),
      synced=jnp.zeros((), jnp.bool_),
      anchor=jax.tree.map(jnp.copy, slow),  # donation: never the parameters' own buffer
      inner_state=inner.init(params),
      outer_state=optax.tree.zeros_like(slow),
    )

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: the outer step needs them.")
    size = _axes.axis_size(axis_name)
    _check_pairs(size, allow_idle)
    if check_stability:
      _check_stable(outer_momentum, outer_lr, consensus_lr, size)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    count = jnp.asarray(optax.safe_increment(state.count))
    synced = jnp.equal(count % sync_period, 0)
    step = count // sync_period - 1

    def mean(tree):
      return gossip_average(tree, axis_name, pairs, step=step, alive=alive)

    def sync(updates, slow, momentum):
      fast = optax.apply_updates(params, updates)
      momentum = _new_momentum(mean, fast, slow, momentum, outer_lr, outer_momentum, consensus_lr)
      slow = jax.tree.map(jnp.add, slow, momentum)
      return difference(slow, params, updates), slow, momentum

    def keep(*args):
      return args

    updates, slow, momentum = _axes.cond(
      synced, sync, keep, updates, state.anchor, state.outer_state
    )
    return updates, state._replace(
      count=count, synced=synced, anchor=slow, inner_state=inner_state, outer_state=momentum
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def noloco_stability_bound(outer_momentum: float, num_replicas: int) -> float:
  r"""Below which γ the differences between replicas die out, in mean square over random pairs.

  .. math:: 0 < \gamma < \frac{2 (1 - \alpha^2)}{1 + \alpha (1 - 2k)}, \quad
    k = \frac{N}{2 (N - 1)} \text{ for even } N, \quad \tfrac12 \text{ for odd } N

  2k is how much of the squared differences a plain average of pairs removes. Derived from the exact
  recursion of their second moments with inner progress left out; the paper states another interval.

  Args:
    outer_momentum: α in [0, 1).
    num_replicas: N; for one replica there is no bound.

  Example:
    >>> from jaxcomm.transforms import noloco_stability_bound
    >>> [round(noloco_stability_bound(alpha, 8), 3) for alpha in (0.0, 0.5, 0.9)]
    [2.0, 1.615, 0.436]
  """
  if num_replicas == 1:
    return float("inf")
  k = 0.5 if num_replicas % 2 else num_replicas / (2 * (num_replicas - 1))
  return 2 * (1 - outer_momentum**2) / (1 + outer_momentum * (1 - 2 * k))


def _new_momentum(
  mean: Callable[[Any], Any], fast: Any, slow: Any, momentum: Any, beta: Any, alpha: Any, gamma: Any
) -> Any:
  mean_fast = mean(fast)
  if gamma is None:
    return jax.tree.map(lambda m, f, s: alpha * m + beta * (f - s), momentum, mean_fast, slow)

  def leaf(m, f, s_mean, s):
    return alpha * m + beta * (f - s_mean) + gamma * (s_mean - s)

  return jax.tree.map(leaf, momentum, mean_fast, mean(slow), slow)


def _check_pairs(size: int, allow_idle: bool) -> None:
  if size % 2 and size > 1 and not allow_idle:
    raise ValueError(
      f"noloco pairs replicas, got an odd number of them, {size}: pass `allow_idle=True` to let"
      " one, drawn anew at every exchange, step alone."
    )


def _check_stable(alpha: Any, beta: Any, gamma: Any, size: int) -> None:
  name, gamma = ("outer_lr", beta) if gamma is None else ("consensus_lr", gamma)
  if isinstance(alpha, Tracer) or isinstance(gamma, Tracer):
    return
  bound = noloco_stability_bound(alpha, size)
  if gamma >= bound:
    raise ValueError(
      f"`{name}` must be below {bound:.3f} with `outer_momentum`={alpha} and {size} replicas, got"
      f" {gamma}: the replicas would drift apart. Use less momentum (the paper's is 0.5), or"
      " `check_stability=False`."
    )
