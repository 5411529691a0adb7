"""Named axes: one vocabulary for `jax.shard_map` (manual axes) and `jax.vmap(axis_name=...)`.

Under `shard_map` with replication checks a value's type says over which manual axes it differs
(`{V:replica}`). Under `vmap` the same fact is whether the value is batched, and the casts of
`shard_map` do not exist. These helpers do the right thing in both.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def axis_size(axis_name: str) -> int:
  """Number of devices (or stacked replicas) on `axis_name`.

  Raises:
    ValueError: `axis_name` is not bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
  """
  try:
    return jax.lax.axis_size(axis_name)
  except NameError as e:
    raise ValueError(
      f"axis `{axis_name}` is unbound: call inside jax.shard_map over that axis,"
      " or inside jax.vmap(axis_name=...)."
    ) from e


def is_manual(axis_name: str) -> bool:
  """Whether `axis_name` is a manual axis of an enclosing `jax.shard_map`."""
  return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Manual axes over which the type of `x` says that it differs; empty without checks."""
  return _axes_of(jax.typeof(x))


def vary(tree: Any, axis_name: str) -> Any:
  """Types every array of `tree` as differing over `axis_name`; values do not change."""
  if not is_manual(axis_name):
    return tree

  def cast(x):
    return x if axis_name in varying_axes(x) else jax.lax.pcast(x, axis_name, to="varying")

  return jax.tree.map(cast, tree)


def vary_like(tree: Any, like: Any) -> Any:
  """`vary` over every axis over which an array of `like` differs: a scan's carry keeps its type."""
  for axis in sorted(frozenset().union(*map(varying_axes, jax.tree.leaves(like)))):
    tree = vary(tree, axis)
  return tree


def all_gather(tree: Any, axis_name: str, *, to: str = "varying") -> Any:
  """`jax.lax.all_gather`, stacked on a new leading axis, and an all-gather on every back end.

  XLA:TPU makes an all-reduce, which sends twice the bytes, of the all-gather of a vector that does
  not fill its tiles, unless there is an axis of size 1 in front. The barrier keeps it there.
  """

  def gather(x):
    return jax.lax.all_gather(jax.lax.optimization_barrier(x[None]), axis_name, tiled=True, to=to)

  return jax.tree.map(gather, tree)


def all_gather_equal(tree: Any, axis_name: str) -> Any:
  """`all_gather`, typed as equal on all devices."""
  if is_manual(axis_name):
    return all_gather(vary(tree, axis_name), axis_name, to="invarying")
  return all_gather(tree, axis_name)


def pmean_f32(x: jax.Array, axis_name: str) -> jax.Array:
  """Mean over `axis_name`, summed in float32, in the dtype of `x`."""
  if is_manual(axis_name) and axis_size(axis_name) == 1:
    # XLA fails on an all-reduce over a manual axis of size 1 if other axes shard x, and gathers x
    # over those for an all-gather.
    return _alone_p.bind(x, axis_name=axis_name) if axis_name in varying_axes(x) else x
  return jax.lax.pmean(x.astype(jnp.float32), axis_name).astype(x.dtype)


_alone_p = Primitive("alone")  # x of the only device on an axis, typed as equal on all of them


def _alone_type(aval: Any, *, axis_name: str) -> Any:
  varying = _axes_of(aval) - {axis_name}
  if hasattr(aval, "manual_axis_type"):
    return aval.update(manual_axis_type=aval.manual_axis_type.update(varying=varying))
  return aval.update(vma=varying)


_alone_p.def_abstract_eval(_alone_type)
mlir.register_lowering(_alone_p, lambda _, x, *, axis_name: [x])
ad.deflinear2(_alone_p, lambda ct, _, *, axis_name: [vary(ct, axis_name)])
batching.primitive_batchers[_alone_p] = lambda xs, dims, *, axis_name: (
  _alone_p.bind(*xs, axis_name=axis_name),
  dims[0],
)


def cond(pred: jax.Array, true_fun: Any, false_fun: Any, *operands: Any) -> Any:
  """`jax.lax.cond` whose results are typed as varying wherever `pred` or either branch's result is.

  Under `shard_map` with replication checks the branches of a plain `lax.cond` must agree in type:
  "synchronised" (equal everywhere) and "kept" (differs) would not. And if `pred` differs the plain
  one types results of equal branches as equal, which they need not be.
  """
  false_fun, true_fun = _typed_alike((false_fun, true_fun), pred, operands)
  return jax.lax.cond(pred, true_fun, false_fun, *operands)


def switch(index: jax.Array, branches: Any, *operands: Any) -> Any:
  """`jax.lax.switch` with the types of `cond`."""
  return jax.lax.switch(index, _typed_alike(branches, index, operands), *operands)


def _typed_alike(branches: Any, index: jax.Array, operands: Any) -> list[Any]:
  # Traced once: the types are needed before the branches can be.
  branches = [jax.jit(fun, inline=True) for fun in branches]
  shapes = [jax.eval_shape(fun, *operands) for fun in branches]
  axes = jax.tree.map(lambda *s: _Axes(varying_axes(index).union(*map(_axes_of, s))), *shapes)

  def typed(fun):
    def branch(*args):
      return jax.tree.map(_vary_over, fun(*args), axes)

    return branch

  return [typed(fun) for fun in branches]


class _Axes:
  """A set of axis names as one leaf of a tree."""

  def __init__(self, names: frozenset[str]):
    self.names = names


def _axes_of(aval: Any) -> frozenset[str]:
  kind = getattr(aval, "manual_axis_type", None)
  return frozenset(kind.varying if kind else getattr(aval, "vma", None) or ())


def _vary_over(x: jax.Array, axes: _Axes) -> jax.Array:
  for name in sorted(axes.names - varying_axes(x)):
    x = jax.lax.pcast(x, name, to="varying")
  return x
