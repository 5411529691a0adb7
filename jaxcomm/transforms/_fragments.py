"""Fragments of a tree of parameters: leaves, or layers of stacked leaves, that travel together."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm import _shards
from jaxcomm.transforms._checks import check_count
from jaxcomm.transforms._local_updates import check_alive, check_equal

Pattern = Literal["strided", "sequential"]


class FragmentsState(NamedTuple):
  """State of `streaming_diloco` and `decoupled_diloco`.

  Attributes:
    count: int32[], equal on all devices; updates taken.
    sent: int32[], equal on all devices; the fragment that the last update exchanged, from 1; 0 if
      none.
    anchor: like the parameters, float32, equal on all replicas: the outer parameters. Those of a
      fragment in flight have taken their outer step already.
    inner_state: of the inner optimizer, differs per replica.
    outer_states: of the outer chain, one for each fragment; equal on all replicas except
      error-feedback residuals.
  """

  count: jax.Array
  sent: jax.Array
  anchor: optax.Params
  inner_state: optax.OptState
  outer_states: tuple[optax.OptState, ...]

  @property
  def synced(self) -> jax.Array:
    """bool[], equal on all devices; whether the last update exchanged a fragment."""
    return self.sent > 0


def fragment_labels(
  params: Any, num_fragments: int, *, pattern: Pattern = "strided", stacked: Any = None
) -> Any:
  """The fragment of every leaf, or of every layer of a stacked leaf.

  Layers first: of L, fragment f of F takes f, f + F, f + 2 F, ... (`"strided"`), or the f-th run of
  neighbours (`"sequential"`). Then every other leaf (embeddings, norms, heads), the largest first,
  goes to the fragment that is the smallest so far: peaks of traffic are as even as leaves allow.

  Args:
    params: tree of arrays, or of `jax.ShapeDtypeStruct`.
    num_fragments: F.
    pattern: of the layers.
    stacked: tree like `params`, or one value for all, of 1 (or True) where the leading dimension
      counts layers; default nowhere.

  Returns:
    A tree like `params` of numpy int32[] in [0, F), or int32[L] for stacked leaves.

  Raises:
    ValueError: `num_fragments` is not an integer of at least 1, or more than there are leaves and
      layers for; `pattern` is another word, or `"sequential"` without layers; a stacked leaf has no
      dimension.

  References:
    Douillard et al., Streaming DiLoCo, https://arxiv.org/abs/2501.18512, section 2 (patterns).

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.transforms import fragment_labels
    >>> params = {"embed": jnp.ones((9, 2)), "layers": jnp.ones((4, 2)), "norm": jnp.ones(2)}
    >>> labels = fragment_labels(params, 2, stacked={"embed": 0, "layers": 1, "norm": 0})
    >>> {name: label.tolist() for name, label in labels.items()}
    {'embed': 0, 'layers': [0, 1, 0, 1], 'norm': 1}
  """
  check_count("num_fragments", num_fragments, at_least=1)
  if pattern not in ("strided", "sequential"):
    raise ValueError(f"`pattern` must be 'strided' or 'sequential', got {pattern!r}.")
  leaves, treedef = jax.tree.flatten(params)
  flags = _flags(treedef, stacked)
  if pattern == "sequential" and leaves and not any(flags):
    raise ValueError("`pattern` 'sequential' is one of layers, of which `stacked` names none.")
  labels: list[Any] = [None] * len(leaves)
  load = np.zeros(num_fragments, np.int64)
  for i in (i for i, flag in enumerate(flags) if flag):
    if not leaves[i].shape:
      raise ValueError("`stacked` must name leaves with a dimension of layers, got a scalar.")
    num_layers = leaves[i].shape[0]
    layer = np.arange(num_layers)
    strided = pattern == "strided"
    labels[i] = layer % num_fragments if strided else layer * num_fragments // num_layers
    np.add.at(load, labels[i], leaves[i].size // num_layers)
  rest = [i for i, flag in enumerate(flags) if not flag]
  for i in sorted(rest, key=lambda i: -leaves[i].size):
    labels[i] = np.argmin(load)
    load[labels[i]] += leaves[i].size
  labels = [np.asarray(label, np.int32) for label in labels]
  if leaves and (empty := num_fragments - len(_used(labels))):
    raise ValueError(
      f"`num_fragments` must be at most what {len(leaves)} leaves and their layers fill, got"
      f" {num_fragments}, of which {empty} would be empty."
    )
  return treedef.unflatten(labels)


def _flags(treedef: Any, stacked: Any) -> list[bool]:
  if stacked is None or isinstance(stacked, bool | int):
    return [bool(stacked)] * treedef.num_leaves
  return [bool(flag) for flag in _shards.leaves_like(treedef, stacked)]


def _used(labels: list[np.ndarray]) -> set[int]:
  return {int(x) for label in labels for x in np.ravel(label)}


def count_fragments(fragments: Any) -> int:
  """F of the argument `fragments`: an integer, or a tree of labels.

  Raises:
    ValueError: it is below 1, or labels are not the integers from 0 to F - 1.
  """
  if isinstance(fragments, int):
    check_count("fragments", fragments, at_least=1)
    return fragments
  labels = [np.asarray(x) for x in jax.tree.leaves(fragments)]
  integers = labels and all(np.issubdtype(x.dtype, np.integer) and x.ndim <= 1 for x in labels)
  used = _used(labels) if integers else set()
  if not used or used != set(range(len(used))):
    raise ValueError(
      "`fragments` must be an integer >= 1, or a tree of labels with every integer from 0 to F - 1,"
      f" got {sorted(used) or fragments!r}."
    )
  return len(used)


def check_spacing(sync_period: Any, num_fragments: int) -> int:
  """Steps between two fragments; raises ValueError unless that is an integer."""
  check_count("sync_period", sync_period, at_least=1)
  if sync_period % num_fragments:
    raise ValueError(
      f"`sync_period` must be a multiple of the number of `fragments`, {num_fragments}, got"
      f" {sync_period}."
    )
  return sync_period // num_fragments


@dataclasses.dataclass(frozen=True)
class Fragments:
  """The parts of trees like `labels` (`fragment_labels`)."""

  labels: Any

  def take(self, tree: Any, index: int) -> Any:
    """Fragment `index` of `tree`: layers of it sliced, and `optax.MaskedNode()` for the rest."""

    def leaf(x, label):
      if label.ndim == 0:
        return x if label == index else optax.MaskedNode()
      rows = np.flatnonzero(label == index)
      layers = [jax.lax.slice_in_dim(x, int(i), int(i) + 1) for i in rows]
      return jnp.concatenate(layers) if layers else optax.MaskedNode()

    return jax.tree.map(leaf, tree, self.labels)

  def put(self, tree: Any, index: int, part: Any) -> Any:
    """`tree` with `part`, which `take` shaped, in the place of its fragment `index`."""

    def leaf(x, label, part):
      if label.ndim == 0:
        return part if label == index else x
      for j, i in enumerate(np.flatnonzero(label == index)):
        layer = jax.lax.slice_in_dim(part, j, j + 1)
        x = jax.lax.dynamic_update_slice_in_dim(x, layer, int(i), 0)
      return x

    return jax.tree.map(leaf, tree, self.labels, part)


def make_fragments(params: Any, fragments: Any, pattern: Pattern, stacked: Any) -> Fragments:
  """The parts that the arguments of a method ask for.

  Raises:
    ValueError: as `fragment_labels`; labels of layers do not fit their leaf.
  """
  if isinstance(fragments, int):
    return Fragments(fragment_labels(params, fragments, pattern=pattern, stacked=stacked))
  leaves, treedef = jax.tree.flatten(params)
  labels = [np.asarray(x, np.int32) for x in _shards.leaves_like(treedef, fragments)]
  for x, label in zip(leaves, labels):
    if label.ndim and label.shape != x.shape[:1]:
      raise ValueError(
        f"`fragments` must label a leaf of shape {x.shape} with one integer, or with one for each"
        f" layer, got {label.tolist()}."
      )
  return Fragments(treedef.unflatten(labels))


def init_state(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  params: Any,
  fragments: Fragments,
  num_fragments: int,
) -> FragmentsState:
  """The state before the first update."""
  anchor = optax.tree.cast(params, jnp.float32)
  anchor = jax.tree.map(jnp.copy, anchor)  # donation: never the parameters' own buffer
  return FragmentsState(
    count=jnp.zeros((), jnp.int32),
    sent=jnp.zeros((), jnp.int32),
    anchor=anchor,
    inner_state=inner.init(params),
    outer_states=tuple(outer.init(fragments.take(anchor, p)) for p in range(num_fragments)),
  )


def outer_step(
  outer: optax.GradientTransformation,
  fragments: Fragments,
  index: int,
  local: Any,
  anchor: Any,
  outer_states: tuple[optax.OptState, ...],
  *,
  axis_name: str,
  weight: jax.Array | None = None,
  extra_args: dict[str, Any] | None = None,
) -> tuple[Any, tuple[optax.OptState, ...]]:
  """One step of `outer` on what replicas moved fragment `index`, `weight` times.

  `local` is that fragment of a replica's own parameters; `outer` takes `extra_args`.

  Returns:
    The outer parameters and the states of all fragments.
  """
  old = fragments.take(anchor, index)
  moved = jax.tree.map(lambda a, p: a - p.astype(jnp.float32), old, local)
  if weight is not None:  # what has no weight may be anything, also NaN
    moved = jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0.0), moved)
  extra_args = extra_args or {}
  check_alive(extra_args, outer_states)
  outer = optax.with_extra_args_support(outer)
  step, new = outer.update(moved, outer_states[index], old, **extra_args)
  check_equal(step, axis_name)
  anchor = fragments.put(anchor, index, jax.tree.map(jnp.add, old, step))
  return anchor, (*outer_states[:index], new, *outer_states[index + 1 :])
