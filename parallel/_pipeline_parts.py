"""What the schedules of a pipeline share: microbatches, types, checks and hops between stages."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxcomm import _axes
from parallel.mesh import STAGE
from parallel.routing import RandomRoute

StageFn = Callable[[Any, jax.Array, Any], jax.Array]
InputFn = Callable[[Any, Any], jax.Array]
LossFn = Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """The static side of a pipeline: the work at its places, and how the places are linked."""

  stage_fn: StageFn
  input_fn: InputFn
  axis_name: str = STAGE
  num_microbatches: int
  remat: bool = True
  route: RandomRoute | None = None

  @property
  def size(self) -> int:
    """S."""
    return _axes.axis_size(self.axis_name)

  @property
  def rank(self) -> jax.Array:
    """Number of this stage."""
    return jax.lax.axis_index(self.axis_name)

  @property
  def first(self) -> jax.Array:
    """Whether this is the first stage."""
    return self.rank == 0

  @property
  def last(self) -> jax.Array:
    """Whether this is the last stage."""
    return self.rank == self.size - 1

  def valid(self, microbatch: Any) -> jax.Array:
    """Whether there is such a microbatch: if not, the tick is a bubble here."""
    return (microbatch >= 0) & (microbatch < self.num_microbatches)

  def enter(self, shared: Any, batch: Any, microbatch: jax.Array, received: Any) -> Any:
    """(input of the stage, data of its microbatch).

    In a bubble it is a real microbatch too: what a stage makes of zeros might not be finite.
    """
    own = read(batch, microbatch)
    fresh = self.first | ~self.valid(microbatch)
    x, data = received
    x = jnp.where(fresh, self.input_fn(shared, own), x)
    return x, own if data is None else where(fresh, own, data)

  def empty(self, x: jax.Array, batch: Any) -> Any:
    """What no stage has sent: like a message, which has data only if it is routed."""
    data = None if self.route is None else read(batch, 0)
    return jax.tree.map(jnp.zeros_like, (x, data))

  def leave(self, y: jax.Array, data: Any) -> Any:
    """The message to the next stage."""
    return y, None if self.route is None else data

  def forward(self, message: Any, tick: jax.Array, step: Any) -> Any:
    """The message of the stage before; stage s sends microbatch `tick - s`."""
    return self._hop(message, step, lambda boundary: tick - boundary, backward=False)

  def backward(self, grad: jax.Array, tick: jax.Array, step: Any) -> jax.Array:
    """The gradient from the stage behind, in lockstep 1F1B."""
    begin = tick - 2 * (self.size - 1)
    return self._hop(grad, step, lambda boundary: begin + boundary + 1, backward=True)

  def _hop(self, tree, step, microbatch_at, *, backward: bool):
    if self.size == 1:
      return tree
    route = self.route
    if route is None or _axes.axis_size(route.axis_name) == 1:
      pairs = _turned([(s, s + 1) for s in range(self.size - 1)], backward)
      return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis_name, pairs), tree)
    # All devices must take the same branch, but boundaries draw apart: one hop for each.
    received = jax.tree.map(jnp.zeros_like, tree)
    for boundary in range(self.size - 1):
      index = route.draw(step, jnp.maximum(microbatch_at(boundary), 0), boundary)
      moved = route.move(tree, self._sender(boundary, backward), index)
      received = where(self.rank == boundary + (not backward), moved, received)
      # Who has sent has no use for it any more: hops follow one another, on all devices alike.
      tree = where(self.rank == boundary + backward, moved, tree)
    return received

  def _sender(self, boundary, backward):
    """`send(x, permutation)` over one boundary, stage and replica changing at once."""
    assert self.route is not None
    replica, size = self.route.axis_name, self.size
    names = jax.sharding.get_abstract_mesh().axis_names
    # JAX 0.10 counts devices of several axes in the order of the mesh, not in that given.
    axes = tuple(name for name in names if name in (self.axis_name, replica))

    def send(x, permutation):
      num = len(permutation)

      def place(stage, r):
        return stage * num + r if axes[0] == self.axis_name else r * size + stage

      pairs = [(place(boundary, r), place(boundary + 1, to)) for r, to in enumerate(permutation)]
      return jax.lax.ppermute(x, axes, _turned(pairs, backward))

    return send


def _turned(pairs, backward):
  return [pair[::-1] for pair in pairs] if backward else pairs


def split(batch: Any, num_microbatches: int) -> Any:
  """[B, ...] to [M, B / M, ...], every M-th row in a microbatch: devices keep their rows.

  Raises:
    ValueError: `num_microbatches` does not divide the rows.
  """

  def leaf(x):
    if x.ndim < 1 or x.shape[0] % num_microbatches:
      raise ValueError(
        f"`num_microbatches` must divide the rows of `batch`, got {num_microbatches} for shape"
        f" {x.shape}."
      )
    return x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(leaf, batch)


def read(batch: Any, microbatch: Any) -> Any:
  """Microbatch of number `microbatch`, the nearest one if there is no such."""

  def leaf(x):
    index = jnp.clip(microbatch, 0, x.shape[0] - 1)
    return jax.lax.dynamic_index_in_dim(x, index, keepdims=False)

  return jax.tree.map(leaf, batch)


def where(pred: jax.Array, yes: Any, no: Any) -> Any:
  """`jnp.where`, leaf by leaf."""
  return jax.tree.map(lambda a, b: jnp.where(pred, a, b), yes, no)


def vary_alike(axis_name: str, *trees: Any) -> tuple[Any, ...]:
  """The trees, differing over `axis_name` and wherever one of them differs.

  Derivatives are then local, and summed once, at the end (`sum_like`).
  """
  return _axes.vary(_axes.vary_like(trees, trees), axis_name)


def sum_like(grads: Any, params: Any, *, known: frozenset[str] = frozenset()) -> Any:
  """Gradients summed over the axes, without `known`, over which their parameters are equal."""

  def leaf(grad, param):
    for axis in sorted(_axes.varying_axes(grad) - _axes.varying_axes(param) - known):
      grad = total(grad, axis)
    return grad

  return jax.tree.map(leaf, grads, params)


def total(tree: Any, axis_name: str) -> Any:
  """Sum over `axis_name`."""
  if _axes.axis_size(axis_name) > 1:
    return jax.lax.psum(tree, axis_name)
  # XLA fails on an all-reduce over a manual axis of size 1 if other axes shard x.
  return jax.tree.map(lambda x: x[0], _axes.all_gather_equal(tree, axis_name))


_COLLECTIVES = frozenset(
  ("psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather", "all_gather_invariant",
   "all_to_all", "reduce_scatter", "ragged_all_to_all")
)  # fmt: skip


def check_stage(line: Line, stage_params: Any, x: jax.Array, data: Any) -> None:
  """Raises ValueError if the stage changes its input's type, or communicates along the line."""
  jaxpr, out = jax.make_jaxpr(line.stage_fn, return_shape=True)(stage_params, x, data)
  got, want = jax.tree.map(lambda y: (y.shape, y.dtype), out), (x.shape, x.dtype)
  if got != want:
    raise ValueError(f"`stage_fn` must keep the shape and dtype of its input {want}, got {got}.")
  if line.axis_name in _axes_used(jaxpr.jaxpr):
    raise ValueError(
      f"`stage_fn` must not communicate over '{line.axis_name}': its stages work on different"
      " microbatches at any time, got a collective."
    )


def _axes_used(jaxpr) -> set[str]:
  """Axes of all collectives, also of nested programs."""
  used: set[str] = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in _COLLECTIVES:
      axes = eqn.params.get("axes", eqn.params.get("axis_name", ()))
      used.update(axes if isinstance(axes, tuple) else (axes,))
    for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_program):
      if _program(value):
        used |= _axes_used(getattr(value, "jaxpr", value))
  return used


def _program(value) -> bool:
  return isinstance(value, Jaxpr | ClosedJaxpr)
