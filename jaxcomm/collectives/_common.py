"""What the collectives share: checks of arguments, and the one buffer that crosses the wire."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.compressors import Compressor, Payload
from jaxcomm.compressors._base import check_float

Codec = Callable[[jax.Array | None, jax.Array], jax.Array]


def check_input(x: jax.Array, axis_name: str) -> int:
  """Number of devices on `axis_name`.

  Raises:
    ValueError: `axis_name` is unbound or more than one axis, or `x` is not floating point.
  """
  if isinstance(axis_name, (tuple, list)):
    raise ValueError(f"`axis_name` must be the name of one axis, got {axis_name!r}.")
  n = _axes.axis_size(axis_name)
  check_float(x)
  return n


def check_axis_size(axis_size: int) -> None:
  """Raises ValueError unless `axis_size` is a positive number."""
  if axis_size < 1:
    raise ValueError(f"`axis_size` must be at least 1, got {axis_size}.")


def wire_codec(
  compressor: Compressor, shape: tuple[int, ...], key: jax.Array | None
) -> tuple[Codec, Codec]:
  """(encode, decode) between arrays of `shape` and one wire buffer, so a hop is one collective.

  The buffer holds the arrays of the payload end to end as uint8[payload_bytes]; a payload of one
  array goes as it is. Here `key` says only whether there is one, and raises ValueError if it is
  missing. `encode` and `decode` take one as their first argument; `decode` ignores it unless
  `compressor.shared_key`.
  """
  like = _payload_like(compressor, tuple(shape), key is not None)

  def encode(key, x):
    # Without the barrier XLA may compress anew for every use of the message.
    return jax.lax.optimization_barrier(_to_wire(compressor.compress(key, x)))

  def decode(key, wire):
    key = key if compressor.shared_key else None
    return compressor.decompress(_from_wire(wire, like), shape, key=key)

  return encode, decode


@functools.lru_cache(maxsize=4096)
def _payload_like(compressor: Compressor, shape: tuple[int, ...], has_key: bool) -> Payload:
  """Shapes and dtypes of a payload. Kept: the layout and each program ask for the same ones."""
  key = jax.eval_shape(lambda: jax.random.key(0)) if has_key else None
  return jax.eval_shape(compressor.compress, key, jax.ShapeDtypeStruct(shape, jnp.float32))


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
