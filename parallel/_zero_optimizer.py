"""Optimizers on shards: a norm over all of them, and the refusal of what mixes elements."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm import _axes


def clip_by_global_norm(
  max_norm: float, axis_names: str | Sequence[str]
) -> optax.GradientTransformation:
  r"""`optax.clip_by_global_norm` of updates that are sharded over `axis_names`.

  .. math:: u \leftarrow u \min(1, c / \|u\|), \qquad \|u\|^2 = \sum_{shards} \|u_s\|^2

  With `optax.clip_by_global_norm` each device would clip by the norm of its own part. Outside of
  `jax.shard_map`, where arrays are whole, it is the same as optax's.

  Wire: one all-reduce of a scalar. State: none.

  Args:
    max_norm: c, positive.
    axis_names: axes over which the updates are sharded: those of `PartitionPlan.optimizer`.

  Raises:
    ValueError: `max_norm` is not positive.

  >>> import jax, jax.numpy as jnp
  >>> tx = clip_by_global_norm(1.0, "fsdp")
  >>> clip = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="fsdp")
  >>> [round(x, 3) for x in clip(jnp.asarray([3.0, 4.0])).tolist()]
  [0.6, 0.8]
  """
  if not max_norm > 0:
    raise ValueError(f"`max_norm` must be positive, got {max_norm}.")
  names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)

  def update_fn(updates, state, params=None):
    del params
    squares = [jnp.sum(jnp.square(u.astype(jnp.float32))) for u in jax.tree.leaves(updates)]
    total = jnp.stack(squares).sum()
    bound = tuple(a for a in names if _is_bound(a))
    norm = jnp.sqrt(jax.lax.psum(total, bound) if bound else total)
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda u: (u * scale).astype(u.dtype), updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _is_bound(axis_name: str) -> bool:
  try:
    _axes.axis_size(axis_name)
  except ValueError:
    return False
  return True


def check_elementwise(tx: optax.GradientTransformation, shapes: Any, axes: Sequence[str]) -> None:
  """Raises ValueError unless `tx` does to flat shards what it does to whole parameters.

  Found by trying: two steps on a few numbers per leaf, whole in the leaf's rank, and cut into two
  flat shards. The halves differ in size and the first gradient is large, so that norms show.

  Args:
    tx: the transform.
    shapes: tree of `jax.ShapeDtypeStruct` of one layer of each leaf.
    axes: over which the shards lie; bound while `tx` runs.
  """
  flat = jax.tree.map(lambda s: jax.ShapeDtypeStruct((s.size,), s.dtype), shapes)
  sizes, want_sizes = (
    [x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, p))] for p in (flat, shapes)
  )
  names, count = tuple(axes) or ("none",), 2 if axes else 1
  whole = jax.tree.map(lambda s: jnp.asarray(_numbers(s.shape)[None]), shapes)
  parts = jax.tree.map(lambda x: x.reshape(count, -1), whole)
  message = (
    "`tx` must treat every element by itself, or sum over the shards, as"
    " parallel.clip_by_global_norm does: it sees flat shards of the parameters."
  )
  if sizes != want_sizes:
    raise ValueError(f"{message} Its state depends on the shape of a parameter.")
  try:
    got, want = _two_steps(tx, names, parts, count), _two_steps(tx, names, whole, 1)
  except (TypeError, ValueError) as e:
    raise ValueError(f"{message} Tried on {count} shards, it raised: {e}") from e
  if jax.tree.structure(got) != jax.tree.structure(want):
    raise ValueError(f"{message} Its state depends on the shape of a parameter.")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    a = a if a.size == b.size else a[0]  # a counter, once per shard
    if not np.allclose(a.reshape(-1), b.reshape(-1), rtol=1e-4, atol=1e-4 * np.abs(b).max()):
      raise ValueError(f"{message} On {count} shards it gave {a.reshape(-1)}, on the whole {b}.")


def _numbers(shape: tuple[int, ...]) -> np.ndarray:
  """Eight or more numbers in the rank of `shape`; the second half is larger than the first."""
  dims = (4, *(2,) * (len(shape) - 1)) if len(shape) > 1 else (8,)
  x = np.random.default_rng(len(shape)).normal(size=dims).astype(np.float32)
  x[len(x) // 2 :] *= 5
  return x


def _two_steps(tx: optax.GradientTransformation, names: Sequence[str], params: Any, n: int) -> Any:
  """(updates, state) after two steps of `params`, which has a leading axis of n shards."""

  def train(params):
    state, updates = tx.init(params), params
    for size in (1e3, 0.3):
      grads = jax.tree.map(lambda p, size=size: size * jnp.cos(3 * p) * p, params)
      updates, state = tx.update(grads, state, params)
    return updates, state

  lead = (n,) + (1,) * (len(names) - 1)
  fn = jax.vmap(train, axis_name="replica")
  for name in reversed(names):
    fn = jax.vmap(fn, axis_name=name)
  out = jax.jit(fn)(jax.tree.map(lambda x: x.reshape(*lead, 1, *x.shape[1:]), params))
  return jax.tree.map(lambda x: np.asarray(x).reshape(n, *x.shape[len(lead) + 1 :]), out)
