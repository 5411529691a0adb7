"""The compressed mean over an axis: what crosses the wire is the compressor's payload."""

from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxcomm.compressors import Compressor
from jaxcomm.transforms._checks import check_compressor
from jaxcomm.transforms._compressed import MEANS, CompressedMeanState, check_algorithm
from jaxcomm.transforms._leafwise import map_leaves
from jaxcomm.transforms.error_feedback import error_feedback as ef14

__all__ = ["CompressedMeanState", "compressed_mean"]


def compressed_mean(
  axis_name: str,
  compressor: Compressor,
  *,
  error_feedback: bool = False,
  algorithm: Literal["two_hop", "all_gather"] = "two_hop",
  specs: Any = None,
  seed: int = 0,
) -> optax.GradientTransformation:
  r"""Mean over `axis_name` of compressed updates, optionally with error feedback (EF14).

  .. math::
    h_i = g_i + e_i, \quad u = \mathrm{mean}_C(h_1, \dots, h_N), \quad
    \tfrac1N \sum_i e_i' = \tfrac1N \sum_i h_i - u

  The residual accounts for both roundings of the two-hop mean, so that the sum of all outputs
  plus the mean residual is the sum of all mean inputs. The mean is taken in float32 in a fixed
  order: all devices hold the same bits. Without error feedback `e` stays zero and is not stored;
  with it this is `error_feedback(axis_name, compressor)`. Every compressor will do: the errors of
  an unbiased one average out over devices and steps (over devices only where they do not share a
  key), a biased one (`top_k`, `scaled_sign`) needs error feedback to reach the optimum.

  Wire, per device and update, with `payload(n)` the payload of `n` elements: `"two_hop"` (an
  all-to-all, a float32 mean on the owner of each chunk, an all-gather) sends
  :math:`2 (N-1)\,\mathrm{payload}(d/N)`; `"all_gather"` (each payload to every other device, one
  rounding) sends :math:`(N-1)\,\mathrm{payload}(d)`, or with `rand_k(shared_support=True)` the
  all-reduce of its k floats, :math:`2\frac{N-1}{N} 4k`. Sparse compressors want `"all_gather"`: two
  hops keep k of what the first k have left. A leaf sharded over inner mesh axes is compressed
  shard by shard, so nothing crosses those axes.

  On restore: `count` is equal everywhere; `residual` differs per device and needs the same number
  of replicas, or a named replica change.

  Args:
    axis_name: axis to average over, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    compressor: what a message is, e.g. `int8()`, `int4()`, `e3m0()`.
    error_feedback: keep what compression lost and add it to the next input.
    algorithm: `"two_hop"` or `"all_gather"`.
    specs: how leaves are sharded over the other mesh axes: a tree of `PartitionSpec` like the
      updates, or one `PartitionSpec` for all leaves. Needed when such an axis is larger than 1
      and of type Auto (under Explicit axes the types tell).
    seed: of the rounding keys, which are folded by mean, leaf and device.

  Returns:
    A `GradientTransformation`.

  Raises:
    ValueError: unknown `algorithm`, `compressor` is none; in update an unbound axis, missing
      `specs`, an update that is not floating point, or `specs` that shard leaves while `jax.vmap`
      stacks the replicas.

  References:
    Seide et al., 1-Bit Stochastic Gradient Descent, 2014 (error feedback); Wang et al., ZeRO++,
    https://arxiv.org/abs/2306.10209 (the mean by all-to-all).

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import compressed_mean, int8
    >>> tx = optax.chain(compressed_mean("replica", int8()), optax.sgd(1.0))
    >>> grads = jnp.array([[127.0, 0.0], [127.0, 254.0]])  # two replicas
    >>> step = lambda g: tx.update(g, tx.init(g))[0]
    >>> jax.vmap(step, axis_name="replica")(grads)[0].tolist()
    [-127.0, -127.0]
  """
  check_algorithm(algorithm)
  check_compressor(compressor)
  if error_feedback:
    return ef14(axis_name, compressor, algorithm=algorithm, specs=specs, seed=seed)

  def init_fn(params):
    del params
    return CompressedMeanState(jnp.zeros((), jnp.int32), optax.EmptyState())

  def mean_of_leaf(leaf, count, g):
    key = leaf.key(seed, count)
    mean, _ = MEANS[algorithm](g.astype(jnp.float32), axis_name, compressor, key=key)
    return (mean.astype(g.dtype),)

  def update_fn(updates, state, params=None):
    del params
    (means,) = map_leaves(mean_of_leaf, state.count, updates, axis_name=axis_name, specs=specs)
    count = jnp.asarray(optax.safe_increment(state.count))
    return means, CompressedMeanState(count, state.residual)

  return optax.GradientTransformation(init_fn, update_fn)
