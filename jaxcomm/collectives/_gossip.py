"""Gossip: a weighted average with a few neighbours, by `ppermute`, in place of a mean over all."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives._common import check_axis_size
from jaxcomm.collectives._topologies import Phase, Topology
from jaxcomm.compressors._base import check_float


def gossip_mix(
  tree: Any,
  axis_name: str,
  topology: Topology,
  *,
  steps: int = 1,
  first_step: int | jax.Array = 0,
  alive: jax.Array | None = None,
) -> Any:
  r"""`steps` gossip steps: :math:`x_i \leftarrow \sum_j w_{ij} x_j`, all replicas at once.

  The sum is taken in float32 and cast to the dtype of each leaf. What all replicas share stays as
  it is, bit for bit.

  Wire: each replica sends the tree, in its own dtype, to `degree` others per step:
  `gossip_mix_bytes`. Over inner mesh axes nothing is sent: each device exchanges its own shards.

  Args:
    tree: arrays of any shape and float dtype; they may differ over `axis_name`.
    axis_name: axis of the replicas, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    topology: who averages with whom, e.g. `ring()`.
    steps: Q, at least 1.
    first_step: number of the first step, equal on all replicas; for topologies that change.
    alive: bool[N], equal on all replicas. Messages from and to the others are left out: who would
      have sent one keeps that part of its weight, so that the sum over all replicas stays. Only
      with a symmetric topology is the result an average; for others see `sgp`. Dead replicas keep
      their values, and these reach nobody, NaN included.

  Returns:
    A tree like `tree`, typed as differing over `axis_name`.

  Raises:
    ValueError: `steps` is below 1, the axis is unbound, a leaf is not floating point, `alive` is
      not bool[N], or there is no such topology of N replicas.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.collectives import gossip_mix, ring
    >>> mix = lambda x: gossip_mix(x, "replica", ring())
    >>> jax.vmap(mix, axis_name="replica")(jnp.array([0.0, 3.0, 0.0, 9.0])).tolist()
    [4.0, 1.0, 4.0, 3.0]
  """
  if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
    raise ValueError(f"`steps` must be an integer >= 1, got {steps!r}.")

  def mix(q, tree):
    error = gossip_error(tree, axis_name, topology, step=first_step + q, alive=alive)
    return jax.tree.map(lambda x, e: (x.astype(jnp.float32) + e).astype(x.dtype), tree, error)

  tree = jax.tree.map(jnp.asarray, tree)
  if steps == 1:
    return mix(0, tree)
  _axes.axis_size(axis_name)
  return jax.lax.fori_loop(0, steps, mix, _axes.vary(tree, axis_name))


def gossip_error(
  tree: Any,
  axis_name: str,
  topology: Topology,
  *,
  step: int | jax.Array = 0,
  alive: jax.Array | None = None,
) -> Any:
  r"""How far the neighbours' average is away: :math:`e_i = \sum_j w_{ij} x_j - x_i`, float32.

  The sum of e over all replicas is zero, up to rounding. Wire, arguments and errors: as one step of
  `gossip_mix`.
  """
  size = _axes.axis_size(axis_name)
  jax.tree.map(check_float, tree)
  _check_alive(alive, size)
  branches = [
    functools.partial(_phase_error, axis_name=axis_name, links=links, alive=alive)
    for links in topology.phases(size)
  ]
  tree = _axes.vary(tree, axis_name)
  if len(branches) == 1:
    return branches[0](tree)
  return jax.lax.switch(topology.phase(step, size), branches, tree)


def gossip_mix_bytes(
  shape: tuple[int, ...],
  axis_size: int,
  topology: Topology,
  *,
  steps: int = 1,
  dtype: Any = jnp.float32,
) -> int:
  """Bytes that the busiest of `axis_size` replicas sends in `gossip_mix` of one array.

  `steps * degree * elements * bytes per element`, with `degree` neighbours to send to.

  Example:
    >>> from jaxcomm.collectives import exponential, gossip_mix_bytes
    >>> gossip_mix_bytes((10,), 8, exponential(), steps=2)
    240
  """
  check_axis_size(axis_size)
  return steps * topology.degree(axis_size) * math.prod(shape) * jnp.dtype(dtype).itemsize


def consensus_distance(tree: Any, axis_name: str) -> jax.Array:
  r"""How far replicas are apart: :math:`\sqrt{\mathrm{mean}_i \|x_i - \bar x\|^2 / P}`.

  Float32[], equal on all replicas; P elements in the tree. Wire: a dense mean, so not for every
  step.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.collectives import consensus_distance
    >>> far = lambda x: consensus_distance(x, "replica")
    >>> jax.vmap(far, axis_name="replica")(jnp.array([[1.0], [3.0]])).tolist()
    [1.0, 1.0]
  """
  _axes.axis_size(axis_name)
  leaves = [x.astype(jnp.float32) for x in jax.tree.leaves(_axes.vary(tree, axis_name))]
  squares = [jnp.sum((x - _axes.pmean_f32(x, axis_name)) ** 2) for x in leaves]
  num_elements = sum(x.size for x in leaves)
  return jnp.sqrt(_axes.pmean_f32(sum(squares, start=jnp.zeros(())), axis_name) / num_elements)


def _phase_error(tree: Any, *, axis_name: str, links: Phase, alive: jax.Array | None) -> Any:
  weight = 1 / (len(links) + 1)

  def leaf(x):
    own = x.astype(jnp.float32)
    total = jnp.zeros_like(own)
    for link in links:
      pairs = [(source, i) for i, source in enumerate(link)]
      received = _ppermute(x, axis_name, pairs).astype(jnp.float32)
      if alive is None:
        total += received - own
      else:
        hears, is_heard = _live(alive, pairs, axis_name)
        total += jnp.where(hears, received, 0.0) - jnp.where(is_heard, own, 0.0)
    return weight * total

  return jax.tree.map(leaf, tree)


def _live(alive: jax.Array, pairs: list, axis_name: str) -> tuple[jax.Array, jax.Array]:
  """Whether this replica receives a message, and whether the one it sends arrives."""
  me = jax.lax.axis_index(axis_name)
  source = jnp.asarray([s for s, _ in pairs])  # ordered by target
  target = jnp.asarray([t for _, t in sorted(pairs)])
  return alive[me] & alive[source[me]], alive[me] & alive[target[me]]


def _ppermute(x: jax.Array, axis_name: str, pairs: list) -> jax.Array:
  """`jax.lax.ppermute` that keeps short floats short (XLA:CPU would send them as float32)."""
  if x.dtype.itemsize >= 4:
    return jax.lax.ppermute(x, axis_name, pairs)
  bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[x.dtype.itemsize])
  return jax.lax.bitcast_convert_type(jax.lax.ppermute(bits, axis_name, pairs), x.dtype)


def _check_alive(alive: Any, size: int) -> None:
  if alive is None:
    return
  shape, dtype = jnp.shape(alive), jnp.result_type(alive)
  if shape != (size,) or dtype != jnp.bool_:
    raise ValueError(f"`alive` must be bool[{size}], one entry per replica, got {dtype}{shape}.")
