"""Reduce-scatter over several axes, one hop for each, the fastest link first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomm.collectives._common import check_axis_size, check_input
from jaxcomm.collectives._layout import check_axis, chunk_shape, split
from jaxcomm.collectives._linear import psum_scatter
from jaxcomm.collectives._options import BackwardBits, Bits, Wire, num_bytes, wire_of
from jaxcomm.collectives._straight_through import as_differing


def hierarchical_psum_scatter(
  x: jax.Array,
  axes: Sequence[str],
  *,
  bits: Bits | Mapping[str, Bits] = 8,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
  scatter_dimension: int = 0,
  tiled: bool = True,
) -> jax.Array:
  """Sum of `x` over all `axes`, scattered over them, so that slow links carry few bytes.

  With two axes, `("gpu", "node")`, `scatter_dimension` is cut into n_node * n_gpu chunks. The first
  hop adds over `gpu`: each device keeps, in float32, the n_node chunks of its place in the node.
  The second hop rounds these partial sums anew and adds over `node`. Device (i, j) of
  (node, gpu) ends with chunk i * n_gpu + j, as after `jax.lax.psum_scatter(x, ("node", "gpu"))`.
  Each hop is a one-shot `quantized_psum_scatter`. An axis of size 1 costs nothing, also no
  rounding, so that one axis alone gives the flat collective. More axes work alike.

  Wire: `hierarchical_psum_scatter_bytes`; the bytes of `node` are those of 1 / n_gpu of `x`.

  Derivative: all-gathers of the cotangent in the opposite order, over the slow axis first, with the
  bits of each axis or `backward_bits`.

  Args:
    x: any shape but a scalar, floating-point dtype.
    axes: bound axes, the fastest link first.
    bits: as in `quantized_all_gather`, one for all hops or one for each axis by name.
    block_size, rounding, key, hadamard: as in `quantized_all_gather`, for all hops.
    backward_bits: for the derivative on all axes, or "same".
    scatter_dimension, tiled: as in `quantized_psum_scatter`, with N the number of all devices.

  Returns:
    The sum of this device's chunk, in the dtype of `x`.

  Raises:
    ValueError: an argument outside these rules, axes that are equal or unbound, a missing key.

  Source: qgZ of ZeRO++ (arXiv 2306.10209, section 3.3); bits per hop and the rotation as in
  SDP4Bit (arXiv 2410.15526).

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import hierarchical_psum_scatter
  >>> scatter = lambda v: hierarchical_psum_scatter(v, ("gpu", "node"))
  >>> scatter = jax.jit(jax.vmap(jax.vmap(scatter, axis_name="gpu"), axis_name="node"))
  >>> x = jnp.broadcast_to(jnp.asarray([127.0, -127.0, 0.0, 127.0]), (2, 2, 4))
  >>> scatter(x).reshape(-1).tolist()
  [508.0, -508.0, 0.0, 508.0]
  """
  axes = _checked_axes(axes)
  wires = {
    a: wire_of(b, backward_bits, block_size, rounding, hadamard)
    for a, b in _bits_by_axis(axes, bits).items()
  }
  sizes = {a: check_input(x, a) for a in axes}
  axis = check_axis(scatter_dimension, x.ndim, "scatter_dimension")
  for a in axes:
    x = as_differing(x, a)
  if key is not None:  # independent on all devices, also along the axes of the other hops
    key = jax.random.fold_in(key, jax.lax.axis_index(axes[::-1]))
  num_devices = math.prod(sizes.values())
  wide = x.astype(jnp.float32)
  chunks = split(wide, num_devices, axis, "scatter_dimension", tiled=tiled, pad=True)
  chunks = chunks.reshape(*(sizes[a] for a in axes[::-1]), *chunks.shape[1:])
  with jax.named_scope("hierarchical_psum_scatter"):
    return _hops(chunks, axes, wires, key).astype(x.dtype)


def _hops(
  chunks: jax.Array, axes: tuple[str, ...], wires: dict[str, Wire], key: jax.Array | None
) -> jax.Array:
  """One reduce-scatter per axis; the first dimension of `chunks` belongs to the last axis."""
  for hop, axis_name in enumerate(axes):
    hop_key = None if key is None else jax.random.fold_in(key, hop)
    dimension = len(axes) - 1 - hop
    chunks = psum_scatter(chunks, axis_name, wires[axis_name], hop_key, axis=dimension, tiled=False)
  return chunks


def _checked_axes(axes: Any) -> tuple[str, ...]:
  if isinstance(axes, str) or len(axes) < 2 or len(set(axes)) < len(axes):
    raise ValueError(f"`axes` must be two or more different axis names, got {axes!r}.")
  return tuple(axes)


def _bits_by_axis(axes: tuple[str, ...], bits: Any) -> dict[str, Any]:
  if not isinstance(bits, Mapping):
    return dict.fromkeys(axes, bits)
  if set(bits) != set(axes):
    raise ValueError(f"`bits` must name the axes {list(axes)}, got {list(bits)}.")
  return {a: bits[a] for a in axes}


def hierarchical_psum_scatter_bytes(
  shape: Any,
  axis_sizes: Mapping[str, int],
  *,
  bits: Bits | Mapping[str, Bits] = 8,
  block_size: int = 256,
  hadamard: int | None = None,
  scatter_dimension: int = 0,
  tiled: bool = True,
) -> dict[str, int]:
  """Bytes that one device sends over each axis in `hierarchical_psum_scatter`, forward.

  With W devices in all, chunks of C elements, and axes of n_1, n_2, ... devices from fast to slow,
  hop k sends (n_k - 1) messages of C W / (n_1 ... n_k) elements.

  Args:
    shape: of the local array.
    axis_sizes: devices per axis, the fastest link first.
    bits, block_size, hadamard, scatter_dimension, tiled: as there.

  >>> from jaxcomm.collectives import hierarchical_psum_scatter_bytes
  >>> hierarchical_psum_scatter_bytes((4096,), {"gpu": 4, "node": 2}, bits={"gpu": 8, "node": 4})
  {'gpu': 3120, 'node': 264}
  """
  bits_by_axis = _bits_by_axis(_checked_axes(tuple(axis_sizes)), bits)
  for size in axis_sizes.values():
    check_axis_size(size)
  total, name = math.prod(axis_sizes.values()), "scatter_dimension"
  chunk = chunk_shape(tuple(shape), total, scatter_dimension, name, tiled=tiled, pad=True)
  sent, left = {}, total
  for axis_name, size in axis_sizes.items():
    left //= size
    message = num_bytes((left, *chunk), bits_by_axis[axis_name], block_size, hadamard)
    sent[axis_name] = (size - 1) * message
  return sent
