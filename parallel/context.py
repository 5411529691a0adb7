"""Context parallelism: what a model must know of a sequence that is cut over devices.

Letters: W devices on the axis, B batch, S tokens here, H query heads, K key/value heads, C width.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel.allgather_attention import allgather_attention
from parallel.mesh import DATA, FSDP, REPLICA, SEQ, TENSOR
from parallel.ring_attention import ring_attention
from parallel.sequence_layout import Layout, check_layout, context_permutation, shard_tokens
from parallel.ulysses import ulysses_attention

Method = Literal["ring", "ulysses", "all_gather"]
_METHODS = {
  "ring": ring_attention,
  "ulysses": ulysses_attention,
  "all_gather": allgather_attention,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextParallel:
  """Who holds which tokens, and how attention crosses devices; a model takes it as `context`.

  In a region that is manual over `axis_name` (`jax.shard_map`) arrays are this device's tokens.
  Elsewhere, under `jax.jit` on a mesh where the axis is automatic, they are the whole sequence in
  the order of `context_permutation`, sharded over the axis; attention then opens a region of its
  own in each pass, over the axis, those of the batch, and `tensor`, which cuts heads.

  Raises:
    ValueError: an unknown method or layout, or a `granularity` that does not fit.

  Example:
    >>> context = ContextParallel(layout="contiguous", method="ulysses")
    >>> jax.vmap(context.positions, axis_name="seq")(jnp.zeros((3, 1, 2))).tolist()
    [[0, 1], [2, 3], [4, 5]]
  """

  axis_name: str = SEQ
  layout: Layout = "zigzag"  # contiguous: a causal ring waits for its last device
  granularity: int = 1  # tokens per stripe of "striped"
  method: Method = "ring"
  block_size: int = 512  # most tokens per tile of attention

  def __post_init__(self):
    if self.method not in _METHODS:
      raise ValueError(f"`method` must be one of {tuple(_METHODS)}, got {self.method!r}.")
    check_layout(2 * max(self.granularity, 1), 1, self.layout, self.granularity)

  def num_tokens(self, x: jax.Array) -> int:
    """Tokens of the whole sequence, for an array [B, S, ...] of tokens here."""
    return x.shape[1] if self._mesh(x) is not None else self._size(x) * x.shape[1]

  def positions(self, x: jax.Array) -> jax.Array:
    """int32[S]: places in the whole sequence of the tokens here, for an array [B, S, ...] of them.

    Raises:
      ValueError: there is no such layout of so many tokens.
    """
    size, length = self._size(x), x.shape[1]
    if self._mesh(x) is not None:
      return jnp.asarray(context_permutation(length, size, self.layout, self.granularity)[0])
    rank = jax.lax.axis_index(self.axis_name)
    places = shard_tokens(rank, size, length, self.layout, self.granularity)
    return jnp.asarray(places, jnp.int32)

  def psum(self, tree: Any, x: jax.Array) -> Any:
    """Sum over devices where [B, S, ...] `x` is one device's; `tree` where it is the sequence."""
    if self._mesh(x) is not None:
      return tree
    return jax.lax.psum(_axes.vary(tree, self.axis_name), self.axis_name)

  def attention(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    causal: bool = True,
  ) -> jax.Array:
    """[B, S, H, C], attention of the queries here over the whole sequence.

    Args: as in `ring_attention`, with S the tokens here.

    Raises:
      ValueError: as in `ring_attention`, or there is no such axis.
    """
    attend = functools.partial(
      _METHODS[self.method],
      axis_name=self.axis_name,
      layout=self.layout,
      granularity=self.granularity,
      causal=causal,
      block_size=self.block_size,
    )
    mesh = self._mesh(q)
    if mesh is None:
      return attend(q, k, v, segment_ids=segment_ids)
    rows = [a for a in (REPLICA, DATA, FSDP) if a in mesh.auto_axes and a != self.axis_name]
    if q.shape[0] % math.prod(mesh.shape[a] for a in rows):
      rows = []
    heads = [a for a in (TENSOR,) if a in mesh.auto_axes and k.shape[2] % mesh.shape[a] == 0]
    region = _Region(attend, mesh, tuple(rows), self.axis_name, tuple(heads))
    return _on_shards(region, q, k, v, segment_ids)

  def _mesh(self, x) -> Any:
    """The mesh on which the axis is the compiler's; None where it is manual (or of `jax.vmap`)."""
    mesh = jax.typeof(x).sharding.mesh
    automatic = self.axis_name in mesh.axis_names and self.axis_name not in mesh.manual_axes
    return mesh if automatic else None

  def _size(self, x) -> int:
    mesh = self._mesh(x)
    return _axes.axis_size(self.axis_name) if mesh is None else mesh.shape[self.axis_name]


@dataclasses.dataclass(frozen=True)
class _Region:
  """A region that is manual over the axes of rows, tokens and heads."""

  attend: Any
  mesh: Any
  rows: tuple[str, ...]
  tokens: str
  heads: tuple[str, ...]

  @property
  def ids(self) -> jax.P:
    """Of segment ids."""
    return jax.P(self.rows, self.tokens)

  @property
  def spec(self) -> jax.P:
    """Of queries, keys, values and output."""
    return jax.P(self.rows, self.tokens, self.heads)

  @property
  def stacked(self) -> jax.P:
    """Of arrays with an axis of devices in front."""
    return jax.P((*self.rows, self.tokens, *self.heads))

  def run(self, fn, in_specs, out_specs, *args):
    """`fn(*args)` on shards; its results differ wherever an argument does.

    JAX 0.10 moves what does not depend on the layer out of regions in a scan over layers, which
    fails for a checked region within one that is manual over other axes.
    """

    def local(*args):
      # A product forgets, as all else in an unchecked region does, that it differs outside.
      return fn(*jax.tree.map(lambda x: x * jnp.ones((), x.dtype), args))

    axes = {*self.rows, self.tokens, *self.heads}
    manual = jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=axes,
      check_vma=False,
    )
    return _axes.vary_like(manual(*args), args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _on_shards(region: _Region, q, k, v, ids):
  """`region.attend` on shards.

  JAX 0.10 cannot differentiate a manual region within one that is manual over other axes (as
  training is over `replica`), so both passes are such regions, and what the first keeps for the
  second leaves it stacked by device.
  """

  def local(q, k, v, ids):
    return region.attend(q, k, v, segment_ids=ids)

  return region.run(local, (*(region.spec,) * 3, region.ids), region.spec, q, k, v, ids)


def _on_shards_forward(region, q, k, v, ids):
  structures = []

  def local(q, k, v, ids):
    out, pull = jax.vjp(lambda *qkv: region.attend(*qkv, segment_ids=ids), q, k, v)
    kept, structure = jax.tree.flatten(pull)
    structures.append(structure)
    return out, [x[None] for x in kept]

  specs = (*(region.spec,) * 3, region.ids)
  out, kept = region.run(local, specs, (region.spec, region.stacked), q, k, v, ids)
  return out, jax.tree.unflatten(structures[-1], kept)


def _on_shards_backward(region, pull, grad):
  kept, structure = jax.tree.flatten(pull)

  def local(kept, grad):
    return jax.tree.unflatten(structure, [x[0] for x in kept])(grad)

  grads = region.run(local, (region.stacked, region.spec), region.spec, kept, grad)
  return *grads, None


_on_shards.defvjp(_on_shards_forward, _on_shards_backward)
