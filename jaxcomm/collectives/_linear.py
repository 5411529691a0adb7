"""The linear collectives with compressed payloads, each with its transpose.

all_gather <-> psum_scatter, all_to_all <-> all_to_all with the axes swapped. Both directions have
a compressor of their own (`Wire`). Inputs must be typed as differing, see `as_differing`.

Letters: N devices on the axis, C elements per chunk, D elements per row.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives import _hops
from jaxcomm.collectives._common import wire_codec
from jaxcomm.collectives._layout import join, split
from jaxcomm.collectives._options import Wire
from jaxcomm.collectives._straight_through import (
  as_differing,
  backward_key,
  is_checked,
  straight_through,
)
from jaxcomm.compressors import Compressor
from jaxcomm.compressors._base import Key

Algorithm = Literal["one_shot", "ring"]


def all_gather(
  x: jax.Array,
  axis_name: str,
  wire: Wire,
  key: Key,
  *,
  axis: int,
  tiled: bool,
  to: Literal["varying", "invarying"] = "varying",
) -> jax.Array:
  """As `quantized_all_gather`."""
  equal = to == "invarying" and is_checked(axis_name)

  def gather(x, key):
    return _gather(x, axis_name, wire.forward, key, axis, tiled, equal)

  def transpose(ct, key):
    if equal:  # every device has the whole cotangent
      ct = as_differing(ct, axis_name)
      ct_N = split(ct, _axes.axis_size(axis_name), axis, "axis", tiled=tiled)
      return ct_N[jax.lax.axis_index(axis_name)]
    ct, key = as_differing(ct, axis_name), backward_key(key)
    return psum_scatter(ct, axis_name, wire.transposed, key, axis=axis, tiled=tiled)

  return gather(x, key) if wire.exact else straight_through(gather, transpose, x, key)


def _gather(
  x: jax.Array,
  axis_name: str,
  compressor: Compressor | None,
  key: Key,
  axis: int,
  tiled: bool,
  equal: bool,
) -> jax.Array:
  to = "invarying" if equal else "varying"
  if compressor is None:
    return jax.lax.all_gather(x, axis_name, axis=axis, tiled=tiled, to=to)
  encode, decode = wire_codec(compressor, x.shape, key)
  if _nothing_to_send(x, axis_name):
    return jax.lax.all_gather(x, axis_name, axis=axis, tiled=tiled, to=to)
  with jax.named_scope("quantized_all_gather"):
    own_key = _hops.hop_key(compressor, key, axis_name, 0)
    received = _axes.all_gather(encode(own_key, x), axis_name, to=to)
    x_N = jax.vmap(lambda row: decode(own_key, row))(received)
    return join(x_N.astype(x.dtype), axis, "axis", tiled=tiled)


def psum_scatter(
  x: jax.Array,
  axis_name: str,
  wire: Wire,
  key: Key,
  *,
  axis: int,
  tiled: bool,
  algorithm: Algorithm = "one_shot",
) -> jax.Array:
  """As `quantized_psum_scatter`."""
  size = x.shape[axis]

  def scatter(x, key):
    return _scatter(x, axis_name, wire.forward, key, axis, tiled, algorithm)

  def transpose(ct, key):
    ct, key = as_differing(ct, axis_name), backward_key(key)
    ct = all_gather(ct, axis_name, wire.transposed, key, axis=axis, tiled=tiled)
    return jax.lax.slice_in_dim(ct, 0, size, axis=axis)  # without the padding

  return scatter(x, key) if wire.exact else straight_through(scatter, transpose, x, key)


def _scatter(
  x: jax.Array,
  axis_name: str,
  compressor: Compressor | None,
  key: Key,
  axis: int,
  tiled: bool,
  algorithm: Algorithm,
) -> jax.Array:
  if algorithm == "one_shot":
    return scatter_with_error(x, axis_name, compressor, key, axis, tiled)[0].astype(x.dtype)
  x_N = _to_chunks(x, axis_name, compressor, key, axis, tiled)
  if compressor is None or _nothing_to_send(x, axis_name):
    return jax.lax.psum_scatter(x_N, axis_name).astype(x.dtype)
  with jax.named_scope("quantized_psum_scatter_ring"):
    total_C = _hops.ring(x_N.reshape(x_N.shape[0], -1), axis_name, compressor, key)
    return total_C.reshape(x_N.shape[1:]).astype(x.dtype)


def scatter_with_error(
  x: jax.Array, axis_name: str, compressor: Compressor | None, key: Key, axis: int, tiled: bool
) -> tuple[jax.Array, jax.Array]:
  """(one-shot sum of this device's chunk, what rounding lost of `x`), float32.

  XLA drops the second where it is not used.
  """
  x_N = _to_chunks(x, axis_name, compressor, key, axis, tiled)
  if compressor is None or _nothing_to_send(x, axis_name):
    return jax.lax.psum_scatter(x_N, axis_name), jnp.zeros(x.shape, jnp.float32)
  with jax.named_scope("quantized_psum_scatter"):
    total_C, kept_NC = _hops.one_shot(x_N.reshape(x_N.shape[0], -1), axis_name, compressor, key)
    lost = join(x_N - kept_NC.reshape(x_N.shape), axis, "scatter_dimension", tiled=tiled)
    return total_C.reshape(x_N.shape[1:]), jax.lax.slice_in_dim(lost, 0, x.shape[axis], axis=axis)


def _to_chunks(
  x: jax.Array, axis_name: str, compressor: Compressor | None, key: Key, axis: int, tiled: bool
) -> jax.Array:
  n = _axes.axis_size(axis_name)
  wide = x.astype(jnp.float32)
  x_N = split(wide, n, axis, "scatter_dimension", tiled=tiled, pad=True)
  if compressor is not None:
    wire_codec(compressor, x_N.shape[1:], key)  # raises if the key is missing
  return x_N


def _nothing_to_send(x: jax.Array, axis_name: str) -> bool:
  return _axes.axis_size(axis_name) == 1 or x.size == 0


def all_to_all(
  x: jax.Array,
  axis_name: str,
  wire: Wire,
  key: Key,
  *,
  split_axis: int,
  concat_axis: int,
  tiled: bool,
) -> jax.Array:
  """As `quantized_all_to_all`."""

  def exchange(x, key):
    n = _axes.axis_size(axis_name)
    x_N = split(x, n, split_axis, "split_axis", tiled=tiled)
    return join(
      _exchange(x_N, axis_name, wire.forward, key), concat_axis, "concat_axis", tiled=tiled
    )

  def transpose(ct, key):
    ct, key = as_differing(ct, axis_name), backward_key(key)
    axes = {"split_axis": concat_axis, "concat_axis": split_axis}
    return all_to_all(ct, axis_name, wire.transposed, key, **axes, tiled=tiled)

  return exchange(x, key) if wire.exact else straight_through(exchange, transpose, x, key)


def _exchange(x_N: jax.Array, axis_name: str, compressor: Compressor | None, key: Key) -> jax.Array:
  """Chunk j goes to device j: every row of the last axis is a message of its own."""
  if compressor is None:
    return jax.lax.all_to_all(x_N, axis_name, 0, 0)
  if compressor.shared_key:  # a row that arrives was not drawn with the key of that row here
    raise ValueError(f"`compressor` of an all_to_all must not need a shared key, got {compressor}.")
  n, width = x_N.shape[0], row_width(x_N.shape[1:])
  encode, decode = wire_codec(compressor, (width,), key)
  if _nothing_to_send(x_N, axis_name):
    return jax.lax.all_to_all(x_N, axis_name, 0, 0)
  with jax.named_scope("quantized_all_to_all"):
    x_RD = x_N.reshape(-1, width)
    keys_R = _hops.row_keys(_hops.hop_key(compressor, key, axis_name, 0), x_RD.shape[0])
    sent = jax.vmap(encode)(keys_R, x_RD)
    received = jax.lax.all_to_all(sent.reshape(n, -1, *sent.shape[1:]), axis_name, 0, 0)
    got_RD = jax.vmap(lambda row: decode(None, row))(received.reshape(sent.shape))
    return got_RD.reshape(x_N.shape).astype(x_N.dtype)


def row_width(chunk: tuple[int, ...]) -> int:
  """Elements of a row that all_to_all compresses by itself."""
  return chunk[-1] if chunk else 1
