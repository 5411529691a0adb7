"""What a compiled program computes while its collectives are on their way."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxcomm.inspect._costs import Costs, Work
from jaxcomm.inspect._groups import device_groups
from jaxcomm.inspect._hlo import Instruction, Module
from jaxcomm.inspect._loops import Scope, trip_count
from jaxcomm.inspect._overlap_report import CollectiveOverlap, Edge, OverlapReport, Step
from jaxcomm.inspect._report import Branch
from jaxcomm.inspect._schedule import Schedule
from jaxcomm.inspect._wire import Meter, read_program

_MIN_BYTES = 2**16  # a kernel that moves less than this and multiplies nothing hides nothing


def overlap_report(
  compiled: jax.stages.Compiled | str,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
) -> OverlapReport:
  """Reads from the schedule of a compiled program what runs beside each collective.

  GPU programs have `all-reduce-start` and `-done` and the like (a pair marked `is_sync` counts as
  synchronous), TPU programs chains of fusions from `AsyncCollectiveStart` to `AsyncCollectiveDone`;
  CPU programs are synchronous. Of a loop one iteration is looked at: what another iteration could
  do beside a collective does not count as independent. FLOPs are those of matrix products; kernels
  with none that move less than 64 KiB are left out.

  Args:
    compiled: a `jax.stages.Compiled`, also ahead of time (`target`), or scheduled HLO text.
    mesh: the mesh that the program was compiled for, to name axes.

  Raises:
    TypeError, ValueError, NotImplementedError: as `collective_bytes`; also ValueError if a
      collective is started and never ended.

  Example:
    >>> hlo = '''HloModule m, is_scheduled=true, num_partitions=8
    ...
    ... ENTRY %main (p: f32[256,256]) -> f32[256,256] {
    ...   %p = f32[256,256]{1,0} parameter(0)
    ...   %s = f32[256,256]{1,0} all-reduce-start(%p), channel_id=1, replica_groups={},
    ...     use_global_device_ids=true, to_apply=%add
    ...   %dot = f32[256,256]{1,0} dot(%p, %p), lhs_contracting_dims={1}
    ...   %d = f32[256,256]{1,0} all-reduce-done(%s)
    ...   ROOT %r = f32[256,256]{1,0} add(%d, %dot)
    ... }'''
    >>> [(c.name, c.reason, c.num_matmuls) for c in overlap_report(hlo).collectives]
    [('s', 'overlapped', 1)]
  """
  reader = _Reader(read_program(compiled, mesh), mesh)
  reader.measure()
  return reader.report()


@dataclasses.dataclass(frozen=True)
class _Found:
  """A collective with its place in the schedule of `scope`."""

  scope: Scope  # the one that has the fusion or async-start around it
  start: int
  end: int
  fields: dict[str, Any]


class _Place:
  """A computation that collectives stand in: its schedule, its costs, and where they are."""

  def __init__(self, schedule: Schedule):
    self.schedule = schedule
    self.found: list[tuple[int, _Found]] = []
    self.works: list[Work] = []

  def overlap(self, found: _Found) -> CollectiveOverlap:
    """What runs, or could run, beside one of them."""
    schedule = self.schedule
    bound = schedule.before[found.start] | schedule.after[found.end] | schedule.after[found.start]
    needs, users = schedule.before[found.start], schedule.after[found.end]
    others = [i for i in self._matters if not bound >> i & 1 and not found.start < i < found.end]
    return CollectiveOverlap(
      asynchronous=found.end > found.start,
      hidden=self._take(i for i in self._matters if found.start < i < found.end),
      available=self._take(i for i in others if i not in self._beside),
      shared=self._take(i for i in others if i in self._beside),
      waits_for=self._name(i for i in reversed(self._matters) if needs >> i & 1),
      needed_by=self._name(i for i in self._matters if users >> i & 1),
      **found.fields,
    )

  @functools.cached_property
  def _matters(self) -> list[int]:
    """Positions of what takes time but is no collective."""
    own = {i for _, f in self.found for i in (f.start, f.end)}
    return [
      i for i, w in enumerate(self.works) if i not in own and (w.flops or w.bytes >= _MIN_BYTES)
    ]

  @functools.cached_property
  def _beside(self) -> set[int]:
    """Positions between the start and the end of any collective."""
    return set().union(*(range(f.start + 1, f.end) for _, f in self.found))

  def _take(self, positions: Iterable[int]) -> tuple[Work, ...]:
    return tuple(self.works[i] for i in positions)

  def _name(self, positions: Iterator[int]) -> str:
    """Of the first of them."""
    return next((self.works[i].name for i in positions), "")


class _Reader(Meter):
  """The wire meter, which also notes where in the schedule each collective stands."""

  def __init__(self, module: Module, mesh: Any):
    super().__init__(module, mesh)
    self.costs = Costs(module)
    self.found: list[_Found] = []
    self.places: dict[str, _Place] = {}

  def collective(
    self, scope: Scope, instruction: Instruction, times: int, branch: tuple[Branch, ...]
  ) -> None:
    """Counts as the meter does; repetitions of TPU chains are no collectives of their own."""
    num = len(self.ops)
    super().collective(scope, instruction, times, branch)
    ops = self.ops[num:]
    if not ops:
      return
    groups = device_groups(instruction, self.module)
    while scope.caller is not None and scope.site is not None:
      if scope.site.opcode not in ("fusion", "async-start"):
        break
      scope, instruction = scope.caller, scope.site
    place = self.places.setdefault(
      scope.computation.name, _Place(Schedule(self.module, scope.computation))
    )
    start = place.schedule.index(instruction.name)
    fields = {
      "name": instruction.name,
      "kind": ops[0].kind,
      "axis": ops[0].axis,
      "group": max(groups, key=len, default=()),
      "bytes": sum(op.bytes for op in ops) / max(times, 1),
      "times": times,
      "computation": scope.computation.name,
      "branch": branch,
    }
    found = _Found(scope, start, place.schedule.end(start), fields)
    place.found.append((len(self.found), found))
    self.found.append(found)

  def report(self) -> OverlapReport:
    """All that was found."""
    for place in self.places.values():
      scope = place.found[0][1].scope
      place.works = [self.costs.work(scope, i) for i in place.schedule.order]
    collectives = tuple(self.places[f.scope.computation.name].overlap(f) for f in self.found)
    return OverlapReport(collectives, self._steps(Scope(self.module.entry)), self.costs.uncounted)

  def _steps(self, scope: Scope) -> tuple[Step, ...]:
    """The schedule of a computation, with those of the loops, calls and branches in it."""
    edges = self._edges(scope.computation.name)
    steps: list[Step] = []
    for instruction in scope.computation.instructions.values():
      if instruction.name in edges:
        steps += [Step(collective=number, edge=edge) for number, edge in edges[instruction.name]]
      elif any(self.has_collective(name) for name in instruction.called):
        steps += self._inner(scope, instruction)
      else:
        work = self.costs.work(scope, instruction)
        steps += [Step(work=work)] if work.flops or work.bytes else []
    return tuple(steps)

  def _edges(self, computation: str) -> dict[str, list[tuple[int, Edge]]]:
    """Which collective an instruction starts or ends; of several calls the first stands for all."""
    edges: dict[str, list[tuple[int, Edge]]] = {}
    place = self.places.get(computation)
    if place is None:
      return edges
    for number, found in place.found:
      start, end = (place.schedule.order[i].name for i in (found.start, found.end))
      edges.setdefault(start, [(number, "both" if start == end else "start")])
      edges.setdefault(end, [(number, "end")])
    return edges

  def _inner(self, scope: Scope, site: Instruction) -> list[Step]:
    """The steps of a loop, a call, or of the heaviest branch of a conditional."""
    if site.opcode == "while":
      body = Scope(self.module.computation(site.computation_named("body")), scope, site)
      times = trip_count(self.module, scope, site) or 0
      return [Step(body=self._steps(body), times=times, name=site.name)]
    if site.opcode not in ("call", "conditional"):  # a later part of a chain, or of an async-start
      work = self.costs.work(scope, site)
      return [Step(work=work)] if work.flops or work.bytes else []
    branches = [
      self._steps(
        Scope(self.module.computation(name), scope, site, i + (site.opcode == "conditional"))
      )
      for i, name in enumerate(site.called)
    ]
    return list(max(branches, key=len, default=()))
