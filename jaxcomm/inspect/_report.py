"""What the wire meter found."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

_MAX_PATHS = 4096


class Branch(NamedTuple):
  """Branch number `index` of the `num_branches` of the HLO instruction `conditional`."""

  conditional: str
  index: int
  num_branches: int


@dataclasses.dataclass(frozen=True)
class CollectiveOp:
  """One array sent by one collective of the program.

  A collective of several arrays (XLA combines small ones) is one `CollectiveOp` per array.
  """

  name: str  # of the HLO instruction
  kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute
  dtype: str  # on the wire, as HLO writes it: f32, bf16, s8, u8
  shape: tuple[int, ...]  # of the local operand
  group_size: int  # devices that talk to each other
  axis: str  # mesh axes that a group spans, joined by commas; `none` if it is one device
  times: int  # executions of this collective per execution of the program
  bytes: float  # sent per device in all `times` executions
  branch: tuple[Branch, ...]  # conditionals around it, outermost first; () if it always runs


@dataclasses.dataclass(frozen=True)
class WireReport:
  """Bytes sent per device by one execution of a program (`collective_bytes`).

  A conditional runs one of its branches, and the program's text does not say which, so a report has
  two ends. *Taken*: every conditional runs the branch that sends most (a DiLoCo step with its
  sync). *Not taken*: every conditional runs the branch that sends least (a step without). Nested
  conditionals are decided inside the branch that was chosen. `total`, `by_axis` and `by_kind` are
  those of the taken end, or means per execution if `period` is given.

  Attributes:
    ops: every array that some branch sends; the branches' alternatives are all listed.
    period: executions per taken one that the means are over, or None.
  """

  ops: tuple[CollectiveOp, ...]
  period: int | None = None

  @property
  def total(self) -> float:
    """Bytes sent per device per execution: the worst execution, or the mean over `period`."""
    return self.always + self.conditional if self.period is None else self.amortised(self.period)

  @property
  def always(self) -> float:
    """Bytes that every execution sends: outside conditionals, and in their lightest branches."""
    return _total(self.ops_when(taken=False))

  @property
  def conditional(self) -> float:
    """Bytes that the heaviest branches send beyond the lightest."""
    return _total(self.ops_when(taken=True)) - self.always

  def amortised(self, period: float) -> float:
    """Mean bytes per execution if the heaviest branches run once in `period` executions.

    Raises:
      ValueError: `period` is below 1.

    Example:
      >>> op = CollectiveOp("ag", "all-gather", "u8", (64,), 4, "replica", 1, 192.0, ())
      >>> sync = dataclasses.replace(op, branch=(Branch("cond", 1, 2),))
      >>> WireReport((op, sync)).amortised(48)
      196.0
    """
    if period < 1:
      raise ValueError(f"`period` must be at least 1, got {period}.")
    return self.always + self.conditional / period

  @property
  def by_axis(self) -> dict[str, float]:
    """`total` per mesh axis, or comma-joined axes, in falling order."""
    return self._by("axis")

  @property
  def by_kind(self) -> dict[str, float]:
    """`total` per kind of collective, in falling order."""
    return self._by("kind")

  def by_axis_when(self, taken: bool) -> dict[str, float]:
    """Bytes per mesh axis of an execution that does, or does not, take its heaviest branches.

    A training loop adds `by_axis_when(step % sync_period == 0)` up.
    """
    return _sums(self.ops_when(taken), "axis")

  def by_axis_of_paths(self) -> list[dict[str, float]]:
    """Bytes per mesh axis for every way through the conditionals.

    One dict for a program without conditionals that send; for one conditional, one per branch;
    independent conditionals multiply.

    Raises:
      ValueError: there are more than 4096 ways.
    """
    return [_sums(path, "axis") for path in _paths(self.ops, 0)]

  def ops_when(self, taken: bool) -> tuple[CollectiveOp, ...]:
    """The part of `ops` that runs when conditionals are taken (heaviest branch) or not (lightest).

    Ties go to the branch with the lower index.
    """
    return tuple(_executed(self.ops, taken, 0))

  def _by(self, key: Literal["axis", "kind"]) -> dict[str, float]:
    taken = _sums(self.ops_when(True), key)
    if self.period is None:
      return taken
    least = _sums(self.ops_when(False), key)
    keys = dict.fromkeys([*taken, *least])
    more = {k: taken.get(k, 0.0) - least.get(k, 0.0) for k in keys}
    return _sorted({k: least.get(k, 0.0) + more[k] / self.period for k in keys})

  def __str__(self) -> str:
    """A table: one row per array sent, then bytes per axis and the two ends."""
    rows = [("collective", "axis", "array", "group", "times", "bytes", "branch")]
    for op in self.ops:
      array = f"{op.dtype}[{','.join(map(str, op.shape))}]"
      branch = "/".join(f"{b.conditional}[{b.index}]" for b in op.branch) or "-"
      row = (op.kind, op.axis, array, str(op.group_size), str(op.times), f"{op.bytes:,.0f}", branch)
      rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows]
    lines += [f"axis {axis}: {sent:,.0f} bytes" for axis, sent in self.by_axis.items()]
    lines.append(
      f"sent per device: {self.always:,.0f} bytes always, {self.conditional:,.0f} more in"
      " conditionals"
    )
    over = "worst execution" if self.period is None else f"mean over {self.period} executions"
    return "\n".join([*lines, f"total ({over}): {self.total:,.0f} bytes"])


def _executed(ops: Iterable[CollectiveOp], taken: bool, depth: int) -> list[CollectiveOp]:
  """The ops outside conditionals at this depth, and those of one branch of each conditional."""
  chosen, conditionals = _at_depth(ops, depth)
  for branches in conditionals.values():
    executed = [_executed(branch, taken, depth + 1) for branch in branches]
    chosen += max(executed, key=_total) if taken else min(executed, key=_total)
  return chosen


def _paths(ops: Iterable[CollectiveOp], depth: int) -> list[list[CollectiveOp]]:
  """What runs, for every choice of branches."""
  chosen, conditionals = _at_depth(ops, depth)
  paths = [chosen]
  for branches in conditionals.values():
    ways = [way for branch in branches for way in _paths(branch, depth + 1)]
    if len(paths) * len(ways) > _MAX_PATHS:
      raise ValueError(f"the program has more than {_MAX_PATHS} ways through its conditionals.")
    paths = [path + way for path in paths for way in ways]
  return paths


def _at_depth(
  ops: Iterable[CollectiveOp], depth: int
) -> tuple[list[CollectiveOp], dict[str, list[list[CollectiveOp]]]]:
  """The ops outside conditionals at this depth, and those of every branch of each conditional."""
  outside: list[CollectiveOp] = []
  conditionals: dict[str, list[list[CollectiveOp]]] = {}
  for op in ops:
    if len(op.branch) == depth:
      outside.append(op)
    else:
      branch = op.branch[depth]
      empty = [[] for _ in range(branch.num_branches)]
      conditionals.setdefault(branch.conditional, empty)[branch.index].append(op)
  return outside, conditionals


def _total(ops: Iterable[CollectiveOp]) -> float:
  return math.fsum(op.bytes for op in ops)


def _sums(ops: Iterable[CollectiveOp], key: Literal["axis", "kind"]) -> dict[str, float]:
  sums: dict[str, float] = {}
  for op in ops:
    sums[getattr(op, key)] = sums.get(getattr(op, key), 0.0) + op.bytes
  return _sorted(sums)


def _sorted(sums: dict[str, float]) -> dict[str, float]:
  return dict(sorted(sums.items(), key=lambda item: -item[1]))
