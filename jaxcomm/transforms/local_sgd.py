"""Local SGD: replicas train alone and average their parameters every `sync_period` steps."""

import optax

from jaxcomm.transforms._checks import check_transform
from jaxcomm.transforms._local_updates import local_updates
from jaxcomm.transforms.pmean_over import pmean_over


def local_sgd(
  inner: optax.GradientTransformation,
  *,
  sync_period: int,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Averages parameters over `axis_name` every `sync_period` steps of `inner`.

  .. math:: \Theta \leftarrow \Theta - \frac1N \sum_i (\Theta - \theta_i), \quad
    \theta_i \leftarrow \Theta

  The state of `inner` is kept per replica and not averaged. With `sync_period=1` and plain SGD
  inside this is synchronous data-parallel SGD.

  Wire: nothing for `sync_period - 1` steps, then one mean of all parameters, by default float32,
  :math:`2\frac{N-1}{N} 4P` bytes per device for `P` parameters.

  Per replica: parameters and `inner_state`. Equal: the outer parameters. A restore needs the same
  number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    sync_period: inner steps between two averages (H).
    axis_name: axis of the replicas.
    mean: how to average, e.g. `compressed_mean("replica", int8())`; default `pmean_over`.

  Raises:
    ValueError: `sync_period` is not an integer of at least 1, `inner` or `mean` is not a
      transform, parameters are not floating point, `params` are missing in update, the axis is
      unbound, or `mean` does not average over it (which types tell: under `jax.shard_map` with
      replication checks).

  References:
    Stich, Local SGD Converges Fast and Communicates Little, https://arxiv.org/abs/1805.09767;
    McMahan et al., FedAvg, https://arxiv.org/abs/1602.05629.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import local_sgd
    >>> tx = local_sgd(optax.sgd(0.5), sync_period=2)
    >>> def two_steps(target):
    ...   p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ...   for _ in range(2):
    ...     updates, state = tx.update(p - target, state, p)
    ...     p = optax.apply_updates(p, updates)
    ...   return p
    >>> jax.vmap(two_steps, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [1.5, 1.5]
  """
  mean = pmean_over(axis_name) if mean is None else mean
  check_transform("mean", mean)
  outer = optax.chain(mean, optax.sgd(1.0))
  return local_updates(inner, outer, sync_period=sync_period, axis_name=axis_name)
