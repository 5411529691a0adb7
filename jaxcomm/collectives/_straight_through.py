"""Derivatives of compressed collectives: those of the exact, linear ones."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes

# Folded into the keys of backward passes; no rank or hop reaches it.
_BACKWARD = 2**31 - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def straight_through(
  op: Callable[[jax.Array, Any], Any],
  transpose: Callable[[Any, Any], jax.Array],
  x: jax.Array,
  aux: Any,
) -> Any:
  """`op(x, aux)` with the derivative of the linear map whose transpose is `transpose(ct, aux)`.

  Rounding has the derivative zero, and a sum over devices has two conventions. With replication
  checks a cotangent of an equal value is equal on all devices by type. Without them, and under
  vmap, the transpose of a sum is the sum of the cotangents. `transpose` follows the one in force.

  JAX 0.10 does not bind the axis in the backward pass of a `jax.vmap(axis_name=...)` that is
  differentiated from outside, so that raises the error of an unbound axis.

  `x` must be typed as differing already: the transpose of that cast is then JAX's own. `aux` (a
  key, a state) gets no derivative.
  """
  return op(x, aux)


def _forward(op, transpose, x, aux):
  return straight_through(op, transpose, x, aux), aux


def _backward(op, transpose, aux, ct):
  return transpose(ct, aux), None


straight_through.defvjp(_forward, _backward)


def backward_key(key: jax.Array | None) -> jax.Array | None:
  """A key whose noise is independent of that of the forward pass; None stays None."""
  return None if key is None else jax.random.fold_in(key, _BACKWARD)


def as_differing(x: jax.Array, axis_name: str) -> jax.Array:
  """`x`, marked as differing over `axis_name` in whatever way is in force."""
  if _axes.is_manual(axis_name):
    return _axes.vary(x, axis_name)
  # Under vmap, all_to_all of a value without a batch axis is wrong (JAX 0.10): give it one. The
  # selection is the identity, and the compiler removes it.
  return jnp.where(jax.lax.axis_index(axis_name) >= 0, x, x)


def is_checked(axis_name: str) -> bool:
  """Whether types record variation over `axis_name` (shard_map with check_vma=True)."""
  return axis_name in _axes.varying_axes(_axes.vary(jnp.zeros(()), axis_name))
