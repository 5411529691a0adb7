"""Cutting an axis of an array into one chunk per device and back, in the conventions of `jax.lax`.

Letters: N devices on the mesh axis.
"""

import operator

import jax
import jax.numpy as jnp


def chunk_shape(
  shape: tuple[int, ...], n: int, axis: int, name: str, *, tiled: bool, pad: bool
) -> tuple[int, ...]:
  """Shape of one of `n` chunks of `axis`: cut to ceil(size / n) if `tiled`, else removed.

  `name` is what the public argument behind `axis` is called.

  Raises:
    ValueError: `axis` is out of range, or its size does not fit: it must be n without `tiled`, and
      divisible by n with `tiled`, unless `pad`.
  """
  axis = check_axis(axis, len(shape), name)
  size = shape[axis]
  if not tiled and size != n:
    raise ValueError(
      f"`{name}` must name an axis of size {n} (the devices) without `tiled`, got size {size}."
    )
  if tiled and size % n and not pad:
    raise ValueError(
      f"`{name}` must name an axis whose size is divisible by the {n} devices, got size {size}."
    )
  kept = (-(-size // n),) if tiled else ()
  return (*shape[:axis], *kept, *shape[axis + 1 :])


def check_axis(axis: int, ndim: int, name: str) -> int:
  """`axis` counted from the front. Raises ValueError if it is out of range."""
  if not -ndim <= operator.index(axis) < ndim:
    raise ValueError(f"`{name}` must be in [{-ndim}, {ndim}) for this array, got {axis}.")
  return axis % ndim


def split(
  x: jax.Array, n: int, axis: int, name: str, *, tiled: bool, pad: bool = False
) -> jax.Array:
  """The `n` chunks of `axis`, stacked in front; see `chunk_shape`. `pad` fills up with zeros."""
  chunk = chunk_shape(x.shape, n, axis, name, tiled=tiled, pad=pad)
  axis = axis % x.ndim
  if not tiled:
    return jnp.moveaxis(x, axis, 0)
  missing = n * chunk[axis] - x.shape[axis]
  x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
  return jnp.moveaxis(x.reshape(*chunk[:axis], n, *chunk[axis:]), axis, 0)


def join(x_N: jax.Array, axis: int, name: str, *, tiled: bool) -> jax.Array:
  """The inverse of `split` without padding: chunks side by side in `axis`, or stacked there."""
  axis = check_axis(axis, x_N.ndim - tiled, name)
  x = jnp.moveaxis(x_N, 0, axis)
  if not tiled:
    return x
  return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
