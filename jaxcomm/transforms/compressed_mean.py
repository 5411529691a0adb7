"""The compressed mean over an axis: what crosses the wire is the compressor's payload."""

import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes, _shards
from jaxcomm.collectives import (
  allgather_pmean_with_error,
  compressed_pmean_with_error,
)
from jaxcomm.compressors import Compressor
from jaxcomm.transforms._checks import check_floating

_MEANS = {"two_hop": compressed_pmean_with_error, "all_gather": allgather_pmean_with_error}


class CompressedMeanState(NamedTuple):
  """State of `compressed_mean`.

  Attributes:
    count: int32[], equal on all devices; number of means taken, folded into the rounding key.
    residual: like the parameters, float32, differs per device: what compression still owes.
      `optax.EmptyState()` without error feedback.
  """

  count: jax.Array
  residual: Any


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
  order: all devices hold the same bits. Without error feedback `e` stays zero and is not stored.

  Wire, per device and update, with `payload(n)` the payload of `n` elements: `"two_hop"` (an
  all-to-all, a float32 mean on the owner of each chunk, an all-gather) sends
  :math:`2 (N-1)\,\mathrm{payload}(d/N)`; `"all_gather"` (each payload to every other device, one
  rounding) sends :math:`(N-1)\,\mathrm{payload}(d)`. A leaf sharded over inner mesh axes is
  compressed shard by shard, so nothing crosses those axes.

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
    ValueError: unknown `algorithm`; in update an unbound axis, missing `specs`, an update that is
      not floating point, or `specs` that shard leaves while `jax.vmap` stacks the replicas.

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
  if algorithm not in _MEANS:
    raise ValueError(f"`algorithm` must be one of {sorted(_MEANS)}, got {algorithm!r}.")

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return CompressedMeanState(
      count=jnp.zeros((), jnp.int32),
      residual=zeros if error_feedback else optax.EmptyState(),
    )

  def mean_of_leaf(path, g, residual, spec, count):
    key = jax.random.fold_in(jax.random.key(seed), count)
    key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
    key = _shards.fold_in_shard(key, spec)
    h = g.astype(jnp.float32)
    if residual is not None:
      h = h + residual
    mean, error = _MEANS[algorithm](h, axis_name, compressor, key=key)
    return mean.astype(g.dtype), error

  def update_fn(updates, state, params=None):
    del params
    _axes.axis_size(axis_name)
    check_floating("updates", updates)
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    paths = [path for path, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    residuals = treedef.flatten_up_to(state.residual) if error_feedback else [None] * len(leaves)
    if not _axes.is_manual(axis_name):
      _shards.check_unsharded(specs)
    leaf_specs = _shards.leaf_specs(leaves, treedef, specs)

    def mean(leaves, residuals, count):
      pairs = [mean_of_leaf(*args, count) for args in zip(paths, leaves, residuals, leaf_specs)]
      means, errors = [m for m, _ in pairs], [e for _, e in pairs]
      return means, errors if error_feedback else residuals

    means, errors = _shards.on_shards(mean, leaf_specs)(leaves, residuals, state.count)
    residual = treedef.unflatten(errors) if error_feedback else state.residual
    count = jnp.asarray(optax.safe_increment(state.count))
    return treedef.unflatten(means), CompressedMeanState(count, residual)

  return optax.GradientTransformation(init_fn, update_fn)
