"""ZeRO for an outer optimizer: each replica keeps and computes one part of its state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes, _shards
from jaxcomm.transforms._checks import check_count, check_floating, check_transform
from jaxcomm.transforms.healthy_mean import healthy_mean

P = jax.sharding.PartitionSpec


class ShardedOuterState(NamedTuple):
  """State of `sharded_outer`.

  Attributes:
    outer_state: of the outer optimizer, for this replica's part of every leaf.
  """

  outer_state: optax.OptState


def sharded_outer(
  outer: optax.GradientTransformation,
  axis_name: str,
  num_shards: int,
  *,
  specs: Any = None,
  skip_nonfinite: bool = False,
  alive: Any = None,
) -> optax.GradientTransformation:
  r"""The exact mean over `axis_name`, then `outer` on each replica's part of it.

  A reduce-scatter gives every replica the mean of its part, `outer` turns that into its part of
  the step, and an all-gather brings the parts together. The state of `outer`, its momentum say,
  takes 1/N of the memory: it is stored per replica. `outer` must act entry by entry.

  Every leaf is cut along its longest dimension that `specs` leave unsharded, padded with zeros to
  a multiple of N.

  Wire: a reduce-scatter and an all-gather of float32, each :math:`\frac{N-1}{N} 4d` bytes per
  device for `d` elements (with the padding): together as much as `pmean_over`.

  On restore: the state needs the same number of replicas; a replica change is refused.

  Args:
    outer: an optimizer without a mean, e.g. `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
    axis_name: axis of the replicas.
    num_shards: N, the size of that axis, which `init` cannot see.
    specs: how leaves are sharded over other mesh axes: a tree of `PartitionSpec` like the
      parameters, or one for all leaves; None: replicated.
    skip_nonfinite: as in `pmean_over`.
    alive: as in `pmean_over`.

  Returns:
    A `GradientTransformation` to be the outer chain of `diloco` or of `delayed`.

  Raises:
    ValueError: `outer` is not a transform, `num_shards` is not an integer of at least 1, a leaf
      has no dimension that `specs` leave unsharded; in update an unbound axis, one of another
      size than `num_shards`, or other axes of type Explicit larger than 1 (Auto ones will do).

  References:
    Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054, section 5; Sun et al., CO2,
    https://arxiv.org/abs/2401.16265.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import sharded_outer
    >>> tx = sharded_outer(optax.sgd(1.0, momentum=0.5), "replica", 2)
    >>> tx.init(jnp.zeros(6))[1].outer_state[0].trace.shape
    (3,)
    >>> grads = jnp.stack([jnp.arange(6.0), 3 * jnp.arange(6.0)])
    >>> step = jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name="replica")(grads)
    >>> step[0].tolist()
    [-0.0, -2.0, -4.0, -6.0, -8.0, -10.0]
  """
  check_transform("outer", outer)
  check_count("num_shards", num_shards, at_least=1)

  def cuts_of(tree):
    leaves, treedef = jax.tree.flatten(tree)
    given = P() if specs is None else specs
    one = isinstance(given, P)
    leaf_specs = [given] * len(leaves) if one else _shards.leaves_like(treedef, given)
    return treedef.unflatten([_Cut.of(x.shape, s, num_shards) for x, s in zip(leaves, leaf_specs)])

  def scatter(updates, state, params=None):
    del params
    _check_size(axis_name, num_shards)
    check_floating("updates", updates)
    return jax.tree.map(lambda g, cut: cut.mean(g, axis_name), updates, cuts_of(updates)), state

  mean = optax.GradientTransformation(optax.init_empty_state, scatter)
  if skip_nonfinite or alive is not None:
    mean = healthy_mean(mean, axis_name, skip_nonfinite=skip_nonfinite, alive=alive)

  def init_fn(params):
    parts = jax.tree.map(lambda p, cut: jnp.zeros(cut.part_shape, p.dtype), params, cuts_of(params))
    return ShardedOuterState(outer.init(parts))

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError("`params` must be given to update: they say how the parts come together.")
    cuts = cuts_of(params)
    own = jax.tree.map(lambda p, cut: cut.own(p, axis_name), params, cuts)
    step, outer_state = outer.update(updates, state.outer_state, own)
    whole = jax.tree.map(lambda part, cut: cut.whole(part, axis_name), step, cuts)
    return whole, ShardedOuterState(outer_state)

  return optax.chain(mean, optax.GradientTransformation(init_fn, update_fn))


@dataclasses.dataclass(frozen=True)
class _Cut:
  """How a leaf of `shape` is cut into `num` parts along `dim`; a scalar is a vector of one."""

  shape: tuple[int, ...]
  dim: int
  num: int

  @classmethod
  def of(cls, shape: tuple[int, ...], spec: P, num: int) -> "_Cut":
    view = shape or (1,)
    parts = [*spec, *(None,) * (len(view) - len(spec))]
    free = [d for d, part in enumerate(parts) if part is None]
    if not free:
      raise ValueError(f"`specs` must leave a dimension unsharded, got {spec} for shape {shape}.")
    return cls(tuple(shape), max(free, key=lambda d: view[d]), num)

  @property
  def length(self) -> int:
    """Of a part along `dim`."""
    return -(-(self.shape or (1,))[self.dim] // self.num)

  @property
  def part_shape(self) -> tuple[int, ...]:
    view = self.shape or (1,)
    return (*view[: self.dim], self.length, *view[self.dim + 1 :])

  def _padded(self, x: jax.Array) -> jax.Array:
    x = x if self.shape else x[None]
    missing = self.length * self.num - x.shape[self.dim]
    return jnp.pad(x, [(0, missing if d == self.dim else 0) for d in range(x.ndim)])

  def mean(self, x: jax.Array, axis_name: str) -> jax.Array:
    """This replica's part of the mean, summed in float32."""
    x = self._padded(_axes.vary(x, axis_name))
    if self.num == 1:
      return x
    total = jax.lax.psum_scatter(
      x.astype(jnp.float32), axis_name, scatter_dimension=self.dim, tiled=True
    )
    return (total / self.num).astype(x.dtype)

  def own(self, x: jax.Array, axis_name: str) -> jax.Array:
    """This replica's part of `x`."""
    start = jax.lax.axis_index(axis_name) * self.length
    return jax.lax.dynamic_slice_in_dim(self._padded(x), start, self.length, self.dim)

  def whole(self, part: jax.Array, axis_name: str) -> jax.Array:
    """The leaf, typed as equal everywhere, of all replicas' parts."""
    parts = _axes.all_gather_equal(part, axis_name)
    x = jnp.concatenate([parts[i] for i in range(self.num)], self.dim)
    x = jax.lax.slice_in_dim(x, 0, (self.shape or (1,))[self.dim], axis=self.dim)
    return x if self.shape else x[0]


def _check_size(axis_name: str, num_shards: int) -> None:
  size = _axes.axis_size(axis_name)
  if size != num_shards:
    raise ValueError(
      f"`num_shards` must be the size of axis `{axis_name}`, {size}, got {num_shards}."
    )
  if not _shards.inner_axes():
    return
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  inner = [a for a in _shards.inner_axes() if kinds[a] == jax.sharding.AxisType.Explicit]
  if inner:  # JAX 0.10 cannot lower the reduce-scatter there
    raise ValueError(f"`num_shards` must be left out on a mesh of Explicit axes, got {inner}.")
