"""SlowMo: local steps, an exact average, and a slow momentum on what the average moved."""

from typing import Any

import optax

from jaxcomm.transforms._checks import check_transform
from jaxcomm.transforms._local_updates import local_updates
from jaxcomm.transforms._slow_momentum import Rate, slow_momentum
from jaxcomm.transforms.pmean_over import pmean_over


def slowmo(
  inner: optax.GradientTransformation,
  *,
  sync_period: int,
  outer_lr: Any = 1.0,
  outer_momentum: Any = 0.5,
  inner_lr: Rate | None = None,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""`sync_period` steps of `inner` per replica, then a heavy-ball step on their mean.

  .. math::
    g = \frac1N \sum_i (\Theta - \theta_i), \quad m \leftarrow \beta m + g / \gamma, \quad
    \Theta \leftarrow \Theta - \alpha \gamma m, \quad \theta_i \leftarrow \Theta

  It is `diloco` with momentum that is not Nesterov's, and with the division by the inner learning
  rate :math:`\gamma`, which keeps the momentum in units of gradients where that rate follows a
  schedule; for a constant rate it changes nothing. With :math:`\beta = 0, \alpha = 1` it is
  `local_sgd`.

  Wire: nothing for `sync_period - 1` steps, then one mean of all parameters, by default float32,
  :math:`2\frac{N-1}{N} 4P` bytes per device for `P` parameters.

  Per replica: parameters and `inner_state`. Equal: outer parameters and momentum. A restore needs
  the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    sync_period: inner steps per round (τ).
    outer_lr: slow learning rate α; 1 in the paper.
    outer_momentum: slow momentum β, in [0, 1); the paper uses 0.4 to 0.8.
    inner_lr: learning rate γ of `inner`, a number or a schedule of the inner step, taken at the
      last step of a round. Where a schedule has come down to 0 its last positive value counts.
      None: no division.
    axis_name: axis of the replicas.
    mean: how to average, e.g. `compressed_mean("replica", int8())`; default `pmean_over`.

  Returns:
    A transform whose updates bring `jaxcomm.apply_updates` to the outer parameters at the end of a
    round.

  Raises:
    ValueError: an argument outside these rules, `inner_lr` not positive at the end of the first
      round, and what `local_sgd` raises.

  References:
    Wang, Tantia, Ballas, Rabbat, SlowMo, https://arxiv.org/abs/1910.00643, algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import slowmo
    >>> tx = slowmo(optax.sgd(0.5), sync_period=1, outer_lr=2.0)
    >>> def step(target):
    ...   p = jnp.zeros(())
    ...   updates, _ = tx.update(p - target, tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [2.0, 2.0]
  """
  mean = pmean_over(axis_name) if mean is None else mean
  check_transform("mean", mean)
  step = slow_momentum(
    sync_period=sync_period, outer_lr=outer_lr, outer_momentum=outer_momentum, inner_lr=inner_lr
  )
  return local_updates(inner, optax.chain(mean, step), sync_period=sync_period, axis_name=axis_name)
