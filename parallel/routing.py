"""Random routes between replicas of neighbouring pipeline stages (NoLoCo, arXiv 2506.10911, §3.2).

A microbatch that leaves a stage of one replica enters the next stage of a random other one, and its
gradient returns by the same way. So every replica learns from the data of all, without an exchange
of weights or gradients.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxcomm import _axes
from parallel.mesh import REPLICA

Kind = Literal["shift", "table"]
Table = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRoute:
  """How a pipeline draws the routes of microbatches.

  `table` lists permutations of the replicas: replica r sends to replica `table[q][r]`. For kind
  "shift" these are all cyclic shifts, by which every replica is as likely as any other.

  Raises:
    ValueError: an unknown kind, or a table that is missing, idle or no list of permutations.
  """

  axis_name: str = REPLICA
  seed: int = 0
  kind: Kind = "shift"
  table: Table | None = None

  def __post_init__(self):
    if self.kind not in ("shift", "table"):
      raise ValueError(f"`kind` must be 'shift' or 'table', got {self.kind!r}.")
    if (self.kind == "table") != (self.table is not None):
      raise ValueError(f"`table` belongs to kind 'table', got {self.table} with {self.kind!r}.")
    for row in self.table or ():
      if sorted(row) != list(range(len(row))):
        raise ValueError(f"`table` must have permutations of the replicas as rows, got {row}.")

  def permutations(self) -> Table:
    """The permutations among which each route is drawn; to be called where the axis is bound.

    Raises:
      ValueError: the axis is unbound, or a row of the table has not its size.
    """
    size = _axes.axis_size(self.axis_name)
    if self.table is None:
      return tuple(tuple((r + shift) % size for r in range(size)) for shift in range(size))
    if not self.table or any(len(row) != size for row in self.table):
      raise ValueError(
        f"`table` must have rows of length {size}, the size of axis '{self.axis_name}', got"
        f" {self.table}."
      )
    return self.table

  def draw(self, step: Any, microbatch: Any, boundary: Any) -> jax.Array:
    """int32[]: which of `permutations()`; a function of the arguments and the seed alone."""
    key = jax.random.key(self.seed)
    for part in (step, microbatch, boundary):
      key = jax.random.fold_in(key, part)
    return jax.random.randint(key, (), 0, len(self.permutations()))

  def move(self, tree: Any, send: Callable[[jax.Array, tuple[int, ...]], jax.Array], index: Any):
    """`send(x, permutation)` of every array with the permutation of number `index`.

    The compiled program has a branch per permutation. `index` must be equal on all devices.
    """
    if differs := _axes.varying_axes(index):
      raise ValueError(f"`step` of a route must be equal on all devices, differs on {differs}.")
    branches = [
      lambda tree, permutation=permutation: jax.tree.map(lambda x: send(x, permutation), tree)
      for permutation in self.permutations()
    ]
    return branches[0](tree) if len(branches) == 1 else jax.lax.switch(index, branches, tree)


def random_route(
  x: jax.Array,
  route: RandomRoute,
  *,
  step: Any,
  microbatch: Any = 0,
  boundary: Any = 0,
  inverse: bool = False,
) -> jax.Array:
  """`x` of the replica that sends to this one; a random permutation of the replicas.

  Wire: each device whose permutation moves it sends `x` once. The derivative goes back the same
  way.

  Args:
    x: any shape and dtype, differs over `route.axis_name`.
    route: axis, seed, and the permutations to choose from.
    step: int, equal on all devices like the next two; they and the seed decide on the permutation.
    microbatch: number of the microbatch.
    boundary: number of the stage that sends.
    inverse: back to where it came from.

  Raises:
    ValueError: the axis is unbound, the table does not fit it, or the numbers differ by device.

  Example:
    >>> go = lambda x: random_route(x, RandomRoute(seed=1), step=7)
    >>> jax.vmap(go, axis_name="replica")(jax.numpy.arange(4)).tolist()
    [2, 3, 0, 1]
  """

  def send(x, permutation):
    pairs = [(r, to)[:: -1 if inverse else 1] for r, to in enumerate(permutation)]
    return jax.lax.ppermute(x, route.axis_name, pairs)

  return route.move(x, send, route.draw(step, microbatch, boundary))
