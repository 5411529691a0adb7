"""One-hop compressed mean: every device sends its whole payload to every other device."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives._common import (
  check_axis_size,
  hop_key,
  mean_in_order,
  nothing_to_send,
  wire_codec,
)
from jaxcomm.collectives._straight_through import as_differing, straight_through
from jaxcomm.compressors import Compressor
from jaxcomm.compressors._base import check_float


def allgather_pmean(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> jax.Array:
  """Mean of `x` over `axis_name` with one rounding, by an all_gather of payloads.

  Every device decodes the same N payloads and averages them in float32 in the order of the ranks:
  the result is equal bit for bit on all devices and typed so under `jax.shard_map`. Each device
  decodes N arrays of the size of `x`.

  Wire: (N - 1) payload_bytes(x.shape) sent per device. Against `compressed_pmean` that is N / 2
  times the bytes and one rounding in place of two: use it for N = 2, or for compressors whose
  rounding is coarse. On one device nothing is sent and nothing is rounded.

  Arguments, result, derivative and errors raised: as `compressed_pmean`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import allgather_pmean
  >>> from jaxcomm.compressors import e3m0
  >>> x = jnp.asarray([[8.0, 1.0], [4.0, 1.0]])
  >>> jax.vmap(lambda v: allgather_pmean(v, "data", e3m0()), axis_name="data")(x).tolist()
  [[6.0, 1.0], [6.0, 1.0]]
  """
  _axes.axis_size(axis_name)  # raises if unbound
  return straight_through(_mean, axis_name, compressor, as_differing(x, axis_name), key)


def allgather_pmean_with_error(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """`allgather_pmean` and what its rounding lost: error_i = x_i - D(C(x_i)).

  mean_i(error_i) = mean_i(x_i) - result. Wire, arguments and errors raised: as `allgather_pmean`.
  For use outside of derivatives: this function stops gradients.

  Returns:
    (mean, error), both float32 in the shape of `x`; `mean` is equal on all devices, `error`
    differs. On one device the error is zero.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import allgather_pmean_with_error
  >>> from jaxcomm.compressors import e3m0
  >>> x = jnp.asarray([[8.0, 3.0], [4.0, 1.0]])
  >>> mean, error = jax.vmap(
  ...   lambda v: allgather_pmean_with_error(v, "data", e3m0()), axis_name="data"
  ... )(x)
  >>> mean[0].tolist(), error.tolist()
  ([6.0, 2.5], [[0.0, -1.0], [0.0, 0.0]])
  """
  _axes.axis_size(axis_name)  # raises if unbound
  x = as_differing(jax.lax.stop_gradient(x), axis_name)
  return _one_hop(x, axis_name, compressor, key)


def _mean(x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None) -> jax.Array:
  return _one_hop(x, axis_name, compressor, key)[0].astype(x.dtype)


def _one_hop(
  x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """(mean, error), float32; XLA drops the error where it is not used."""
  check_float(x)
  encode, decode = wire_codec(compressor, x.shape, key)
  if _axes.axis_size(axis_name) == 1 or x.size == 0:
    return nothing_to_send(x, axis_name)
  with jax.named_scope("allgather_pmean"):
    sent = encode(hop_key(key, axis_name, 0), x)
    mean = mean_in_order(decode, _axes.all_gather_equal(sent, axis_name))
    return mean, x.astype(jnp.float32) - decode(sent)


def allgather_pmean_bytes(shape: Any, axis_size: int, compressor: Compressor) -> int:
  """Bytes that one device sends in `allgather_pmean`: (N - 1) payload_bytes(shape).

  >>> from jaxcomm.collectives import allgather_pmean_bytes
  >>> from jaxcomm.compressors import int4
  >>> allgather_pmean_bytes((1024,), 4, int4(block_size=256))
  1584
  """
  check_axis_size(axis_size)
  return (axis_size - 1) * compressor.payload_bytes(tuple(shape))
