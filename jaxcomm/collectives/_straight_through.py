"""The derivative of a compressed mean: that of the exact mean."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.compressors import Compressor

Mean = Callable[[jax.Array, str, Compressor, jax.Array | None], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def straight_through(
  mean: Mean, axis_name: str, compressor: Compressor, x: jax.Array, key: jax.Array | None
) -> jax.Array:
  """`mean(x, axis_name, compressor, key)` with the derivative of `jax.lax.pmean`.

  That has two conventions. With replication checks the cotangent is equal on all devices by type,
  and each device gets its N-th part. Without them, and under vmap, the transpose of a sum is the
  sum of the cotangents: their mean crosses the wire, by the same `mean`.

  JAX 0.10 does not bind the axis in the backward pass of a `jax.vmap(axis_name=...)` that is
  differentiated from outside, so that raises the error of an unbound axis.

  `x` must be typed as differing already: the transpose of that cast is then JAX's own.
  """
  return mean(x, axis_name, compressor, key)


def _forward(mean, axis_name, compressor, x, key):
  return straight_through(mean, axis_name, compressor, x, key), key


def _backward(mean, axis_name, compressor, key, ct):
  if _is_checked(axis_name):
    return _axes.vary(ct / _axes.axis_size(axis_name), axis_name), None
  # A key of its own: the noise of the backward pass is independent of that of the forward pass.
  key = None if key is None else jax.random.fold_in(key, 2)
  ct = as_differing(ct, axis_name)
  return straight_through(mean, axis_name, compressor, ct, key), None


straight_through.defvjp(_forward, _backward)


def as_differing(x: jax.Array, axis_name: str) -> jax.Array:
  """`x`, marked as differing over `axis_name` in whatever way is in force."""
  if _axes.is_manual(axis_name):
    return _axes.vary(x, axis_name)
  # Under vmap, all_to_all of a value without a batch axis is wrong (JAX 0.10): give it one. The
  # selection is the identity, and the compiler removes it.
  return jnp.where(jax.lax.axis_index(axis_name) >= 0, x, x)


def _is_checked(axis_name: str) -> bool:
  """Whether types record variation over `axis_name` (shard_map with check_vma=True)."""
  return axis_name in _axes.varying_axes(_axes.vary(jnp.zeros(()), axis_name))
