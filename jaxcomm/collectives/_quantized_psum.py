"""Sum and mean over an axis with integers or float8 on the wire."""

from typing import Any, Literal

import jax

from jaxcomm.collectives._all_reduce import all_reduce, all_reduce_bytes
from jaxcomm.collectives._common import check_input
from jaxcomm.collectives._options import BackwardBits, Bits, compressor_of, wire_of
from jaxcomm.collectives._straight_through import as_differing


def quantized_psum(
  x: jax.Array,
  axis_name: str,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
) -> jax.Array:
  """Sum of `x` over `axis_name` in two hops: every contribution is rounded once, the sum once more.

  As `quantized_pmean` without the division. Integers are never added in their own width.

  Wire: `quantized_psum_bytes` forward; backward none (with replication checks, where the cotangent
  is equal on all devices) or the same with `backward_bits`.

  Arguments, result and errors raised: as `quantized_pmean`. For other bits in each hop, call
  `quantized_psum_scatter` and `quantized_all_gather`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_psum
  >>> x = jnp.asarray([[127.0, 254.0], [127.0, 0.0]])
  >>> jax.vmap(lambda v: quantized_psum(v, "data"), axis_name="data")(x).tolist()
  [[254.0, 254.0], [254.0, 254.0]]
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  check_input(x, axis_name)
  return all_reduce(as_differing(x, axis_name), axis_name, wire, key, mean=False)


def quantized_pmean(
  x: jax.Array,
  axis_name: str,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
) -> jax.Array:
  """Mean of `x` over `axis_name` with 8-bit or 4-bit blocks, or float8, on both hops.

  `compressed_pmean` with the compressor of these arguments; see there for how it travels, and for
  its derivative, which is that of `jax.lax.pmean`.

  Wire: `quantized_pmean_bytes` forward; backward none (with replication checks) or the same with
  `backward_bits`.

  Args:
    x: any shape, floating-point dtype, inside `jax.shard_map` or `jax.vmap(axis_name=...)`.
    axis_name: one bound axis.
    bits: 8, 4, "fp8", or None for the exact `jax.lax.pmean`, summed in float32.
    block_size, rounding, key, hadamard, backward_bits: as in `quantized_all_gather`.

  Returns:
    The mean, in the shape and dtype of `x`, equal on all devices bit for bit, and typed so.

  Raises:
    ValueError: an argument outside these rules, an unbound axis, a missing key.

  Source: ZeRO++ (arXiv 2306.10209, section 3.3), with a second quantized hop.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_pmean
  >>> x = jnp.asarray([[127.0, 254.0], [127.0, 0.0]])
  >>> jax.vmap(lambda v: quantized_pmean(v, "data", bits=8), axis_name="data")(x).tolist()
  [[127.0, 127.0], [127.0, 127.0]]
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  check_input(x, axis_name)
  return all_reduce(as_differing(x, axis_name), axis_name, wire, key, mean=True)


def quantized_psum_bytes(
  shape: Any,
  axis_size: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  hadamard: int | None = None,
) -> int:
  """Bytes that one device sends in `quantized_psum` of an array of `shape`, forward.

  With d elements and chunks of C = ceil(d / N), rounded up to whole groups of `hadamard`:
  2 (N - 1) (ceil(C bits / 8) + 4 ceil(C / block_size)); for `bits=None`, a ring all-reduce of
  float32, 8 d (N - 1) / N rounded up.

  >>> from jaxcomm.collectives import quantized_psum_bytes
  >>> [quantized_psum_bytes((4096,), 8, bits=bits) for bits in (None, 8, 4)]
  [28672, 7280, 3696]
  """
  compressor = compressor_of(bits, block_size, hadamard=hadamard)
  return all_reduce_bytes(shape, axis_size, compressor)


def quantized_pmean_bytes(
  shape: Any,
  axis_size: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  hadamard: int | None = None,
) -> int:
  """Bytes that one device sends in `quantized_pmean`: those of `quantized_psum_bytes`.

  >>> from jaxcomm.collectives import quantized_pmean_bytes
  >>> quantized_pmean_bytes((4096,), 8)
  7280
  """
  return quantized_psum_bytes(shape, axis_size, bits=bits, block_size=block_size, hadamard=hadamard)
