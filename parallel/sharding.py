"""From the logical axes of a model to the axes of a mesh."""

from collections.abc import Mapping
from typing import Any

import jax

from parallel.mesh import DATA, FSDP, REPLICA

Rules = Mapping[str, str | tuple[str, ...] | None]
"""Mesh axis, or axes, over which each logical axis of a model is sharded; None: not sharded."""

DEFAULT_RULES: Rules = {
  "embed": FSDP,
  "vocab": None,
  "mlp": None,
  "heads": None,
  "kv_heads": None,
  "head_dim": None,
  "layers": None,
  "norm": None,  # small vectors: sharding them saves nothing and costs a collective each
}


def mesh_specs(
  logical_specs: Any, shapes: Any, mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES
) -> Any:
  """Partition specs over the axes of `mesh`.

  Mesh axes that `mesh` lacks, or has at size 1, are dropped.

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
    if repeated := used.intersection(axes):
      raise ValueError(f"`rules` use the mesh axes {sorted(repeated)} twice in {name}: {logical}.")
    used.update(axes)
    count = 1
    for axis in axes:
      count *= mesh.shape[axis]
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
  """Spec of a batch: dimension 0 over those of (replica, data, fsdp) that `mesh` has.

  Example:
    >>> batch_spec(jax.sharding.AbstractMesh((1, 4), ("replica", "fsdp")))
    P(('replica', 'fsdp'),)
  """
  axes = tuple(axis for axis in (REPLICA, DATA, FSDP) if axis in mesh.shape)
  return jax.P(axes) if axes else jax.P()


def shard_batch(x: jax.Array) -> jax.Array:
  """Asks the compiler to keep dimension 0 of `x` over the automatic data and fsdp axes.

  Without it the compiler may shard activations as the weights are, which moves activations
  instead of weights. Does nothing without a mesh in context (`jax.set_mesh`, `jax.shard_map`),
  or where the axes do not divide the dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(a for a in (REPLICA, DATA, FSDP) if a in mesh.auto_axes and mesh.shape[a] > 1)
  count = 1
  for axis in axes:
    count *= mesh.shape[axis]
  if not axes or x.shape[0] % count:
    return x
  rest = (jax.P.UNCONSTRAINED,) * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, jax.P(axes, *rest))
