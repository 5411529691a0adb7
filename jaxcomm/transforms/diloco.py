"""DiLoCo: many local steps, then one step of an outer optimizer on the mean pseudo-gradient."""

import optax

from jaxcomm.transforms._checks import check_transform
from jaxcomm.transforms._local_updates import local_updates
from jaxcomm.transforms.pmean_over import pmean_over


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation | None = None,
  *,
  sync_period: int = 500,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""`sync_period` steps of `inner` per replica, then `outer` on what they moved.

  .. math::
    \Delta_i = \Theta - \theta_i, \quad
    \Theta \leftarrow \Theta + \mathrm{outer}(\mathrm{mean}_i\,\Delta_i), \quad
    \theta_i \leftarrow \Theta

  The mean is the first transform of `outer`, so that any mean will do:
  `outer=optax.chain(compressed_mean("replica", int4()), optax.sgd(0.7, 0.9, nesterov=True))`.
  The state of `inner` is kept per replica and not averaged; `inner` counts inner steps, `outer`
  counts rounds. With `optax.MultiSteps` as `inner` the period counts micro-batches; around this
  transform it would repeat the exchange for every micro-batch of the last step of a round.

  Wire: nothing for `sync_period - 1` steps, then what the mean of `outer` sends for one tree of
  parameters: :math:`2\frac{N-1}{N} 4P` bytes per device with `pmean_over` and `P` parameters,
  about an eighth with 4-bit codes on both hops.

  What skips steps by a replica's own gradient (`optax.apply_if_finite`) belongs inside `inner`: all
  replicas must count the same steps, or they wait for each other forever.

  Per replica: parameters, `inner_state` and error-feedback residuals. Equal: outer parameters and
  outer momentum. A restore needs the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    outer: a mean over `axis_name`, then an optimizer; default
      `optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))`.
    sync_period: inner steps per round (H); the paper uses 500.
    axis_name: axis of the replicas.

  Returns:
    A transform whose updates bring `optax.apply_updates` to the outer parameters at the end of a
    round (up to rounding; `jaxcomm.apply_updates` makes replicas agree bit for bit).

  Raises:
    ValueError: `sync_period` is not an integer of at least 1, `inner` or `outer` is not a
      transform, parameters are not floating point, `params` are missing in update, the axis is
      unbound, or `outer` holds no mean over it (which types tell: under `jax.shard_map` with
      replication checks).

  References:
    Douillard et al., DiLoCo, https://arxiv.org/abs/2311.08105; Jaghouar et al., OpenDiLoCo,
    https://arxiv.org/abs/2407.07852.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import diloco, pmean_over
    >>> outer = optax.chain(pmean_over("replica"), optax.sgd(0.5))
    >>> tx = diloco(optax.sgd(0.5), outer, sync_period=1)
    >>> def step(target):
    ...   p = jnp.zeros(())
    ...   updates, _ = tx.update(p - target, tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [0.5, 0.5]
  """
  if outer is None:
    outer = optax.chain(pmean_over(axis_name), optax.sgd(0.7, momentum=0.9, nesterov=True))
  check_transform("outer", outer)
  return local_updates(inner, outer, sync_period=sync_period, axis_name=axis_name)
