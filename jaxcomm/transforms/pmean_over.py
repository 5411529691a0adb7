"""The exact mean over an axis: the baseline that every compressed mean is compared with."""

from typing import Any

import jax
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_floating
from jaxcomm.transforms.healthy_mean import healthy_mean


def pmean_over(
  axis_name: str, *, skip_nonfinite: bool = False, alive: Any = None
) -> optax.GradientTransformation:
  r"""Mean of the updates over `axis_name`: :math:`u = \frac1N \sum_i g_i`.

  The sum is taken in float32 and returned in each leaf's own dtype; the state is empty, unless
  replicas may be left out: then it is a `HealthyMeanState`, which counts them.

  Wire: one all-reduce of float32 per leaf and update, a ring sends :math:`2\frac{N-1}{N} 4d` bytes
  per device for `d` elements. Works inside `jax.shard_map` and `jax.vmap(axis_name=...)`, also
  where leaves are sharded over other mesh axes.

  Args:
    axis_name: mesh axis (or vmapped axis) to average over.
    skip_nonfinite: leave replicas with a NaN or infinity out of the mean, see `healthy_mean`.
    alive: bool[N], a mask of the replicas that may take part, see `healthy_mean`.

  Returns:
    A `GradientTransformation`.

  Raises:
    ValueError: `alive` is not a vector of bool with a True; in update, if `axis_name` is unbound,
      a mask has another size than the axis, or an update is not floating point.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import pmean_over
    >>> tx = optax.chain(pmean_over("replica"), optax.sgd(1.0))
    >>> grads = jnp.array([[1.0], [3.0]])  # two replicas
    >>> step = lambda g: tx.update(g, tx.init(g))[0]
    >>> jax.vmap(step, axis_name="replica")(grads).tolist()
    [[-2.0], [-2.0]]
  """

  def update_fn(updates, state, params=None):
    del params
    _axes.axis_size(axis_name)  # a clear error when the axis is unbound
    check_floating("updates", updates)
    return jax.tree.map(lambda g: _axes.pmean_f32(g, axis_name), updates), state

  mean = optax.GradientTransformation(optax.init_empty_state, update_fn)
  if not skip_nonfinite and alive is None:
    return mean
  return healthy_mean(mean, axis_name, skip_nonfinite=skip_nonfinite, alive=alive)
