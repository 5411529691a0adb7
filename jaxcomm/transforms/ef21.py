"""EF21: every device sends how its gradient differs from what the others believe it to be."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.compressors import Compressor
from jaxcomm.transforms._checks import check_compressor
from jaxcomm.transforms._compressed import mean_of_messages
from jaxcomm.transforms._leafwise import map_leaves


class EF21State(NamedTuple):
  """State of `ef21`.

  Attributes:
    count: int32[], equal on all devices; number of means taken, folded into the rounding key.
    own: like the parameters, float32, differs per device: what the others know of its gradient.
    mean: like the parameters, float32, equal on all devices: the mean of `own`.
  """

  count: jax.Array
  own: optax.Updates
  mean: optax.Updates


def ef21(
  axis_name: str, compressor: Compressor, *, specs: Any = None, seed: int = 0
) -> optax.GradientTransformation:
  r"""Mean over `axis_name` of gradient estimates that compressed differences bring up to date.

  .. math::
    c_i = C(g_i - h_i), \quad h_i \leftarrow h_i + D(c_i), \quad
    h \leftarrow h + \frac1N \sum_i D(c_i), \quad u = h

  All :math:`h_i` start at zero (the paper's other choice, a first round without compression, is
  not made). h is the mean of the :math:`h_i` at all times, up to float32 rounding. The theory needs
  neither bounded gradients nor small steps, unlike that of `error_feedback`; but the noise of
  mini-batches is followed late, so it suits large batches.

  Wire, per device and update, over `axis_name`: :math:`(N-1)\,\mathrm{payload}(d)` per leaf, an
  all-gather of payloads (`collectives.allgather_pmean_bytes`). A leaf sharded over inner mesh axes
  is compressed shard by shard, so nothing crosses those axes.

  Per device: `own`. Equal: `count`, `mean`. A restore needs the same number of replicas; a named
  replica change that averages `own` keeps the law h = mean of :math:`h_i`.

  Args:
    axis_name: axis to average over, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    compressor: contractive, e.g. `top_k(ratio=0.01)`, `scaled_sign()`, `int4()`.
    specs: how leaves are sharded over the other mesh axes, see `compressed_mean`.
    seed: of the rounding keys, which are folded by mean, leaf and device.

  Returns:
    A `GradientTransformation` with `EF21State`.

  Raises:
    ValueError: `compressor` is none; in update, as `compressed_mean`.

  References:
    Richtarik, Sokolov, Fatkhullin, EF21, https://arxiv.org/abs/2106.05203.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import e3m0, ef21
    >>> tx = ef21("replica", e3m0())
    >>> def three_means(g):
    ...   state = tx.init(g)
    ...   for _ in range(3):
    ...     mean, state = tx.update(g, state)
    ...   return mean
    >>> grads = jnp.array([[8.0, 2.5], [8.0, 3.5]])
    >>> jax.vmap(three_means, axis_name="replica")(grads)[0].tolist()
    [8.0, 3.0]
  """
  check_compressor(compressor)

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return EF21State(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

  def update_leaf(leaf, count, g, own, mean):
    g32 = g.astype(jnp.float32)
    change, error = mean_of_messages(g32 - own, axis_name, compressor, key=leaf.key(seed, count))
    mean = mean + change
    return mean.astype(g.dtype), g32 - error, mean  # h_i + D(c_i) = g_i - error_i

  def update_fn(updates, state, params=None):
    del params
    out, own, mean = map_leaves(
      update_leaf, state.count, updates, state.own, state.mean, axis_name=axis_name, specs=specs
    )
    return out, EF21State(jnp.asarray(optax.safe_increment(state.count)), own, mean)

  return optax.GradientTransformation(init_fn, update_fn)
