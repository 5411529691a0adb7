"""What the compressed means share: operands, random keys, and the cases without a wire."""

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.compressors import Compressor


def as_differing(x: jax.Array, axis_name: str) -> jax.Array:
  """`x`, marked as differing over `axis_name` in whatever way is in force."""
  if _axes.is_manual(axis_name):
    return _axes.vary(x, axis_name)
  # Under vmap, all_to_all of a value without a batch axis is wrong (JAX 0.10): give it one. The
  # selection is the identity, and the compiler removes it.
  return jnp.where(jax.lax.axis_index(axis_name) >= 0, x, x)


def hop_key(key: jax.Array | None, axis_name: str, hop: int) -> jax.Array | None:
  """A key for this device and this hop, independent of all others; None stays None."""
  if key is None:
    return None
  return jax.random.fold_in(jax.random.fold_in(key, jax.lax.axis_index(axis_name)), hop)


def nothing_to_send(
  x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """One device, or no elements: the mean is `x` itself, typed as equal, and the error zero."""
  jax.eval_shape(compressor.compress, key, x)  # the same errors as with more devices
  x = x.astype(jnp.float32)
  return jax.lax.pmean(x, axis_name), jnp.zeros_like(x)


def check_axis_size(axis_size: int) -> None:
  """Raises ValueError unless `axis_size` is a positive number."""
  if axis_size < 1:
    raise ValueError(f"`axis_size` must be at least 1, got {axis_size}.")
