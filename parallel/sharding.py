"""From the logical axes of a model to the axes of a mesh."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel.mesh import DATA, FSDP, REPLICA, SEQ, TENSOR

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Mesh axis, or axes, over which each logical axis of a model is sharded; None: not sharded."""

DEFAULT_RULES: Rules = {
  "embed": FSDP,
  "vocab": TENSOR,
  "mlp": TENSOR,
  "heads": TENSOR,
  "kv_heads": TENSOR,
  "head_dim": None,
  "layers": None,
  "norm": None,  # small vectors: sharding them saves nothing and costs a collective each
}

# Where devices are a multiple of them, each device takes the whole, and works on the one it needs
# (`parallel.tensor_parallel.own_heads`).
_SHARED = frozenset({"kv_heads"})


def mesh_specs(
  logical_specs: Any, shapes: Any, mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES
) -> Any:
  """Partition specs over the axes of `mesh`.

  Mesh axes that `mesh` lacks, or has at size 1, are dropped; those of "kv_heads" also where the
  devices are a multiple of the heads: such weights are on all of them.

  Args:
    logical_specs: tree of `jax.P` of logical names, such as `models.llama.specs(cfg)`.
    shapes: tree of the same structure with arrays or `jax.ShapeDtypeStruct`.
    mesh: from `make_mesh`.
    rules: logical name to mesh axes.

  Returns:
    Tree of `jax.P` of mesh axes.

  Raises:
    ValueError: a logical name without a rule, more names than dimensions, a mesh axis used twice
      in a leaf, or a dimension that the devices do not divide.

  Example:
    >>> mesh = jax.sharding.AbstractMesh((1, 4), ("replica", "fsdp"))
    >>> mesh_specs({"w": jax.P("embed", "mlp")}, {"w": jax.ShapeDtypeStruct((8, 3), "f4")}, mesh)
    {'w': P('fsdp',)}
  """

  def leaf_spec(path, logical, leaf):
    return _leaf_spec(jax.tree_util.keystr(path), logical, leaf.shape, mesh, rules)

  return jax.tree_util.tree_map_with_path(
    leaf_spec, logical_specs, shapes, is_leaf=lambda x: isinstance(x, jax.P)
  )


def _leaf_spec(name, logical, shape, mesh, rules) -> jax.P:
  if len(logical) > len(shape):
    raise ValueError(f"`logical_specs` of {name} has {len(logical)} names for shape {shape}.")
  dims, used = [], set()
  for dim, label in enumerate(logical):
    axes = _mesh_axes(name, label, mesh, rules)
    count = math.prod(mesh.shape[axis] for axis in axes)
    if label in _SHARED and count > shape[dim] and count % shape[dim] == 0:
      axes, count = (), 1
    if repeated := used.intersection(axes):
      raise ValueError(f"`rules` use the mesh axes {sorted(repeated)} twice in {name}: {logical}.")
    used.update(axes)
    if shape[dim] % count:
      raise ValueError(
        f"`shapes` of {name}: dimension {dim} ('{label}') has size {shape[dim]}, which must be"
        f" divisible by {count}, the size of mesh axis {'*'.join(axes)}."
      )
    dims.append(axes[0] if len(axes) == 1 else axes or None)
  while dims and dims[-1] is None:
    dims.pop()
  return jax.P(*dims)


def _mesh_axes(name, label, mesh, rules) -> tuple[str, ...]:
  """Mesh axes of one logical name that really divide something."""
  if label is None:
    return ()
  if label not in rules:
    raise ValueError(f"`rules` have no entry for the logical axis '{label}' of {name}.")
  axes = rules[label] or ()
  axes = (axes,) if isinstance(axes, str) else axes
  return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def named_shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
  """Tree of `jax.NamedSharding` from a tree of `jax.P` over the axes of `mesh`."""
  return jax.tree.map(
    lambda spec: jax.NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, jax.P)
  )


def batch_spec(mesh: jax.sharding.Mesh) -> jax.P:
  """Spec of a batch [B, S]: rows over those of (replica, data, fsdp) that `mesh` has, tokens over
  `seq` where that is larger than 1.

  Example:
    >>> batch_spec(jax.sharding.AbstractMesh((1, 4), ("replica", "fsdp")))
    P(('replica', 'fsdp'),)
    >>> batch_spec(jax.sharding.AbstractMesh((4, 2), ("data", "seq")))
    P('data', 'seq')
  """
  rows = tuple(axis for axis in (REPLICA, DATA, FSDP) if axis in mesh.shape)
  if mesh.shape.get(SEQ, 1) > 1:
    return jax.P(rows or None, SEQ)
  return jax.P(rows) if rows else jax.P()


def shard_batch(x: jax.Array) -> jax.Array:
  """Asks the compiler to keep dimension 0 of `x` over the automatic axes of a batch.

  Without it the compiler may shard activations as the weights are, and then moves activations
  instead of weights. Changes no value. Does nothing where `x` is on no mesh, or where the axes do
  not divide the dimension.
  """
  axes = _auto_batch_axes(x)
  count = math.prod(_mesh(x).shape[axis] for axis in axes)
  if not axes or x.shape[0] % count:
    return x
  return _constrain(x, jax.P(axes, *(jax.P.UNCONSTRAINED,) * (x.ndim - 1)))


def gather_fsdp(x: jax.Array, dim: int) -> jax.Array:
  """Asks the compiler for all of dimension `dim` of a weight on each device, before its use.

  Wire: an all-gather over `fsdp`, and in the backward pass a sum over the axes of the batch.
  Changes no value. Does nothing where `x` is on no mesh.
  """
  if not _auto_batch_axes(x):
    return x
  dims: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
  dims[dim] = None
  return _constrain(x, jax.P(*dims))


def on_batch_and_head_shards(fn: Callable[..., Any], *args: jax.Array, checked: bool = True) -> Any:
  """`fn(*args)` on each device's rows and heads of arrays [B, S, heads, C], and rows of [B, S].

  For kernels that the compiler does not partition: `fn` is manual over all automatic axes. Rows are
  cut as a batch is, heads over `tensor`; where the axes do not divide them each device takes all.
  It is `fn(*args)` where the arrays are on no mesh.

  Args:
    fn: row by row and head by head, returns arrays [B, S, heads, C] cut alike.
    args: arrays of equal B; numbers of heads may be multiples of each other.
    checked: whether types are checked in the region. Kernels in Pallas do not tell theirs; their
      results are then taken to differ wherever an argument does.
  """
  mesh = _mesh(args[0])
  if not mesh.auto_axes:
    return fn(*args)
  axes = _auto_batch_axes(args[0])
  divides = args[0].shape[0] % math.prod(mesh.shape[axis] for axis in axes) == 0
  heads = TENSOR if TENSOR in mesh.auto_axes else None
  if heads and any(x.shape[2] % mesh.shape[heads] for x in args if x.ndim > 2):
    heads = None
  rows = axes if axes and divides else None
  spec = jax.P(rows, None, heads)

  def local(*args):
    # A product forgets, as all else in an unchecked region does, that it differs outside.
    return fn(*(args if checked else (x * jnp.ones((), x.dtype) for x in args)))

  manual = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=tuple(spec if x.ndim > 2 else jax.P(rows) for x in args),
    out_specs=spec,
    axis_names=set(mesh.auto_axes),
    check_vma=checked,
  )
  return manual(*args) if checked else _axes.vary_like(manual(*args), args)


def _mesh(x) -> jax.sharding.AbstractMesh:
  return jax.typeof(x).sharding.mesh


def _auto_batch_axes(x) -> tuple[str, ...]:
  mesh = _mesh(x)
  return tuple(a for a in (REPLICA, DATA, FSDP) if a in mesh.auto_axes and mesh.shape[a] > 1)


def _constrain(x, spec):
  return jax.lax.with_sharding_constraint(x, jax.NamedSharding(_mesh(x), spec))


def call_with_auto_axes(fn: Callable[..., Any], *args: Any, out_spec: jax.P) -> Any:
  """`fn(*args)` with the Explicit mesh axes of `args` made automatic inside; equal values.

  For code that leaves shardings to the compiler. Types, and so gradients, keep the shardings of
  `args`; the outputs get `out_spec`. On a mesh without Explicit axes it is `fn(*args)`.
  """
  explicit = [m for m in map(_mesh, jax.tree.leaves(args)) if m.explicit_axes]
  if not explicit:
    return fn(*args)
  with jax.sharding.use_abstract_mesh(explicit[0]):
    auto = jax.sharding.auto_axes(fn, axes=explicit[0].explicit_axes, out_sharding=out_spec)
    return auto(*args)
