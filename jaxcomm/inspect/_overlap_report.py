"""What the overlap report found."""

import dataclasses
from typing import Literal

from jaxcomm.inspect._costs import Work
from jaxcomm.inspect._report import Branch

Reason = Literal["overlapped", "dependency", "scheduler", "shared"]
Edge = Literal["start", "end", "both"]
_EXPOSED: tuple[Reason, ...] = ("dependency", "scheduler", "shared")
_SHOWN = 3  # kernels named in a row of the table


@dataclasses.dataclass(frozen=True)
class CollectiveOverlap:
  """One collective of the program and what runs, or could run, beside it.

  Attributes:
    name: of the HLO instruction that starts it.
    kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
    axis: mesh axes that its groups span, as in `CollectiveOp`.
    group: flattened ids of the devices of the first group.
    bytes: sent per device in one execution.
    times: executions per execution of the program.
    computation: the HLO computation that it stands in (a loop's body, say).
    branch: conditionals around it.
    asynchronous: whether it starts and ends in two places of the schedule.
    hidden: computation scheduled between start and end.
    available: computation elsewhere in the same computation that neither needs its result nor
      is needed for its operands, and that no other collective already has beside it.
    shared: the same, but already between start and end of another.
    waits_for: name of the last computation that its operands come from; empty if there is none.
    needed_by: name of the first computation that takes its result, so too.
  """

  name: str
  kind: str
  axis: str
  group: tuple[int, ...]
  bytes: float
  times: int
  computation: str
  branch: tuple[Branch, ...]
  asynchronous: bool
  hidden: tuple[Work, ...]
  available: tuple[Work, ...]
  shared: tuple[Work, ...]
  waits_for: str
  needed_by: str

  @property
  def num_matmuls(self) -> int:
    """Kernels with a matrix product (or loops of them) between start and end."""
    return sum(work.flops > 0 for work in self.hidden)

  @property
  def reason(self) -> Reason:
    """`overlapped`, or why not.

    - `dependency`: nothing independent of it exists between its operands and its users;
    - `scheduler`: something does, in `available`, and was not put there;
    - `shared`: all that is independent of it already runs beside other collectives.
    """
    if self.hidden:
      return "overlapped"
    if self.available:
      return "scheduler"
    return "shared" if self.shared else "dependency"


@dataclasses.dataclass(frozen=True)
class Step:
  """One entry of the schedule, for the timeline.

  `work` computes; `collective` (a number in `OverlapReport.collectives`) starts, ends, or both
  where it is synchronous; `body` is a loop that runs `times` times.
  """

  work: Work | None = None
  collective: int | None = None
  edge: Edge = "both"
  body: tuple["Step", ...] = ()
  times: int = 1
  name: str = ""


@dataclasses.dataclass(frozen=True)
class OverlapReport:
  """What `overlap_report` found.

  Attributes:
    collectives: in the order of the program.
    steps: the schedule, for `modelled_timeline`.
    uncounted: instructions whose FLOPs the text does not tell, and what they call.
  """

  collectives: tuple[CollectiveOverlap, ...]
  steps: tuple[Step, ...]
  uncounted: dict[str, str]

  @property
  def async_pairs(self) -> tuple[CollectiveOverlap, ...]:
    """Those that start and end in two places."""
    return tuple(c for c in self.collectives if c.asynchronous)

  @property
  def overlapped(self) -> tuple[CollectiveOverlap, ...]:
    """Those with computation between start and end."""
    return tuple(c for c in self.collectives if c.reason == "overlapped")

  @property
  def synchronous(self) -> tuple[CollectiveOverlap, ...]:
    """Those that the device waits for at once."""
    return tuple(c for c in self.collectives if not c.asynchronous)

  @property
  def exposed(self) -> tuple[CollectiveOverlap, ...]:
    """Those without computation beside them; `reason` says why."""
    return tuple(c for c in self.collectives if c.reason != "overlapped")

  def __str__(self) -> str:
    """A table: a row per collective, then counts."""
    if not self.collectives:
      return "overlap: the program has no collectives."
    head = ("collective", "kind", "axis", "times", "bytes", "reason", "beside it, or could be")
    rows = [head, *(_row(c) for c in self.collectives)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)).rstrip() for row in rows]
    by_reason = [f"{sum(c.reason == r for c in self.exposed)} {r}" for r in _EXPOSED]
    lines.append(
      f"overlap: {len(self.overlapped)} of {len(self.collectives)} collectives have computation"
      f" beside them, {len(self.synchronous)} are synchronous; exposed: {', '.join(by_reason)}"
    )
    lines += [f"FLOPs unknown: {name} ({call})" for name, call in self.uncounted.items()]
    return "\n".join(lines)


def _row(collective: CollectiveOverlap) -> tuple[str, ...]:
  beside = collective.hidden or collective.available or collective.shared
  beside = sorted(beside, key=lambda work: (-work.flops, -work.bytes))
  names = ", ".join(work.name for work in beside[:_SHOWN])
  more = f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else ""
  flops, moved = sum(w.flops for w in beside), sum(w.bytes for w in beside)
  cost = f" ({flops / 1e9:,.1f} GFLOP, {moved / 2**20:,.1f} MiB)" if beside else ""
  bound = f"after {collective.waits_for or '-'}, before {collective.needed_by or '-'}"
  return (
    collective.name,
    collective.kind,
    collective.axis,
    str(collective.times),
    f"{collective.bytes:,.0f}",
    collective.reason + ("" if collective.asynchronous else " (synchronous)"),
    f"{names}{more}{cost}" if beside else bound,
  )
