"""Which axes of a mesh share weights, gradients and optimizer state, and in which order."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Level = str | tuple[str, ...]
"""An axis, or several axes that one collective spans."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionPlan:
  """Placement of the state of data parallelism on the levels of a mesh.

  Each of `weights`, `gradients` and `optimizer` lists the mesh axes that share it, the fastest link
  first; () means a copy on every device. A level that is a tuple of axes is crossed by one
  collective, levels of their own are crossed one after the other. The axes of `weights` begin those
  of `gradients`, and these those of `optimizer`: then a device's part of the optimizer state lies
  inside its part of the gradients, and that inside its part of the weights, so that a gather over
  the last axes of the one is the other. Axes of the mesh that no field names hold copies, and
  average their gradients.

  Attributes:
    weights: axes over which every layer is gathered in the forward pass.
    gradients: axes over which the gradient of a layer is summed and scattered in the backward pass.
    optimizer: axes over which the float32 parameters and the optimizer's moments are sharded.
    secondary: if given, each device keeps its part over these first axes of `weights` from the
      forward pass on (ZeRO++'s hpZ), and the backward pass gathers over them only.
    weight_bits: 8 or 4 to send weights as block integers rounded to nearest; None as they are.
    grad_bits: 8 or 4 for an axis of `gradients` or `optimizer`, rounded stochastically; axes not
      named send gradients as they are.
    block_size: elements per scale of quantized messages.
    min_size: leaves (of one layer) with fewer elements are not quantized, e.g. norms and biases.

  Raises:
    ValueError: axes repeated or not nested, `secondary` not a shorter beginning of `weights`, an
      unknown axis or number of bits, bits for a level of several axes, or a bad `block_size`.

  Sources: ZeRO (arXiv 1910.02054), ZeRO++ (arXiv 2306.10209), three levels on Frontier
  (arXiv 2501.04266; the placement of `topo` is our reading of it).

  >>> plan = PartitionPlan.topo()
  >>> plan.weights, plan.gradients, plan.optimizer
  (('gcd',), ('gcd', 'gpu'), ('gcd', 'gpu', 'node'))
  """

  weights: tuple[Level, ...] = ()
  gradients: tuple[Level, ...] = ()
  optimizer: tuple[Level, ...] = ()
  secondary: tuple[Level, ...] | None = None
  weight_bits: int | None = None
  grad_bits: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
  block_size: int = 256
  min_size: int = 2048

  def __post_init__(self):
    _check_nested(self)
    _check_secondary(self)
    _check_bits(self)

  @classmethod
  def zero(cls, stage: int, axes: str | Sequence[str]) -> "PartitionPlan":
    """ZeRO-1 (optimizer), 2 (and gradients) or 3 (and weights) over all `axes` as one level.

    >>> PartitionPlan.zero(2, "fsdp")  # doctest: +ELLIPSIS
    PartitionPlan(weights=(), gradients=('fsdp',), optimizer=('fsdp',), ...
    """
    if stage not in (1, 2, 3):
      raise ValueError(f"`stage` must be 1, 2 or 3, got {stage!r}.")
    names = _names("axes", axes)
    one: tuple[Level, ...] = (names,) if len(names) > 1 else names
    return cls(weights=one if stage == 3 else (), gradients=one if stage > 1 else (), optimizer=one)

  @classmethod
  def zeropp(
    cls,
    axes: Sequence[str],
    node_axes: str | Sequence[str],
    *,
    weight_bits: int | None = 8,
    grad_bits: int | Mapping[str, int] | None = 4,
    block_size: int = 256,
  ) -> "PartitionPlan":
    """ZeRO++: ZeRO-3 with 8-bit weights, 4-bit gradients and a secondary copy inside a node.

    Args:
      axes: all axes, in any order.
      node_axes: those inside a node, the fastest link first.
      weight_bits, grad_bits, block_size: see the class; one number of bits is for all axes.

    >>> PartitionPlan.zeropp(("node", "gpu"), "gpu").secondary
    ('gpu',)
    """
    names, inside = _names("axes", axes), _names("node_axes", node_axes)
    if not set(inside) < set(names):
      raise ValueError(f"`node_axes` must be some, not all, of `axes` {names}, got {inside}.")
    names = inside + tuple(a for a in names if a not in inside)
    bits = dict.fromkeys(names, grad_bits) if isinstance(grad_bits, int) else grad_bits
    return cls(
      weights=names,
      gradients=names,
      optimizer=names,
      secondary=inside,
      weight_bits=weight_bits,
      grad_bits=bits,
      block_size=block_size,
    )

  @classmethod
  def topo(
    cls,
    axes: Sequence[str] = ("gcd", "gpu", "node"),
    *,
    weight_bits: int | None = None,
    grad_bits: int | Mapping[str, int] | None = None,
    block_size: int = 256,
  ) -> "PartitionPlan":
    """Each thing on its own level: weights on the fastest link, optimizer state over all links.

    Weights over the first axis, gradients over all but the last, optimizer state over all. The
    slowest link then carries each step one gradient shard and one weight shard, however many
    micro-steps it has.

    Args:
      axes: at least two, the fastest link first.
      weight_bits, grad_bits, block_size: see the class; one number of bits is for all axes.
    """
    names = _names("axes", axes)
    if len(names) < 2:
      raise ValueError(f"`axes` must be two or more, the fastest link first, got {names}.")
    bits = dict.fromkeys(names, grad_bits) if isinstance(grad_bits, int) else grad_bits
    return cls(
      weights=names[:1],
      gradients=names[:-1],
      optimizer=names,
      weight_bits=weight_bits,
      grad_bits=bits,
      block_size=block_size,
    )

  @property
  def rebuild(self) -> tuple[Level, ...]:
    """Levels of `optimizer` beyond `weights`: crossed once a step to make weights of parameters."""
    return levels_after(self.optimizer, self.weights)

  @property
  def last_hops(self) -> tuple[Level, ...]:
    """Levels of `optimizer` beyond `gradients`: gradients cross them once a step."""
    return levels_after(self.optimizer, self.gradients)

  def bits_of_weights(self, size: int) -> int | None:
    """Bits per weight on the wire for a leaf of `size` elements a layer; None if not quantized."""
    return self.weight_bits if size >= self.min_size else None

  def bits_of_gradients(self, level: Level, size: int) -> int | None:
    """Bits per gradient over `level` for a leaf of `size` elements a layer; None: not quantized."""
    if size < self.min_size or not isinstance(level, str):
      return None
    return (self.grad_bits or {}).get(level)

  def padded_size(self, size: int, sizes: Mapping[str, int]) -> int:
    """Elements that a leaf of `size` elements a layer takes on a mesh of these axis sizes.

    A multiple of the devices of `optimizer`; where something is quantized, of as many blocks.
    """
    unit = math.prod(sizes[a] for a in axes_of(self.optimizer))
    levels = {*self.gradients, *self.optimizer}
    if self.bits_of_weights(size) or any(self.bits_of_gradients(a, size) for a in levels):
      unit *= self.block_size
    return max(-(-size // unit), 1) * unit


def axes_of(levels: Sequence[Level]) -> tuple[str, ...]:
  """The axes of `levels`, one after the other."""
  return tuple(a for level in levels for a in level_axes(level))


def level_axes(level: Level) -> tuple[str, ...]:
  """The axes of one level."""
  return (level,) if isinstance(level, str) else level


def levels_after(levels: Sequence[Level], first: Sequence[Level]) -> tuple[Level, ...]:
  """`levels` without the axes of `first`, which begin them."""
  gone = axes_of(first)
  left = (tuple(a for a in level_axes(level) if a not in gone) for level in levels)
  return tuple(names[0] if len(names) == 1 else names for names in left if names)


def layer_shapes(params: Any, stacked: Any) -> Any:
  """Tree like `params` with the float32 shape of one layer of each leaf.

  `stacked` is a tree prefix of bool: True where a leaf has a leading axis of layers.

  Raises:
    ValueError: a leaf is not floating point, or a stacked one has no axis.
  """

  def one(flag, path, x):
    name = jax.tree_util.keystr(path)
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"`params` must be floating point, got {x.dtype} at {name}: pass what is not trained with"
        " the batch, or close over it."
      )
    if flag and not x.shape:
      raise ValueError(f"`stacked` leaves need an axis of layers, got a scalar at {name}.")
    return jax.ShapeDtypeStruct(x.shape[1:] if flag else x.shape, jnp.float32)

  def part(flag, tree):
    return jax.tree.map(lambda _: flag, tree)

  flags = jax.tree.map(part, stacked, params)
  return jax.tree_util.tree_map_with_path(lambda path, x, f: one(f, path, x), params, flags)


def check_mesh(plan: PartitionPlan, axes: Sequence[str]) -> None:
  """Raises ValueError if `plan` names an axis that is not among those of the mesh."""
  if unknown := [a for a in axes_of(plan.optimizer) if a not in axes]:
    raise ValueError(f"`plan` names the axes {unknown}, which the mesh lacks: {tuple(axes)}.")


def _names(argument: str, axes: Any) -> tuple[str, ...]:
  names = (axes,) if isinstance(axes, str) else tuple(axes)
  if not names or not all(isinstance(a, str) for a in names):
    raise ValueError(f"`{argument}` must name one or more mesh axes, got {axes!r}.")
  return names


def _check_nested(plan: PartitionPlan) -> None:
  for name in ("weights", "gradients", "optimizer"):
    levels = getattr(plan, name)
    valid = isinstance(levels, tuple) and all(isinstance(x, str | tuple) for x in levels)
    if not valid or len(set(axes_of(levels))) < len(axes_of(levels)):
      raise ValueError(f"`{name}` must be a tuple of different axis names, got {levels!r}.")
  for inner, outer in (("weights", "gradients"), ("gradients", "optimizer")):
    few, many = axes_of(getattr(plan, inner)), axes_of(getattr(plan, outer))
    if many[: len(few)] != few:
      raise ValueError(
        f"`{outer}` must be sharded over a superset of the axes of `{inner}`, which begin it:"
        f" `{inner}` has {few}, got {many}."
      )


def _check_secondary(plan: PartitionPlan) -> None:
  if plan.secondary is None:
    return
  kept, all_axes = axes_of(plan.secondary), axes_of(plan.weights)
  if not kept or len(kept) >= len(all_axes) or all_axes[: len(kept)] != kept:
    raise ValueError(
      "`secondary` must be the first axes of `weights`, those inside a node, and not all of them:"
      f" `weights` has {all_axes}, got {kept}."
    )
  if plan.weights[: len(plan.secondary)] != plan.secondary:
    raise ValueError(
      f"`secondary` must end where a level of `weights` ends: {plan.weights}, got {plan.secondary}."
    )


def _check_bits(plan: PartitionPlan) -> None:
  if plan.weight_bits not in (None, 4, 8):
    raise ValueError(f"`weight_bits` must be 4, 8 or None, got {plan.weight_bits!r}.")
  known = axes_of(plan.optimizer)
  for axis, bits in (plan.grad_bits or {}).items():
    if axis not in known:
      raise ValueError(f"`grad_bits` must be for axes of the plan, {known}, got {axis!r}.")
    if bits not in (4, 8):
      raise ValueError(f"`grad_bits` must be 4 or 8, got {bits!r} for {axis!r}.")
  size = plan.block_size
  if isinstance(size, bool) or not isinstance(size, int) or size < 8 or size % 2:
    raise ValueError(f"`block_size` must be an even integer of at least 8, got {size!r}.")
  if plan.min_size < 0:
    raise ValueError(f"`min_size` must not be negative, got {plan.min_size}.")
  weights = [*plan.weights, *plan.rebuild] if plan.weight_bits else []
  gradients = [*plan.gradients, *plan.last_hops]
  joint = [x for x in weights if not isinstance(x, str)]
  joint += [x for x in gradients if not isinstance(x, str) and set(x) & set(plan.grad_bits or {})]
  if joint:
    raise ValueError(
      f"`weight_bits` and `grad_bits` need levels of one axis each, got the level {joint[0]}: list"
      " its axes as levels of their own."
    )
