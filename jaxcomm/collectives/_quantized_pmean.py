"""Mean with integers on the wire."""

import math
from typing import Any

import jax

from jaxcomm import _axes
from jaxcomm.collectives._common import check_axis_size
from jaxcomm.collectives._two_hop import compressed_pmean, compressed_pmean_bytes
from jaxcomm.compressors import BlockInt
from jaxcomm.compressors._base import check_float


def quantized_pmean(
  x: jax.Array,
  axis_name: str,
  *,
  bits: int | None = 8,
  block_size: int = 256,
  rounding: Any = "nearest",
  key: jax.Array | None = None,
) -> jax.Array:
  """Mean of `x` over `axis_name` with 8-bit or 4-bit block integers on both hops.

  `compressed_pmean` with `BlockInt(bits, block_size, rounding)`; see there for how it travels, and
  for its derivative, which is that of `jax.lax.pmean`.

  Wire: `quantized_pmean_bytes` forward; backward none (with replication checks) or the same again.

  Args:
    x: any shape, floating-point dtype, inside `jax.shard_map` or `jax.vmap(axis_name=...)`.
    axis_name: one bound axis.
    bits: 8, 4, or None for the exact `jax.lax.pmean`, summed in float32.
    block_size: elements per float32 scale, at least 8; even for 4 bits.
    rounding: "nearest" or "stochastic".
    key: for stochastic rounding, equal on all devices.

  Returns:
    The mean, in the shape and dtype of `x`, equal on all devices bit for bit.

  Raises:
    ValueError: an argument outside these rules, or `axis_name` is unbound.

  Source: ZeRO++ (arXiv 2306.10209, section 3.3), with a second quantized hop.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_pmean
  >>> x = jnp.asarray([[127.0, 254.0], [127.0, 0.0]])
  >>> jax.vmap(lambda v: quantized_pmean(v, "data", bits=8), axis_name="data")(x).tolist()
  [[127.0, 127.0], [127.0, 127.0]]
  """
  compressor = _compressor(bits, block_size, rounding)
  if compressor is not None:
    return compressed_pmean(x, axis_name, compressor, key=key)
  _axes.axis_size(axis_name)  # raises if unbound
  check_float(x)
  return _axes.pmean_f32(x, axis_name)


def _compressor(bits: int | None, block_size: int, rounding: Any) -> BlockInt | None:
  if bits not in (4, 8, None):
    raise ValueError(f"`bits` must be 4, 8 or None, got {bits!r}.")
  return None if bits is None else BlockInt(bits, block_size, rounding)


def quantized_pmean_bytes(
  shape: Any, axis_size: int, *, bits: int | None = 8, block_size: int = 256
) -> int:
  """Bytes that one device sends in `quantized_pmean` of an array of `shape`, forward.

  With d elements, N devices and chunks of C = ceil(d / N): 2 (N - 1) (ceil(C bits / 8) +
  4 ceil(C / block_size)); for `bits=None`, a ring all-reduce of float32, 8 d (N - 1) / N rounded
  up.

  >>> from jaxcomm.collectives import quantized_pmean_bytes
  >>> [quantized_pmean_bytes((4096,), 8, bits=bits) for bits in (None, 8, 4)]
  [28672, 7280, 3696]
  """
  compressor = _compressor(bits, block_size, "nearest")
  if compressor is not None:
    return compressed_pmean_bytes(shape, axis_size, compressor)
  check_axis_size(axis_size)
  return -(-8 * math.prod(shape) * (axis_size - 1) // axis_size)
