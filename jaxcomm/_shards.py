"""Running a function on each device's own shards, inside a region that is manual over `replica`."""

import contextlib
import contextvars
import math
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
    return [only(s, inner) for s in leaves_like(treedef, specs)]
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
  """`fun(scalars, *lists)` on local shards, manual over all inner axes as well.

  Every list has one entry per leaf: an array sharded by the leaf's spec, or a tree without arrays
  (None). `fun` returns as many lists of the same kind. `scalars` are equal on all shards.
  """
  inner = inner_axes()
  if not inner:
    return fun

  def call(scalars, *lists):
    entry_specs = tuple(
      [jax.tree.map(lambda _, spec=spec: spec, entry) for entry, spec in zip(entries, specs)]
      for entries in lists
    )
    return jax.shard_map(
      fun,
      in_specs=(jax.tree.map(lambda _: P(), scalars), *entry_specs),
      out_specs=entry_specs,
      axis_names=set(inner),
    )(scalars, *lists)

  return call


def fold_in_shard(key: jax.Array, spec: P) -> jax.Array:
  """A key of its own for every shard of a leaf; equal keys where the leaf is replicated."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  for axis in _names(spec):
    if axis in manual:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))
  return key


def leaves_like(treedef: Any, tree: Any) -> list[Any]:
  """The leaves of `tree`, which is like `treedef` but for parts that optax masked in the latter."""
  if treedef.num_leaves == 0:
    return []
  masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
  numbers = treedef.unflatten(range(treedef.num_leaves))
  return jax.tree.leaves(
    jax.tree.map(lambda x, leaf: x if masked(x) else leaf, numbers, tree, is_leaf=masked)
  )


def shards_per_dim(spec: P, ndim: int, mesh: Any) -> tuple[int, ...]:
  """Into how many parts `spec` cuts each of `ndim` dimensions on `mesh` (None: into one)."""
  parts = [*spec, *(None,) * (ndim - len(spec))]
  names = [part if isinstance(part, tuple) else (part,) for part in parts]
  sizes = {} if mesh is None else mesh.shape
  return tuple(math.prod(sizes.get(name, 1) for name in group if name) for group in names)


def divides(spec: P, shape: tuple[int, ...], mesh: Any) -> bool:
  """Whether `spec` cuts an array of `shape` into equal parts on `mesh`."""
  return all(n % k == 0 for n, k in zip(shape, shards_per_dim(spec, len(shape), mesh)))


def _names(spec: P) -> list[str]:
  parts = [p if isinstance(p, tuple) else (p,) for p in spec if p is not None]
  return [name for part in parts for name in part]


def only(spec: P, axes: tuple[str, ...]) -> P:
  """`spec` without the axes that are not in `axes`."""

  def keep(part):
    names = tuple(n for n in (part if isinstance(part, tuple) else (part,)) if n in axes)
    return names or None

  return P(*(keep(part) for part in spec))
