"""Running a function on each device's own shards, inside a region that is manual over `replica`."""

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

P = jax.sharding.PartitionSpec


def inner_axes() -> tuple[str, ...]:
  """Axes of the current mesh, larger than 1, that the compiler still handles (Auto, Explicit)."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1)


def leaf_specs(leaves: Sequence[jax.Array], treedef: Any, specs: Any) -> list[P]:
  """The `PartitionSpec` of every leaf over the inner axes.

  Args:
    leaves: arrays of the tree `treedef`.
    specs: a tree of `PartitionSpec` like `treedef` (of which optax may have masked a part), one
      `PartitionSpec` for all leaves, or None: then the types of Explicit axes tell, and Auto axes
      larger than 1 are an error.

  Raises:
    ValueError: `specs` is None and an Auto axis larger than 1 is in use.
  """
  inner = inner_axes()
  if not inner:
    return [P()] * len(leaves)
  if isinstance(specs, P):
    return [only(specs, inner)] * len(leaves)
  if specs is not None:
    return [only(s, inner) for s in _flatten_like(treedef, specs)]
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  auto = {a: mesh.shape[a] for a in inner if kinds[a] == jax.sharding.AxisType.Auto}
  if auto:
    raise ValueError(
      f"`specs` must say how the leaves are sharded over the automatic mesh axes {auto}:"
      " pass a tree of PartitionSpec like the parameters, or jax.P() if they are replicated."
    )
  return [only(jax.typeof(x).sharding.spec, inner) for x in leaves]


@contextlib.contextmanager
def around_stacked_replicas(mesh: jax.sharding.Mesh):
  """Says, while replicas that `jax.vmap` stacks are traced, over which axes they may be sharded."""
  token = _AROUND_STACKED.set(frozenset(a for a, size in mesh.shape.items() if size > 1))
  try:
    yield
  finally:
    _AROUND_STACKED.reset(token)


_AROUND_STACKED: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
  "axes around stacked replicas", default=frozenset()
)


def check_unsharded(specs: Any) -> None:
  """Raises ValueError if `specs` shard a leaf of stacked replicas."""
  leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
  named = {name for spec in leaves for name in _names(spec)}
  axes = sorted(named & _AROUND_STACKED.get())
  if axes:
    raise ValueError(
      f"`specs` shard leaves over the mesh axes {axes}, which a compressed mean over replicas that"
      " jax.vmap stacks cannot follow: use one device per shard and replica, or no sharding."
    )


def on_shards(fun: Callable, specs: list[P]) -> Callable:
  """`fun(leaves, residuals, count)` on local shards, manual over all inner axes as well.

  `leaves` and `residuals` are lists sharded by `specs` (a residual may be None); so are the two
  lists that `fun` returns.
  """
  inner = inner_axes()
  if not inner:
    return fun

  def call(leaves, residuals, count):
    residual_specs = [None if r is None else s for r, s in zip(residuals, specs)]
    return jax.shard_map(
      fun,
      in_specs=(specs, residual_specs, P()),
      out_specs=(specs, residual_specs),
      axis_names=set(inner),
    )(leaves, residuals, count)

  return call


def fold_in_shard(key: jax.Array, spec: P) -> jax.Array:
  """A key of its own for every shard of a leaf; equal keys where the leaf is replicated."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  for axis in _names(spec):
    if axis in manual:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  return key


def _flatten_like(treedef: Any, specs: Any) -> list[P]:
  masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
  tree = treedef.unflatten(range(treedef.num_leaves))
  return jax.tree.leaves(
    jax.tree.map(lambda x, s: x if masked(x) else s, tree, specs, is_leaf=masked)
  )


def _names(spec: P) -> list[str]:
  parts = [p if isinstance(p, tuple) else (p,) for p in spec if p is not None]
  return [name for part in parts for name in part]


def only(spec: P, axes: tuple[str, ...]) -> P:
  """`spec` without the axes that are not in `axes`."""

  def keep(part):
    names = tuple(n for n in (part if isinstance(part, tuple) else (part,)) if n in axes)
    return names or None

  return P(*(keep(part) for part in spec))
