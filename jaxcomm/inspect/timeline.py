"""How long a compiled program would take on a machine, and what of it is waiting: a model.

Two engines: one computes, one communicates; each runs one thing at a time, in the order of the
schedule. A kernel takes the longer of its FLOPs at the peak rate and its bytes at the rate of the
memory; a collective the steps of its ring at the link's latency and its bytes at the link's rate.
Real kernels reach a part of these rates, so all times are lower bounds, and the shares of
communication upper ones.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxcomm.inspect._machines import Machine
from jaxcomm.inspect._overlap_report import CollectiveOverlap, OverlapReport, Step

_STEPS = {"all-reduce": lambda g: 2 * (g - 1), "collective-permute": lambda g: 1}
_COLORS = {"compute": "#4477aa", "communicate": "#cc3311"}
_MAX_SPANS = 20_000  # of the iterations of one loop; browsers and pictures take no more


@dataclasses.dataclass(frozen=True)
class Span:
  """Something that an engine does, from `start` to `end`, s; `rest` sums many iterations up."""

  engine: str  # compute or communicate
  name: str
  start: float
  end: float
  rest: bool = False

  def later(self, seconds: float) -> "Span":
    """The same, so much later."""
    return dataclasses.replace(self, start=self.start + seconds, end=self.end + seconds)


@dataclasses.dataclass(frozen=True)
class Timeline:
  """One modelled execution of a program on one device.

  Attributes:
    machine: the constants.
    seconds: of the execution.
    computing: of the engine that computes, s.
    communicating: of the engine that communicates, s.
    spans: what the engines do; of a loop of very many spans the first iteration, then one span for
      the others.
  """

  machine: Machine
  seconds: float
  computing: float
  communicating: float
  spans: tuple[Span, ...]

  @property
  def exposed(self) -> float:
    """Seconds in which nothing computes."""
    return max(self.seconds - self.computing, 0.0)

  @property
  def hidden_share(self) -> float:
    """Share of the communication that computation hides; 1 if there is none."""
    if not self.communicating:
      return 1.0
    return min(max(1 - self.exposed / self.communicating, 0.0), 1.0)

  def save_chrome_trace(self, path: str | pathlib.Path) -> None:
    """Writes JSON for chrome://tracing and ui.perfetto.dev."""
    engines = list(_COLORS)
    events: list[dict[str, Any]] = [
      {"ph": "M", "name": "thread_name", "pid": 0, "tid": i, "args": {"name": engine}}
      for i, engine in enumerate(engines)
    ]
    events += [
      {
        "ph": "X",
        "name": span.name,
        "pid": 0,
        "tid": engines.index(span.engine),
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
      }
      for span in self.spans
    ]
    about = {"modelled with": self.machine.describe()}
    pathlib.Path(path).write_text(json.dumps({"traceEvents": events, "otherData": about}))

  def plot(self, path: str | pathlib.Path, *, title: str = "") -> None:
    """Draws the two engines to a PNG; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, (engine, color) in enumerate(_COLORS.items()):
      for rest, alpha in ((False, 1.0), (True, 0.35)):
        spans = [s for s in self.spans if s.engine == engine and s.rest == rest]
        bars = [(s.start * 1e3, (s.end - s.start) * 1e3) for s in spans]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=color, alpha=alpha, lw=0)
    axes.set_yticks(range(len(_COLORS)), list(_COLORS))
    axes.set_xlim(0, self.seconds * 1e3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("milliseconds, modelled")
    hidden = f"{self.hidden_share:.0%} of communication hidden"
    axes.set_title(f"{title}\n{hidden}".strip(), loc="left", fontsize=10)
    figure.supxlabel(self.machine.describe(), fontsize=8, color="#666666")
    figure.savefig(path, dpi=150)


def modelled_timeline(report: OverlapReport, machine: Machine) -> Timeline:
  """Runs the schedule of `report` on `machine`, on paper.

  Of a conditional the branch with the most steps runs. A collective whose first group has members
  on several hosts (`Machine.devices_per_host`, devices in the order of the mesh) takes the network.

  Example:
    >>> from jaxcomm import inspect
    >>> hlo = '''HloModule m, is_scheduled=true, num_partitions=8
    ...
    ... ENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {
    ...   %p = f32[1024,1024]{1,0} parameter(0)
    ...   ROOT %r = f32[1024,1024]{1,0} all-reduce(%p), channel_id=1, replica_groups={},
    ...     use_global_device_ids=true, to_apply=%add
    ... }'''
    >>> timeline = inspect.modelled_timeline(inspect.overlap_report(hlo), inspect.H100)
    >>> round(timeline.seconds * 1e6, 1), timeline.hidden_share  # 7.3 MB at 450 GB/s, 14 steps
    (30.3, 0.0)
  """
  engines = _Engines(machine, report.collectives)
  engines.run(report.steps)
  return Timeline(
    machine,
    max(engines.now, engines.link_free),
    engines.computing,
    engines.communicating,
    tuple(engines.spans),
  )


def sensitivity(
  report: OverlapReport, machine: Machine, factors: Sequence[float] = (0.5, 1.0, 2.0)
) -> str:
  """A line per factor on the bandwidth of all links: step time, exposed time, share hidden."""
  lines = [f"modelled with {machine.describe()}"]
  for factor in factors:
    links = dataclasses.replace(
      machine,
      link_bandwidth=machine.link_bandwidth * factor,
      network_bandwidth=machine.network_bandwidth * factor,
    )
    t = modelled_timeline(report, links)
    lines.append(
      f"  links x {factor:g}: {t.seconds * 1e3:,.3f} ms, of which {t.exposed * 1e3:,.3f} exposed;"
      f" communication {t.communicating * 1e3:,.3f} ms, {t.hidden_share:.0%} hidden"
    )
  return "\n".join(lines)


def collective_seconds(collective: CollectiveOverlap, machine: Machine) -> float:
  """Time of one execution of a collective that has the links to itself."""
  group = collective.group
  hosts = {d // machine.devices_per_host for d in group} if machine.devices_per_host else set()
  if len(hosts) > 1:
    latency, bandwidth = machine.network_latency, machine.network_bandwidth
  else:
    latency, bandwidth = machine.link_latency, machine.link_bandwidth
  steps = _STEPS.get(collective.kind, lambda g: g - 1)(max(len(group), 1))
  return steps * latency + collective.bytes / bandwidth


class _Engines:
  """The two engines and their clocks."""

  def __init__(self, machine: Machine, collectives: Sequence[CollectiveOverlap]):
    self.machine = machine
    self.collectives = collectives
    self.now = self.link_free = self.computing = self.communicating = 0.0
    self.spans: list[Span] = []
    self._ends: dict[int, float] = {}

  def run(self, steps: Sequence[Step]) -> None:
    for step in steps:
      if step.work is not None:
        self._compute(step)
      elif step.collective is not None:
        self._communicate(step.collective, step.edge)
      else:
        self._loop(step)

  def _compute(self, step: Step) -> None:
    assert step.work is not None
    machine, work = self.machine, step.work
    took = max(work.flops / machine.peak_flops, work.bytes / machine.hbm_bandwidth)
    self.spans.append(Span("compute", work.name, self.now, self.now + took))
    self.now += took
    self.computing += took

  def _communicate(self, number: int, edge: str) -> None:
    if edge != "end":
      took = collective_seconds(self.collectives[number], self.machine)
      begin = max(self.now, self.link_free)
      self.link_free = self._ends[number] = begin + took
      self.communicating += took
      name = self.collectives[number].name
      self.spans.append(Span("communicate", name, begin, begin + took))
    if edge != "start":
      self.now = max(self.now, self._ends.get(number, self.now))

  def _loop(self, step: Step) -> None:
    """Iterations are alike and nothing is in flight between two: one is run, the others added."""
    if step.times < 1:
      return
    begin, first = self.now, len(self.spans)
    computing, communicating = self.computing, self.communicating
    self.run(step.body)
    others, took = step.times - 1, self.now - begin
    self.computing += (self.computing - computing) * others
    self.communicating += (self.communicating - communicating) * others
    self.now += took * others
    iteration = self.spans[first:]
    if len(iteration) * others <= _MAX_SPANS:
      for i in range(1, step.times):
        self.spans += [s.later(i * took) for s in iteration]
    elif others:
      name = f"{step.name}: {others} more iterations"
      for engine in sorted({span.engine for span in iteration}):
        self.spans.append(Span(engine, name, begin + took, self.now, rest=True))
