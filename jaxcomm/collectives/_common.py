"""What the compressed means share: keys, the wire, and the mean in a fixed order."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm.compressors import Compressor, Payload

Encode = Callable[[jax.Array | None, jax.Array], jax.Array]
Decode = Callable[[jax.Array], jax.Array]


def hop_key(key: jax.Array | None, axis_name: str, hop: int) -> jax.Array | None:
  """A key for this device and this hop, independent of all others; None stays None."""
  if key is None:
    return None
  return jax.random.fold_in(jax.random.fold_in(key, jax.lax.axis_index(axis_name)), hop)


def wire_codec(
  compressor: Compressor, shape: tuple[int, ...], key: jax.Array | None
) -> tuple[Encode, Decode]:
  """(encode, decode) between arrays of `shape` and one wire buffer, so a hop is one collective.

  The buffer holds the arrays of the payload end to end as uint8[payload_bytes]; a payload of one
  array goes as it is. `key` says only whether there is one.
  """
  like = jax.eval_shape(compressor.compress, key, jax.ShapeDtypeStruct(shape, jnp.float32))

  def encode(key, x):
    return _to_wire(compressor.compress(key, x))

  def decode(wire):
    return compressor.decompress(_from_wire(wire, like), shape)

  return encode, decode


def _to_wire(payload: Payload) -> jax.Array:
  leaves = jax.tree.leaves(payload)
  if len(leaves) == 1:
    return leaves[0]
  return jnp.concatenate([jax.lax.bitcast_convert_type(a, jnp.uint8).reshape(-1) for a in leaves])


def _from_wire(wire: jax.Array, like: Payload) -> Payload:
  leaves, structure = jax.tree.flatten(like)
  if len(leaves) == 1:
    return jax.tree.unflatten(structure, [wire])
  out, start = [], 0
  for leaf in leaves:
    width = leaf.dtype.itemsize
    end = start + math.prod(leaf.shape) * width
    shape = leaf.shape if width == 1 else (*leaf.shape, width)
    out.append(jax.lax.bitcast_convert_type(wire[start:end].reshape(shape), leaf.dtype))
    start = end
  return jax.tree.unflatten(structure, out)


def mean_in_order(decode: Decode, wire_rows: jax.Array) -> jax.Array:
  """Float32 mean of the decoded rows, added from first to last, one decoded row at a time.

  A reduction over the row axis leaves the order to the compiler, and two programs can then differ
  in the last bit.
  """
  n = wire_rows.shape[0]

  def add(i, total):
    return total + decode(jax.lax.dynamic_index_in_dim(wire_rows, i, keepdims=False))

  total = jax.lax.fori_loop(1, n, add, decode(wire_rows[0]), unroll=min(n - 1, 8))
  return total * (1 / n)


def nothing_to_send(x: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
  """One device, or no elements: the mean is `x` itself, typed as equal, and the error zero."""
  x = x.astype(jnp.float32)
  return jax.lax.pmean(x, axis_name), jnp.zeros_like(x)


def check_axis_size(axis_size: int) -> None:
  """Raises ValueError unless `axis_size` is a positive number."""
  if axis_size < 1:
    raise ValueError(f"`axis_size` must be at least 1, got {axis_size}.")
