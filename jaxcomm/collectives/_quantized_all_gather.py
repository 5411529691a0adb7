"""All-gather with integers or float8 on the wire."""

from typing import Any, Literal

import jax

from jaxcomm.collectives._common import check_axis_size, check_input
from jaxcomm.collectives._layout import check_axis
from jaxcomm.collectives._linear import all_gather
from jaxcomm.collectives._options import BackwardBits, Bits, num_bytes, wire_of
from jaxcomm.collectives._straight_through import as_differing


def quantized_all_gather(
  x: jax.Array,
  axis_name: str,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
  axis: int = 0,
  tiled: bool = True,
  to: Literal["varying", "invarying"] = "varying",
) -> jax.Array:
  """`jax.lax.all_gather` of `x`, rounded once, by every device in the same way.

  Each device compresses its `x` in one message; all devices decode the same N messages, also the
  owner its own. So the result is equal on all devices bit for bit.

  Wire: `quantized_all_gather_bytes`, (N - 1) payload_bytes(x.shape) sent per device. On one device
  nothing is sent and nothing is rounded.

  Derivative: rounding counts as the identity (straight through), so the cotangent goes through
  `quantized_psum_scatter` with `backward_bits`. `jax.grad` may stand inside or outside of
  `jax.shard_map`, but only inside of `jax.vmap(axis_name=...)`.

  Args:
    x: any shape, floating-point dtype, inside `jax.shard_map` (with or without replication checks;
      manual over every axis that shards `x`) or `jax.vmap(axis_name=...)`, with the same bits.
    axis_name: one bound axis.
    bits: 8 or 4 for block integers, "fp8" for block-scaled float8, None for the exact `jax.lax`
      collective (sums in float32).
    block_size: consecutive elements per scale, at least 8; even for 4 bits.
    rounding: "nearest" or "stochastic" (unbiased).
    key: for stochastic rounding, equal on all devices: each folds in its rank, so their noise is
      independent. Fold in the step and the leaf, and the rank on axes over which `x` differs
      besides `axis_name`.
    hadamard: None, or rotate groups of this many elements before rounding (32 in SDP4Bit); see
      `jaxcomm.compressors.Hadamard`.
    backward_bits: `bits` of the derivative's collective, or "same".
    axis: where the chunks go in the result, as in `jax.lax.all_gather`.
    tiled: True concatenates in `axis`, False stacks on a new `axis`. (`jax.lax` has False.)
    to: "varying", or "invarying" to type the result as equal under replication checks. Then each
      device's cotangent is its own part of the (equal) one of the result, and nothing is sent.

  Returns:
    The gathered array in the dtype of `x`.

  Raises:
    ValueError: an argument outside these rules, an unbound axis, a missing key.

  Source: quantized weights of ZeRO++ (arXiv 2306.10209, section 3.1) and QSDP (arXiv 2302.02390).

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_all_gather
  >>> x = jnp.asarray([[127.0, 1.2], [-127.0, 2.0]])
  >>> jax.vmap(lambda v: quantized_all_gather(v, "data"), axis_name="data")(x)[0].tolist()
  [127.0, 1.0, -127.0, 2.0]
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  check_input(x, axis_name)
  axis = check_axis(axis, x.ndim + (not tiled), "axis")
  if to not in ("varying", "invarying"):
    raise ValueError(f"`to` must be 'varying' or 'invarying', got {to!r}.")
  x = as_differing(x, axis_name)
  return all_gather(x, axis_name, wire, key, axis=axis, tiled=tiled, to=to)


def quantized_all_gather_bytes(
  shape: Any,
  axis_size: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  hadamard: int | None = None,
) -> int:
  """Bytes that one device sends in `quantized_all_gather` of a local array of `shape`, forward.

  With d elements: (N - 1) (ceil(d bits / 8) + 4 ceil(d / block_size)), where d is rounded up to
  whole groups of `hadamard`; for `bits=None`, float32: (N - 1) 4 d.

  >>> from jaxcomm.collectives import quantized_all_gather_bytes
  >>> [quantized_all_gather_bytes((512,), 8, bits=bits) for bits in (None, 8, 4)]
  [14336, 3640, 1848]
  """
  check_axis_size(axis_size)
  return (axis_size - 1) * num_bytes(shape, bits, block_size, hadamard)
