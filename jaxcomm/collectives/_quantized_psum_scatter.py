"""Reduce-scatter with integers or float8 on the wire."""

from typing import Any, Literal

import jax

from jaxcomm.collectives._common import check_axis_size, check_input
from jaxcomm.collectives._layout import check_axis, chunk_shape
from jaxcomm.collectives._linear import Algorithm, psum_scatter
from jaxcomm.collectives._options import BackwardBits, Bits, num_bytes, wire_of
from jaxcomm.collectives._straight_through import as_differing


def quantized_psum_scatter(
  x: jax.Array,
  axis_name: str,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  algorithm: Algorithm = "one_shot",
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
  scatter_dimension: int = 0,
  tiled: bool = True,
) -> jax.Array:
  """`jax.lax.psum_scatter` of `x`: device j gets the sum of chunk j, in float32.

  `scatter_dimension` is cut into N chunks, one for each device; blocks do not cross chunks.

  - `"one_shot"`: every device compresses its N chunks and sends chunk j to device j (all_to_all),
    which decodes them and adds in the order of the ranks. Every contribution is rounded once.
  - `"ring"`: the partial sum of each chunk travels around the ring, rounded anew at each of the
    N - 1 steps. As many bytes, N - 1 latencies, (N - 1) / 2 times the squared error on independent
    data; it needs one chunk of buffer.

  A size that N does not divide is padded with zeros: every chunk has ceil(size / N) rows, and the
  last ones hold the padding.

  Wire: `quantized_psum_scatter_bytes`, (N - 1) payload_bytes(chunk) sent per device. On one device
  nothing is sent and nothing is rounded.

  Derivative: `quantized_all_gather` of the cotangents with `backward_bits`, straight through the
  rounding.

  Args:
    x: any shape but a scalar, floating-point dtype.
    axis_name: one bound axis.
    bits, block_size, rounding, key, hadamard, backward_bits: as in `quantized_all_gather`.
    algorithm: "one_shot" or "ring".
    scatter_dimension: the axis to cut.
    tiled: True keeps the axis, with ceil(size / N) rows; False removes it, and its size must be N.
      (`jax.lax` has False.)

  Returns:
    The sum of this device's chunk, in the dtype of `x`; differs between devices.

  Raises:
    ValueError: an argument outside these rules, an unbound axis, a missing key.

  Source: ZeRO++ (arXiv 2306.10209, section 3.3) for the one-shot exchange.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_psum_scatter
  >>> x = jnp.broadcast_to(jnp.asarray([[127.0, 1.2], [127.0, 3.4]]), (2, 2, 2))
  >>> jax.vmap(lambda v: quantized_psum_scatter(v, "data"), axis_name="data")(x).tolist()
  [[[254.0, 2.0]], [[254.0, 6.0]]]
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  check_input(x, axis_name)
  if algorithm not in ("one_shot", "ring"):
    raise ValueError(f"`algorithm` must be 'one_shot' or 'ring', got {algorithm!r}.")
  axis = check_axis(scatter_dimension, x.ndim, "scatter_dimension")
  x = as_differing(x, axis_name)
  return psum_scatter(x, axis_name, wire, key, axis=axis, tiled=tiled, algorithm=algorithm)


def quantized_psum_scatter_bytes(
  shape: Any,
  axis_size: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  hadamard: int | None = None,
  scatter_dimension: int = 0,
  tiled: bool = True,
) -> int:
  """Bytes that one device sends in `quantized_psum_scatter` of an array of `shape`, forward.

  With chunks of C elements (ceil(size / N) rows of `scatter_dimension`), by both algorithms:
  (N - 1) (ceil(C bits / 8) + 4 ceil(C / block_size)), where C is rounded up to whole groups of
  `hadamard`; for `bits=None`, float32: (N - 1) 4 C.

  >>> from jaxcomm.collectives import quantized_psum_scatter_bytes
  >>> [quantized_psum_scatter_bytes((4096,), 8, bits=bits) for bits in (None, 8, 4)]
  [14336, 3640, 1848]
  """
  check_axis_size(axis_size)
  name = "scatter_dimension"
  chunk = chunk_shape(tuple(shape), axis_size, scatter_dimension, name, tiled=tiled, pad=True)
  return (axis_size - 1) * num_bytes(chunk, bits, block_size, hadamard)
