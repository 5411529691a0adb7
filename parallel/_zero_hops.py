"""Flat arrays cut over the levels of a mesh: parts, and the hops that gather and reduce them.

A leaf is flattened layer by layer, padded, and cut into contiguous parts: over axes (a, b) device
(i, j) has part i n_b + j. So a part over (a, b) is one of the n_b pieces of a part over (a,), and a
gather over b alone makes the one of the other. Everything here but `flatten` and `unflatten` runs
inside `jax.shard_map`. Letters: g devices of a level, c elements per device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives import quantized_all_gather, quantized_psum_scatter
from parallel._zero_plan import Level, PartitionPlan, axes_of, level_axes


def vary_all(tree: Any) -> Any:
  """Types every array as differing over all manual axes, so that no sum hides in a derivative."""
  for axis in sorted(jax.sharding.get_abstract_mesh().manual_axes):
    tree = _axes.vary(tree, axis)
  return tree


def axis_sizes(plan: PartitionPlan) -> dict[str, int]:
  """Devices per axis of the plan. Raises ValueError where one is not bound."""
  return {a: _axes.axis_size(a) for a in axes_of(plan.optimizer)}


def flatten(x: jax.Array, shape: tuple[int, ...], padded: int) -> jax.Array:
  """[..., *shape] -> [..., padded], with zeros at the end."""
  lead = x.shape[: x.ndim - len(shape)]
  flat = x.reshape(*lead, math.prod(shape))
  return jnp.pad(flat, [(0, 0)] * len(lead) + [(0, padded - flat.shape[-1])])


def unflatten(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `flatten`."""
  return x[..., : math.prod(shape)].reshape(*x.shape[:-1], *shape)


def own_part(x: jax.Array, levels: Sequence[Level]) -> jax.Array:
  """This device's part of [..., n] over the axes of `levels`."""
  axes = axes_of(levels)
  if not axes:
    return x
  size = x.shape[-1] // math.prod(_axes.axis_size(a) for a in axes)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, x.ndim - 1)


def gather_levels(
  x: jax.Array, levels: Sequence[Level], bits: int | None, block_size: int
) -> jax.Array:
  """[..., c] -> [..., g c]: the parts of all devices of `levels`, the slowest link first."""
  dtype = x.dtype
  x = x if bits is None else x.astype(jnp.float32)  # decoded values are exact in float32 only
  for level in reversed(levels):
    if _size(level) > 1:
      flat = vary_all(x.reshape(-1))
      if bits is None:
        parts = on_raw_bits(lambda v, level=level: jax.lax.all_gather(v, level), flat)
      else:
        parts = quantized_all_gather(
          flat, _name(level), bits=_bits(bits), block_size=block_size, tiled=False
        )
      x = jnp.moveaxis(parts.reshape(-1, *x.shape), 0, -2).reshape(*x.shape[:-1], -1)
  return x.astype(dtype)


def scatter_levels(
  x: jax.Array, levels: Sequence[Level], plan: PartitionPlan, size: int, key: jax.Array | None
) -> jax.Array:
  """[..., g c] -> [..., c]: the mean over `levels`, the fastest link first; sums in float32."""
  for hop, level in enumerate(levels):
    g = _size(level)
    if g > 1:
      lead, c = x.shape[:-1], x.shape[-1] // g
      rows = jnp.moveaxis(x.reshape(*lead, g, c), -2, 0).reshape(g, -1)
      bits = plan.bits_of_gradients(level, size)
      hop_key = None if key is None else jax.random.fold_in(key, hop)
      x = _mean_of_rows(rows, level, bits, plan.block_size, hop_key).reshape(*lead, c)
  return x


def _mean_of_rows(rows, level, bits, block_size, key) -> jax.Array:
  """[g, c] -> [c]: mean over the devices of `level` of the row for this device."""
  if bits is not None:
    total = quantized_psum_scatter(
      rows, _name(level), bits=_bits(bits), block_size=block_size, rounding="stochastic", key=key,
      tiled=False,
    )  # fmt: skip
  elif rows.dtype == jnp.float32:
    total = jax.lax.psum_scatter(rows, level)
  else:  # 16 bits on the wire, but the sum in float32
    rows = on_raw_bits(lambda v: jax.lax.all_to_all(v, level, 0, 0), rows)
    total = rows.astype(jnp.float32).sum(0)
  return (total / rows.shape[0]).astype(rows.dtype)


def on_raw_bits(move: Callable, x: jax.Array) -> jax.Array:
  """`move(x)`, which moves data only, with 16-bit floats as integers: XLA:CPU would widen them."""
  if x.dtype.itemsize != 2:
    return move(x)
  return jax.lax.bitcast_convert_type(move(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)


def _size(level: Level) -> int:
  return math.prod(_axes.axis_size(a) for a in level_axes(level))


def _name(level: Level) -> str:
  assert isinstance(level, str)  # checked by the plan
  return level


def _bits(bits: int) -> Any:
  return bits
