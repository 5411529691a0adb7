"""Eager DiLoCo: the others' pseudo-gradients arrive a round late, one's own at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_transform
from jaxcomm.transforms._local_updates import local_updates
from jaxcomm.transforms.healthy_mean import all_finite
from jaxcomm.transforms.pmean_over import pmean_over


class EagerMeanState(NamedTuple):
  """First part of the outer state of `eager_diloco`.

  Attributes:
    others: like the parameters, float32, differs per replica: what the other replicas put into the
      mean of the last round, which is on its way during this one.
    mean_state: of `mean`.
  """

  others: optax.Updates
  mean_state: optax.OptState


def eager_diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  *,
  sync_period: int,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""DiLoCo whose exchange has a whole round of time.

  At the end of round r a replica starts the mean of the pseudo-gradients
  :math:`\Delta_i^r = \Theta_i - \theta_i`, and does not wait for it: its outer step takes its own,
  which it has, and the others' of the round before, which have arrived:

  .. math::
    g_i = \frac1N \Delta_i^r + \Big(\bar g^{r-1} - \frac1N \Delta_i^{r-1}\Big), \quad
    \Theta_i \leftarrow \Theta_i + \mathrm{outer}(g_i), \quad \theta_i \leftarrow \Theta_i

  Nothing has arrived in the first round: there the second term is zero. The outer parameters differ
  per replica; over all replicas :math:`\sum_i g_i = \bar g^r + (N - 1)\,\bar g^{r-1}`. With one
  replica this is `diloco`.

  The exchange is overlapped in what it computes: the mean is taken in the step that ends the round,
  and nothing but the state reads it before the next round ends.

  Wire: as `diloco`, nothing for `sync_period - 1` steps, then what `mean` sends for one tree of
  parameters.

  Per replica: parameters, outer parameters, both optimizers' states, and the mean on its way. A
  restore needs the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    outer: optimizer of the outer parameters, without a mean; default
      `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
    sync_period: inner steps per round (H).
    axis_name: axis of the replicas.
    mean: how to average, e.g. `compressed_mean("replica", int4())`; default `pmean_over`. What
      compression changes counts as the others' part. A replica that the mean leaves out for a NaN
      (`healthy_mean`) takes only the others' part as well.

  Raises:
    ValueError: as `local_sgd`.

  References:
    Kale et al., Eager Updates For Overlapped Communication and Computation in DiLoCo,
    https://arxiv.org/abs/2502.12996.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import eager_diloco
    >>> tx = eager_diloco(optax.sgd(1.0), optax.sgd(1.0), sync_period=1)
    >>> def two_steps(grad):
    ...   p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ...   for _ in range(2):
    ...     updates, state = tx.update(grad, state, p)
    ...     p = optax.apply_updates(p, updates)
    ...   return p
    >>> jax.vmap(two_steps, axis_name="replica")(jnp.array([2.0, 4.0])).tolist()
    [-4.0, -5.0]
  """
  outer = optax.sgd(0.7, momentum=0.9, nesterov=True) if outer is None else outer
  mean = pmean_over(axis_name) if mean is None else mean
  check_transform("outer", outer)
  check_transform("mean", mean)
  chain = optax.chain(_eager_mean(axis_name, mean), outer)
  return local_updates(
    inner, chain, sync_period=sync_period, axis_name=axis_name, replicas_agree=False
  )


def _eager_mean(
  axis_name: str, mean: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  mean = optax.with_extra_args_support(mean)

  def init_fn(params):
    others = optax.tree.zeros_like(params, dtype=jnp.float32)
    return EagerMeanState(others, mean.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    new, mean_state = mean.update(updates, state.mean_state, params, **extra_args)
    left_out = ~all_finite(updates) & all_finite(new)  # then it has no part of its own
    own = jax.tree.map(lambda g: jnp.where(left_out, 0, g) / _axes.axis_size(axis_name), updates)
    others = jax.tree.map(jnp.subtract, new, own)
    return jax.tree.map(jnp.add, own, state.others), EagerMeanState(others, mean_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
