"""Mean over an axis of what any compressor makes of the contributions, in two hops or one."""

from typing import Any

import jax

from jaxcomm.collectives._all_reduce import (
  Algorithm,
  all_reduce,
  all_reduce_bytes,
  reduce_with_error,
)
from jaxcomm.collectives._common import check_input
from jaxcomm.collectives._options import Wire
from jaxcomm.collectives._straight_through import as_differing
from jaxcomm.compressors import Compressor


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
    key: equal on all devices; each device and hop folds in its own number, unless the compressor
      has a `shared_key`. Needed for compressors that draw random numbers only.

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
  return _pmean(x, axis_name, compressor, key, "two_hop")


def allgather_pmean(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> jax.Array:
  """`compressed_pmean` with one rounding: every device sends its whole payload to every other.

  All decode the same N payloads of the size of `x` and average them in float32 in the order of the
  ranks.

  Wire: (N - 1) payload_bytes(x.shape) sent per device, N / 2 times that of two hops: for N = 2, or
  for compressors whose rounding is coarse. All else as `compressed_pmean`.
  """
  return _pmean(x, axis_name, compressor, key, "all_gather")


def _pmean(
  x: jax.Array, axis_name: str, compressor: Compressor, key: Any, algorithm: Algorithm
) -> jax.Array:
  check_input(x, axis_name)
  wire = Wire(compressor, compressor)
  x = as_differing(x, axis_name)
  return all_reduce(x, axis_name, wire, key, mean=True, algorithm=algorithm)


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
  return _with_error(x, axis_name, compressor, key, "two_hop")


def allgather_pmean_with_error(
  x: jax.Array, axis_name: str, compressor: Compressor, *, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """`allgather_pmean` and what its rounding lost, error_i = x_i - D(C(x_i)).

  All else as `compressed_pmean_with_error`.
  """
  return _with_error(x, axis_name, compressor, key, "all_gather")


def _with_error(
  x: jax.Array, axis_name: str, compressor: Compressor, key: Any, algorithm: Algorithm
) -> tuple[jax.Array, jax.Array]:
  check_input(x, axis_name)
  x = as_differing(jax.lax.stop_gradient(x), axis_name)
  return reduce_with_error(x, axis_name, compressor, key, mean=True, algorithm=algorithm)


def compressed_pmean_bytes(shape: Any, axis_size: int, compressor: Compressor) -> int:
  """Bytes that one device sends in `compressed_pmean` of an array of `shape`.

  2 (N - 1) payload_bytes((ceil(d / N),)): both hops send one chunk's payload to each of the N - 1
  other devices.

  >>> from jaxcomm.collectives import compressed_pmean_bytes
  >>> from jaxcomm.compressors import int4
  >>> compressed_pmean_bytes((1024,), 4, int4(block_size=256))
  792
  """
  return all_reduce_bytes(shape, axis_size, compressor, "two_hop")


def allgather_pmean_bytes(shape: Any, axis_size: int, compressor: Compressor) -> int:
  """Bytes that one device sends in `allgather_pmean`: (N - 1) payload_bytes(shape).

  >>> from jaxcomm.collectives import allgather_pmean_bytes
  >>> from jaxcomm.compressors import int4
  >>> allgather_pmean_bytes((1024,), 4, int4(block_size=256))
  1584
  """
  return all_reduce_bytes(shape, axis_size, compressor, "all_gather")
