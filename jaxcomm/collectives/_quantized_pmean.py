"""Mean with integers on the wire, differentiable."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives._common import as_differing, check_axis_size
from jaxcomm.collectives._two_hop import compressed_pmean, compressed_pmean_bytes
from jaxcomm.compressors import BlockInt


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

  `compressed_pmean` with `BlockInt(bits, block_size, rounding)`, and with a derivative. Rounding
  has the derivative zero; this function takes that of `jax.lax.pmean` (straight through), in the
  convention in force. With replication checks (`jax.shard_map(check_vma=True)`) the cotangent is
  equal on all devices and each device gets its N-th part: nothing crosses the wire. Without
  checks, and under `jax.vmap`, the transpose of a sum is the sum of the cotangents, so their mean
  crosses the wire, with the same bits, block size and rounding as forward.

  Wire: `quantized_pmean_bytes` forward; backward none, or the same again.

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
  _axes.axis_size(axis_name)  # raises if unbound
  if compressor is None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")
    return _axes.pmean_f32(x, axis_name)
  # Cast outside the custom derivative: its transpose, a sum over the axis, is then JAX's own.
  return _mean(axis_name, compressor, as_differing(x, axis_name), key)


def _compressor(bits: int | None, block_size: int, rounding: Any) -> BlockInt | None:
  if bits not in (4, 8, None):
    raise ValueError(f"`bits` must be 4, 8 or None, got {bits!r}.")
  return None if bits is None else BlockInt(bits, block_size, rounding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mean(axis_name, compressor, x, key):
  return compressed_pmean(x, axis_name, compressor, key=key)


def _mean_fwd(axis_name, compressor, x, key):
  return _mean(axis_name, compressor, x, key), key


def _mean_bwd(axis_name, compressor, key, ct):
  if _is_checked(axis_name):
    # The output is equal everywhere by type, so is its cotangent.
    return _axes.vary(ct / _axes.axis_size(axis_name), axis_name), None
  # A key of its own: the noise of the backward pass is independent of that of the forward pass.
  key = None if key is None else jax.random.fold_in(key, 2)
  return _mean(axis_name, compressor, ct, key), None


_mean.defvjp(_mean_fwd, _mean_bwd)


def _is_checked(axis_name: str) -> bool:
  """Whether types record variation over `axis_name` (shard_map with check_vma=True)."""
  return axis_name in _axes.varying_axes(_axes.vary(jnp.zeros(()), axis_name))


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
