"""Two-hop compressed mean: reduce-scatter by all_to_all, then all_gather, payloads on both.

Letters: N devices on the axis, C elements per chunk. Device i owns chunk i.
"""

import math
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


def compressed_pmean(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> jax.Array:
  """Mean of `x` over `axis_name`; compressed payloads are all that crosses the wire.

  The flattened `x` is cut into N chunks of C = ceil(d / N) elements. Each device compresses its
  N chunks and sends chunk j to device j (all_to_all); the owner decodes and averages them in
  float32 in the order of the ranks, compresses the mean, and sends it to all (all_gather). All
  devices decode the same payloads, so the result is equal bit for bit, and `jax.shard_map` types
  it as equal over `axis_name`. Every contribution is rounded once, the mean once more.

  Wire: 2 (N - 1) payload_bytes((C,)) sent per device, see `compressed_pmean_bytes`. On one device
  nothing is sent and nothing is rounded: the result is `x`.

  Rounding has the derivative zero; this function takes that of `jax.lax.pmean` (straight
  through), in the convention in force. With replication checks (`jax.shard_map(check_vma=True)`)
  the cotangent is equal on all devices and each gets its N-th part: nothing crosses the wire.
  Without checks, and under `jax.vmap`, the transpose of a sum is the sum of the cotangents, so
  their mean crosses the wire, by this same function. `jax.grad` may stand inside or outside of
  `jax.shard_map`, but only inside of `jax.vmap(axis_name=...)`.

  Args:
    x: any shape, floating-point dtype. Works inside `jax.shard_map` (with or without replication
      checks) and inside `jax.vmap(axis_name=...)`, with the same bits.
    axis_name: one bound axis.
    compressor: see `jaxcomm.compressors`.
    key: equal on all devices; each device and hop folds in its own number. Needed for stochastic
      rounding only.

  Returns:
    The mean, in the shape and dtype of `x`.

  Raises:
    ValueError: `axis_name` is unbound (also if `jax.grad` stands outside of `jax.vmap`), `x` is not
      floating point, or the key is missing.

  Source: ZeRO++ (arXiv 2306.10209, section 3.3), with a second compressed hop.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import compressed_pmean
  >>> from jaxcomm.compressors import int8
  >>> x = jnp.asarray([[127.0, 254.0], [127.0, 0.0]])
  >>> jax.vmap(lambda v: compressed_pmean(v, "data", int8()), axis_name="data")(x).tolist()
  [[127.0, 127.0], [127.0, 127.0]]
  """
  _axes.axis_size(axis_name)  # raises if unbound
  return straight_through(_mean, axis_name, compressor, as_differing(x, axis_name), key)


def compressed_pmean_with_error(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """`compressed_pmean` and what its two roundings lost, for error feedback.

  With D(C(.)) for compressing and decompressing, the error of device i is x_i - D(C(x_i)) on all
  chunks, plus N (m - D(C(m))) on the chunk that it owns, where m is the mean of that chunk before
  the second hop. So mean_i(error_i) = mean_i(x_i) - result: a device that adds its error to its
  next input loses nothing, in either hop.

  Wire, arguments and errors raised: as `compressed_pmean`. For use outside of derivatives: this
  function stops gradients.

  Returns:
    (mean, error), both float32 in the shape of `x`; `mean` is equal on all devices, `error`
    differs. On one device the error is zero. Where N is not a power of two, the last bit of
    `error` depends on how the compiler rounds the mean (not that of `mean`).

  Source: server and worker error of 1-bit Adam (arXiv 2102.02888, algorithm 1), in one buffer.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import compressed_pmean_with_error
  >>> from jaxcomm.compressors import int8
  >>> x = jnp.asarray([[127.0, 1.25], [127.0, 3.0]])
  >>> mean, error = jax.vmap(
  ...   lambda v: compressed_pmean_with_error(v, "data", int8(block_size=8)), axis_name="data"
  ... )(x)
  >>> bool(jnp.allclose(error.mean(0), x.mean(0) - mean[0], atol=1e-6))
  True
  """
  _axes.axis_size(axis_name)  # raises if unbound
  x = as_differing(jax.lax.stop_gradient(x), axis_name)
  return _two_hop(x, axis_name, compressor, key)


def _mean(x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None) -> jax.Array:
  return _two_hop(x, axis_name, compressor, key)[0].astype(x.dtype)


def _two_hop(
  x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """(mean, error), float32; XLA drops the error where it is not used."""
  check_float(x)
  n = _axes.axis_size(axis_name)
  encode, decode = wire_codec(compressor, (-(-x.size // n),), key)
  if n == 1 or x.size == 0:
    return nothing_to_send(x, axis_name)
  with jax.named_scope("compressed_pmean"):
    x_NC = _to_chunks(x, n)
    sent = _encode_rows(encode, hop_key(key, axis_name, 0), x_NC)
    received = jax.lax.all_to_all(sent, axis_name, 0, 0)
    mean_C = mean_in_order(decode, received)

    sent_mean = encode(hop_key(key, axis_name, 1), mean_C)
    gathered = _axes.all_gather_equal(sent_mean, axis_name)
    mean = _from_chunks(jax.vmap(decode)(gathered), x.shape)

    lost_C = n * (mean_C - decode(sent_mean))
    owned_N1 = (jnp.arange(n) == jax.lax.axis_index(axis_name))[:, None]
    error_NC = x_NC - jax.vmap(decode)(sent) + jnp.where(owned_N1, lost_C[None], 0.0)
    return mean, _from_chunks(error_NC, x.shape)


def _encode_rows(encode, key: jax.Array | None, x_NC: jax.Array) -> jax.Array:
  if key is None:
    return jax.vmap(lambda row: encode(None, row))(x_NC)
  return jax.vmap(encode)(jax.random.split(key, x_NC.shape[0]), x_NC)


def _to_chunks(x: jax.Array, n: int) -> jax.Array:
  flat = x.reshape(-1).astype(jnp.float32)
  return jnp.pad(flat, (0, -flat.size % n)).reshape(n, -1)


def _from_chunks(x_NC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return x_NC.reshape(-1)[: math.prod(shape)].reshape(shape)


def compressed_pmean_bytes(shape: Any, axis_size: int, compressor: Compressor) -> int:
  """Bytes that one device sends in `compressed_pmean` of an array of `shape`.

  2 (N - 1) payload_bytes((ceil(d / N),)): both hops send one chunk's payload to each of the N - 1
  other devices.

  >>> from jaxcomm.collectives import compressed_pmean_bytes
  >>> from jaxcomm.compressors import int4
  >>> compressed_pmean_bytes((1024,), 4, int4(block_size=256))
  792
  """
  check_axis_size(axis_size)
  size = math.prod(shape)
  if axis_size == 1 or size == 0:
    return 0
  return 2 * (axis_size - 1) * compressor.payload_bytes((-(-size // axis_size),))
