"""Arrays of any shape seen as stacks of matrices."""

import dataclasses
import math

import jax


@dataclasses.dataclass(frozen=True)
class MatrixView:
  """An array as B matrices of n rows and m columns, cut where n + m is smallest.

  Attributes:
    shape: of the array.
    stacked: leading dimensions that count matrices; behind them at least two others.
  """

  shape: tuple[int, ...]
  stacked: int = 0

  @property
  def split(self) -> int:
    """The first dimension of the columns."""
    cuts = range(self.stacked + 1, len(self.shape))
    size = lambda i: math.prod(self.shape[self.stacked : i]) + math.prod(self.shape[i:])  # noqa: E731
    return min(cuts, key=size)

  @property
  def num_matrices(self) -> int:
    return math.prod(self.shape[: self.stacked])

  @property
  def rows(self) -> int:
    return math.prod(self.shape[self.stacked : self.split])

  @property
  def columns(self) -> int:
    return math.prod(self.shape[self.split :])

  def matrices(self, x: jax.Array) -> jax.Array:
    """[B, n, m]"""
    return x.reshape(self.num_matrices, self.rows, self.columns)

  def left_shape(self, rank: int) -> tuple[int, ...]:
    """Of [B, n, r], with as many dimensions as the array: r stands for all column dimensions."""
    ones = (1,) * (len(self.shape) - self.split - 1)
    return (*self.shape[: self.split], rank, *ones)

  def right_shape(self, rank: int) -> tuple[int, ...]:
    """Of [B, r, m], with as many dimensions as the array: r stands for all row dimensions."""
    ones = (1,) * (self.split - self.stacked - 1)
    return (*self.shape[: self.stacked], rank, *ones, *self.shape[self.split :])


def is_matrix(shape: tuple[int, ...], stacked: int) -> bool:
  """Whether an array of `shape` has rows, columns and elements."""
  return len(shape) - stacked >= 2 and math.prod(shape) > 0
