"""One exchange of compressed rows: keys, the sum in a fixed order, and the two reduce-scatters.

Letters: N devices on the axis, C elements per chunk. Row j of `x_NC` is for device j.
"""

from collections.abc import Callable

import jax

from jaxcomm import _axes
from jaxcomm.collectives._common import wire_codec
from jaxcomm.compressors import Compressor
from jaxcomm.compressors._base import Key


def hop_key(compressor: Compressor, key: Key, axis_name: str, hop: int | jax.Array) -> Key:
  """A key for this hop and, unless all devices must draw the same, this device."""
  if key is None:
    return None
  if not compressor.shared_key:
    key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
  return jax.random.fold_in(key, hop)


def row_keys(key: Key, num_rows: int) -> Key:
  """A key for every row; None stays None."""
  return None if key is None else jax.random.split(key, num_rows)


def sum_in_order(decode: Callable[[jax.Array], jax.Array], wire_rows: jax.Array) -> jax.Array:
  """Float32 sum of the decoded rows, added from first to last, one decoded row at a time.

  A reduction over the row axis leaves the order to the compiler, and two programs can then differ
  in the last bit.
  """
  n = wire_rows.shape[0]

  def add(i, total):
    return total + decode(jax.lax.dynamic_index_in_dim(wire_rows, i, keepdims=False))

  return jax.lax.fori_loop(1, n, add, decode(wire_rows[0]), unroll=min(n - 1, 8))


def one_shot(
  x_NC: jax.Array, axis_name: str, compressor: Compressor, key: Key
) -> tuple[jax.Array, jax.Array]:
  """Reduce-scatter by all_to_all: every contribution is rounded once.

  Returns:
    (float32[C], the sum of this device's row over all devices; float32[N, C], what the others
    decode of `x_NC`). XLA drops the second where it is not used.
  """
  encode, decode = wire_codec(compressor, x_NC.shape[1:], key)
  keys_N = row_keys(hop_key(compressor, key, axis_name, 0), x_NC.shape[0])
  sent = jax.vmap(encode)(keys_N, x_NC)
  received = jax.lax.all_to_all(sent, axis_name, 0, 0)
  own_key = None if keys_N is None else keys_N[jax.lax.axis_index(axis_name)]
  return sum_in_order(lambda row: decode(own_key, row), received), jax.vmap(decode)(keys_N, sent)


def ring(x_NC: jax.Array, axis_name: str, compressor: Compressor, key: Key) -> jax.Array:
  """Reduce-scatter by N - 1 steps around a ring: float32[C], the sum of this device's row.

  The partial sum of row j starts on device j + 1 and ends on device j. Every step rounds the
  partial sum, every device adds its own contribution without rounding.
  """
  encode, decode = wire_codec(compressor, x_NC.shape[1:], key)
  n = _axes.axis_size(axis_name)
  rank = jax.lax.axis_index(axis_name)
  next_in_ring = [(i, (i + 1) % n) for i in range(n)]

  def own(row):
    return jax.lax.dynamic_index_in_dim(x_NC, row % n, keepdims=False)

  def step(i, partial_C):
    step_key = hop_key(compressor, key, axis_name, i)
    received = jax.lax.ppermute(encode(step_key, partial_C), axis_name, next_in_ring)
    return decode(step_key, received) + own(rank - 2 - i)

  return jax.lax.fori_loop(0, n - 1, step, own(rank - 1))
