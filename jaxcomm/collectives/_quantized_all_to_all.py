"""All-to-all with integers or float8 on the wire."""

import math
from typing import Any, Literal

import jax

from jaxcomm.collectives._common import check_axis_size, check_input
from jaxcomm.collectives._layout import check_axis, chunk_shape
from jaxcomm.collectives._linear import all_to_all, row_width
from jaxcomm.collectives._options import BackwardBits, Bits, num_bytes, wire_of
from jaxcomm.collectives._straight_through import as_differing


def quantized_all_to_all(
  x: jax.Array,
  axis_name: str,
  split_axis: int,
  concat_axis: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
  tiled: bool = True,
) -> jax.Array:
  """`jax.lax.all_to_all` of `x`: chunk j of `split_axis` goes to device j, rounded once.

  Every row of the last axis (a token's activations, say) has blocks of its own, so that no token's
  outlier costs another one precision. Devices decode their own chunk too.

  Wire: `quantized_all_to_all_bytes`. On one device nothing is sent and nothing is rounded.

  Derivative: the same exchange of the cotangents, with the axes swapped and `backward_bits`,
  straight through the rounding.

  Args:
    x: any shape but a scalar, floating-point dtype.
    axis_name: one bound axis.
    split_axis: the axis to cut, of a size divisible by N (N itself without `tiled`).
    concat_axis: where the received chunks go.
    bits, block_size, rounding, key, hadamard, backward_bits: as in `quantized_all_gather`.
    tiled: True concatenates in `concat_axis`; False removes `split_axis` and stacks on a new axis
      `concat_axis`. (`jax.lax` has False.)

  Returns:
    The received chunks in the order of the ranks, in the dtype of `x`.

  Raises:
    ValueError: an argument outside these rules, an unbound axis, a missing key.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import quantized_all_to_all
  >>> x = jnp.asarray([[[127.0, 1.2], [127.0, 2.2]], [[127.0, 3.2], [127.0, 4.2]]])
  >>> jax.vmap(lambda v: quantized_all_to_all(v, "data", 0, 0), axis_name="data")(x).tolist()
  [[[127.0, 1.0], [127.0, 3.0]], [[127.0, 2.0], [127.0, 4.0]]]
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  check_input(x, axis_name)
  split_axis = check_axis(split_axis, x.ndim, "split_axis")
  concat_axis = check_axis(concat_axis, x.ndim, "concat_axis")
  axes = {"split_axis": split_axis, "concat_axis": concat_axis}
  return all_to_all(as_differing(x, axis_name), axis_name, wire, key, **axes, tiled=tiled)


def quantized_all_to_all_bytes(
  shape: Any,
  axis_size: int,
  split_axis: int,
  *,
  bits: Bits = 8,
  block_size: int = 256,
  hadamard: int | None = None,
  tiled: bool = True,
) -> int:
  """Bytes that one device sends in `quantized_all_to_all` of an array of `shape`, forward.

  A chunk of R rows of D elements goes to each of the N - 1 others, R (ceil(D bits / 8) +
  4 ceil(D / block_size)) bytes, where D is rounded up to whole groups of `hadamard`; for
  `bits=None`, float32.

  >>> from jaxcomm.collectives import quantized_all_to_all_bytes
  >>> [quantized_all_to_all_bytes((32, 512), 8, 0, bits=bits) for bits in (None, 8, 4)]
  [57344, 14560, 7392]
  """
  check_axis_size(axis_size)
  chunk = chunk_shape(tuple(shape), axis_size, split_axis, "split_axis", tiled=tiled, pad=False)
  row = num_bytes((row_width(chunk),), bits, block_size, hadamard)
  return (axis_size - 1) * math.prod(chunk[:-1]) * row if math.prod(chunk) else 0
