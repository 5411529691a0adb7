"""Config of the Ladder Transformer and its relatives. Import from `models.ladder`."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from models._llama_config import LlamaConfig

Residual = Literal["standard", "ladder", "parallel", "desync"]
_RESIDUALS = ("standard", "ladder", "parallel", "desync")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LadderConfig(LlamaConfig):
  """A Llama whose blocks read another residual stream.

  Raises:
    ValueError: as `LlamaConfig`, or a field does not fit `residual`.
  """

  residual: Residual = "ladder"
  # Of "ladder": a number of layers, the last ones, or their indices; None: all.
  ladder_layers: int | Sequence[int] | None = None
  # Of "desync": for each layer whether (attention, feed-forward) is summed over devices.
  reduce_pattern: tuple[tuple[bool, bool], ...] | None = None
  tensor_parallel_size: int = 1  # T of "desync", whose parameters depend on it

  def __post_init__(self):
    if self.residual not in _RESIDUALS:
      raise ValueError(f"`residual` must be one of {_RESIDUALS}, got {self.residual!r}.")
    for name, owner in (("ladder_layers", "ladder"), ("reduce_pattern", "desync")):
      if getattr(self, name) is not None and self.residual != owner:
        raise ValueError(f"`{name}` is for `residual` {owner!r}, got {self.residual!r}.")
    if self.residual == "ladder":
      layers = indices(self.ladder_layers, self.num_layers)
      object.__setattr__(self, "ladder_layers", layers)  # an int would not say which
    super().__post_init__()
    if self.sequence_parallel:
      raise ValueError("`sequence_parallel` must be False: blocks would wait for its gathers.")
    if self.residual == "desync":
      self._check_desync()
    elif self.tensor_parallel_size != 1:
      raise ValueError(
        "`tensor_parallel_size` is for `residual` 'desync', whose parameters depend on it, got"
        f" {self.tensor_parallel_size} with {self.residual!r}."
      )

  def _check_desync(self):
    size, pattern = self.tensor_parallel_size, self.reduce_pattern
    for name in ("num_heads", "num_kv_heads", "intermediate_size"):
      if getattr(self, name) % size:
        raise ValueError(
          f"`{name}` must be divisible by `tensor_parallel_size` = {size}, got"
          f" {getattr(self, name)}."
        )
    if pattern is None or len(pattern) != self.num_layers:
      raise ValueError(
        f"`reduce_pattern` must have a pair for each of the {self.num_layers} layers, got"
        f" {pattern}."
      )
    if not pattern[-1][1]:
      raise ValueError("`reduce_pattern` must sum the last feed-forward, got False there.")

  @property
  def kinds(self) -> tuple[Residual, ...]:
    """The routing of each layer."""
    if self.residual != "ladder":
      return (self.residual,) * self.num_layers
    chosen = indices(self.ladder_layers, self.num_layers)
    return tuple("ladder" if i in chosen else "standard" for i in range(self.num_layers))


def indices(layers: int | Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
  """The layers that are ladders; an int asks for that many, the last ones.

  Raises:
    ValueError: there are not so many, or an index is out of range or repeated.
  """
  if layers is None:
    return tuple(range(num_layers))
  if isinstance(layers, int):
    if isinstance(layers, bool) or not 0 <= layers <= num_layers:
      raise ValueError(f"`ladder_layers` must be in [0, {num_layers}], got {layers}.")
    return tuple(range(num_layers - layers, num_layers))
  found = tuple(sorted(layers))
  if len(set(found)) < len(found) or any(not 0 <= i < num_layers for i in found):
    raise ValueError(
      f"`ladder_layers` must be indices in [0, {num_layers}), none twice, got {tuple(layers)}."
    )
  return found


def desync_pattern(num_layers: int, every: int) -> tuple[tuple[bool, bool], ...]:
  """A sum after every `every`-th block, and after the last: 2 for Desync-2x, 4 for Desync-4x.

  Raises:
    ValueError: `every` is not positive and even, or 1 (all blocks).

  Example:
    >>> desync_pattern(2, 4)
    ((False, False), (False, True))
  """
  if every != 1 and (every < 2 or every % 2):
    raise ValueError(f"`every` must be 1 or even, got {every}.")
  blocks = [i % every == 0 or i == 2 * num_layers for i in range(1, 2 * num_layers + 1)]
  return tuple(zip(blocks[::2], blocks[1::2]))
