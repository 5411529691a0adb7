"""Sum and mean over an axis with compressed payloads: two hops or one, and their derivative.

Letters: N devices on the axis, C elements per chunk. Device i owns chunk i.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives import _hops
from jaxcomm.collectives._common import check_axis_size, wire_codec
from jaxcomm.collectives._layout import split
from jaxcomm.collectives._options import Wire
from jaxcomm.collectives._straight_through import (
  as_differing,
  backward_key,
  is_checked,
  straight_through,
)
from jaxcomm.compressors import Compressor
from jaxcomm.compressors._base import Key

Algorithm = Literal["two_hop", "all_gather"]


def all_reduce(
  x: jax.Array,
  axis_name: str,
  wire: Wire,
  key: Key,
  *,
  mean: bool,
  algorithm: Algorithm = "two_hop",
) -> jax.Array:
  """Sum or mean in the dtype of `x`, with the derivative of `jax.lax.psum` or `jax.lax.pmean`.

  With replication checks each device gets the (equal) cotangent, of a mean its N-th part. Without
  them the same sum or mean of the cotangents crosses the wire.
  """

  def reduce(x, key):
    if wire.forward is None:
      return exact_reduce(x, axis_name, mean=mean).astype(x.dtype)
    options = {"mean": mean, "algorithm": algorithm}
    return reduce_with_error(x, axis_name, wire.forward, key, **options)[0].astype(x.dtype)

  def transpose(ct, key):
    if is_checked(axis_name):
      ct = ct / _axes.axis_size(axis_name) if mean else ct
      return _axes.vary(ct, axis_name)
    ct, key = as_differing(ct, axis_name), backward_key(key)
    return all_reduce(ct, axis_name, wire.transposed, key, mean=mean, algorithm=algorithm)

  return reduce(x, key) if wire.exact else straight_through(reduce, transpose, x, key)


def exact_reduce(x: jax.Array, axis_name: str, *, mean: bool) -> jax.Array:
  """Float32 sum or mean, typed as equal, by `jax.lax`."""
  reduce = jax.lax.pmean if mean else jax.lax.psum
  return reduce(x.astype(jnp.float32), axis_name)


def reduce_with_error(
  x: jax.Array,
  axis_name: str,
  compressor: Compressor,
  key: Key,
  *,
  mean: bool,
  algorithm: Algorithm,
) -> tuple[jax.Array, jax.Array]:
  """(result, error), float32; XLA drops the error where it is not used."""
  n = _axes.axis_size(axis_name)
  hops = {"two_hop": _two_hop, "all_gather": _one_hop}[algorithm]
  wire_codec(compressor, x.shape, key)  # raises if the key is missing
  x = x.astype(jnp.float32)
  if n == 1 or x.size == 0:
    return exact_reduce(x, axis_name, mean=mean), jnp.zeros_like(x)
  with jax.named_scope(f"quantized_{'pmean' if mean else 'psum'}_{algorithm}"):
    return hops(x, axis_name, compressor, key, 1 / n if mean else 1.0)


def _one_hop(
  x: jax.Array, axis_name: str, compressor: Compressor, key: Key, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Every device sends its whole payload to every other device: one rounding."""
  encode, decode = wire_codec(compressor, x.shape, key)
  own_key = _hops.hop_key(compressor, key, axis_name, 0)
  sent = encode(own_key, x)
  gathered = _axes.all_gather_equal(sent, axis_name)
  # Where `decode` reads the key, it is that of all devices.
  total = _hops.sum_in_order(lambda row: decode(own_key, row), gathered)
  return total * scale, x - decode(own_key, sent)


def _two_hop(
  x: jax.Array, axis_name: str, compressor: Compressor, key: Key, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Reduce-scatter by all_to_all, then all_gather: two roundings.

  What the owner of a chunk loses in the second hop weighs 1 / scale in the sum of the inputs.
  """
  n = _axes.axis_size(axis_name)
  x_NC = split(x.reshape(-1), n, 0, "x", tiled=True, pad=True)
  total_C, kept_NC = _hops.one_shot(x_NC, axis_name, compressor, key)
  result_C = total_C * scale

  encode, decode = wire_codec(compressor, result_C.shape, key)
  own_key = _hops.hop_key(compressor, key, axis_name, 1)
  sent = encode(own_key, result_C)
  gathered = _axes.all_gather_equal(sent, axis_name)
  result = _from_chunks(jax.vmap(lambda row: decode(own_key, row))(gathered), x.shape)

  lost_C = round(1 / scale) * (result_C - decode(own_key, sent))
  owned_N1 = (jnp.arange(n) == jax.lax.axis_index(axis_name))[:, None]
  error_NC = x_NC - kept_NC + jnp.where(owned_N1, lost_C[None], 0.0)
  return result, _from_chunks(error_NC, x.shape)


def _from_chunks(x_NC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return x_NC.reshape(-1)[: math.prod(shape)].reshape(shape)


def check_algorithm(algorithm: Any) -> None:
  """Raises ValueError for a name that is not an algorithm of `compressed_pmean`."""
  if algorithm not in ("two_hop", "all_gather"):
    raise ValueError(f"`algorithm` must be 'two_hop' or 'all_gather', got {algorithm!r}.")


def all_reduce_bytes(
  shape: Any, axis_size: int, compressor: Compressor | None, algorithm: Algorithm = "two_hop"
) -> int:
  """Bytes that one device sends; exact is a ring all-reduce of float32, rounded up."""
  check_axis_size(axis_size)
  check_algorithm(algorithm)
  size, others = math.prod(shape), axis_size - 1
  if size == 0 or others == 0:
    return 0
  if compressor is None:
    return -(-8 * size * others // axis_size)
  if algorithm == "all_gather":
    return others * compressor.payload_bytes((size,))
  return 2 * others * compressor.payload_bytes((-(-size // axis_size),))
