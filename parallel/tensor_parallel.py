"""Tensor parallelism: what surrounds products whose weights are cut over the mesh axis `tensor`.

Megatron-LM (arXiv 1909.08053) §3, and sequence parallelism (arXiv 2205.05198) §4.2.2: first weights
cut by columns, then weights cut by rows, and one sum behind them. Where the axis is manual
(`jax.shard_map` with `check_vma=True`) a weight is this device's part, its type differs over
`tensor`, and the functions here communicate; the sums of the backward pass follow from the types.
Where the axis is the compiler's they constrain shardings, and it communicates. Without the axis
they return their argument.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel.mesh import DATA, FSDP, REPLICA, SEQ, TENSOR


def is_cut(weight: jax.Array) -> bool:
  """Whether the type of `weight` says that it is this device's part of a manual axis `tensor`."""
  return TENSOR in _axes.varying_axes(weight)


def cut_by_compiler(x: jax.Array) -> bool:
  """Whether the compiler cuts weights over `tensor`, or tokens over `seq`, where `x` lives."""
  return bool(_larger_auto_axes(x, (SEQ, TENSOR)))


def to_columns(x: jax.Array, weight: jax.Array, *, over_tokens: bool) -> jax.Array:
  """[B, S, D] as products with the columns of `weight` take it: all tokens, on every device.

  Wire over T devices: nothing forward and the sum of the gradient backward, B S D numbers reduced;
  with `over_tokens` an all-gather forward and a reduce-scatter backward, the same bytes together.

  Args:
    x: equal on all devices, or with `over_tokens` this device's tokens.
    weight: the first that `x` is multiplied with; its type tells who communicates.
    over_tokens: whether, between blocks, tokens are cut over `tensor`.
  """
  if is_cut(weight):
    if over_tokens:
      return jax.lax.all_gather(x, TENSOR, axis=1, tiled=True)
    return _axes.vary(x, TENSOR)
  # Both layouts are asked for, since the gradient then passes through both, too.
  return _constrain_tokens(_constrain_tokens(x, True), False) if over_tokens else x


def from_rows(y: jax.Array, weight: jax.Array, *, over_tokens: bool) -> jax.Array:
  """[B, S, D] summed over the devices that hold the rows of `weight`.

  Wire over T devices: an all-reduce, `2 (T - 1) / T` of the bytes of `y` per device; with
  `over_tokens` a reduce-scatter, half of that.

  Args:
    y: the product with this device's rows, or what the compiler takes for the whole.
    weight: whose rows are cut.
    over_tokens: whether the sum is cut over tokens.

  Raises:
    ValueError: the axis is manual and does not divide the tokens.
  """
  if is_cut(weight):
    if not over_tokens:
      return jax.lax.psum(_axes.vary(y, TENSOR), TENSOR)
    size = _axes.axis_size(TENSOR)
    if y.shape[1] % size:
      raise ValueError(
        f"`sequence_parallel` needs tokens that the {size} devices on 'tensor' divide, got"
        f" {y.shape[1]}."
      )
    return jax.lax.psum_scatter(_axes.vary(y, TENSOR), TENSOR, scatter_dimension=1, tiled=True)
  return _constrain_tokens(_constrain_tokens(y, False), True) if over_tokens else y


def own_heads(weight: jax.Array, x: jax.Array, queries: jax.Array) -> jax.Array:
  """Key/value weights [..., K, C] as T > K devices on `tensor` need them: each head T / K times.

  Manual over the axis it is the head of this device's queries, [..., 1, C]; where the axis is the
  compiler's, [..., T, C], cut along T. Where T divides K it is `weight` itself.

  Wire over T devices: nothing forward; backward the gradient of `weight` is summed.

  Args:
    weight: whole on all devices, as `mesh_specs` has it then.
    x: what it is multiplied with.
    queries: weights of the queries; their type tells whether the axis is manual.

  Example:
    >>> from parallel import make_mesh
    >>> two = jax.device_put(jnp.arange(2.0)[:, None], jax.NamedSharding(make_mesh(), jax.P()))
    >>> jax.jit(own_heads)(two, two, two).shape  # no devices to share them
    (2, 1)
  """
  heads, axis = weight.shape[-2], weight.ndim - 2
  if is_cut(queries):
    if is_cut(weight):
      return weight
    size = _axes.axis_size(TENSOR)
    first = jax.lax.axis_index(TENSOR) * heads // size
    whole = _axes.vary(weight, TENSOR)
    return jax.lax.dynamic_slice_in_dim(whole, first, max(1, heads // size), axis)
  if not _larger_auto_axes(x, (TENSOR,)):
    return weight
  mesh = jax.typeof(x).sharding.mesh
  size = mesh.shape[TENSOR]
  if size <= heads or size % heads:
    return weight
  spec = jax.P(*(jax.P.UNCONSTRAINED,) * axis, TENSOR, jax.P.UNCONSTRAINED)
  repeated = jnp.repeat(weight, size // heads, axis)
  return jax.lax.with_sharding_constraint(repeated, jax.NamedSharding(mesh, spec))


def lookup(table_VD: jax.Array, ids_BS: jax.Array) -> jax.Array:
  """[B, S, D]: rows of a table, of which each device may hold V / T; sum them with `from_rows`."""
  if not is_cut(table_VD):
    return table_VD[ids_BS]
  local_BS = ids_BS - jax.lax.axis_index(TENSOR) * table_VD.shape[0]
  own_BS = (local_BS >= 0) & (local_BS < table_VD.shape[0])
  x_BSD = table_VD[jnp.where(own_BS, local_BS, 0)]
  return jnp.where(own_BS[..., None], x_BSD, jnp.zeros_like(x_BSD))


def vary_beyond_tensor(x: jax.Array, like: Any) -> jax.Array:
  """Types `x` as differing over all manual axes but `tensor` over which an array of `like` does."""
  axes = frozenset().union(*map(_axes.varying_axes, jax.tree.leaves(like))) - {TENSOR}
  for axis in sorted(axes):
    x = _axes.vary(x, axis)
  return x


def _constrain_tokens(x: jax.Array, over_tensor: bool) -> jax.Array:
  """Asks the compiler to cut dimension 1 over `seq`, and over `tensor` or not."""
  if not _larger_auto_axes(x, (TENSOR,)):
    return x
  mesh = jax.typeof(x).sharding.mesh
  tokens = _larger_auto_axes(x, (SEQ, TENSOR) if over_tensor else (SEQ,))
  rows = _larger_auto_axes(x, (REPLICA, DATA, FSDP))
  sizes = [_product(mesh, axes) for axes in (rows, tokens)]
  if x.shape[1] % sizes[1]:
    return x
  spec = jax.P(rows if x.shape[0] % sizes[0] == 0 else None, tokens, None)
  return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, spec))


def _larger_auto_axes(x, axes: tuple[str, ...]) -> tuple[str, ...]:
  mesh = jax.typeof(x).sharding.mesh
  return tuple(a for a in axes if a in mesh.auto_axes and mesh.shape[a] > 1)


def _product(mesh, axes) -> int:
  size = 1
  for axis in axes:
    size *= mesh.shape[axis]
  return size
