"""Simulated clocks: when workers of different speeds finish, and when a quorum of them is in."""

import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxcomm.transforms._checks import check_count
from jaxcomm.transforms._fragments import check_spacing


class Arrival(NamedTuple):
  """A pseudo-gradient that reaches the server.

  Attributes:
    worker: who sends it.
    seconds: when it arrives.
    version: of the outer parameters that the worker started from: the arrivals that the server had
      taken when it sent them.
    age: arrivals since then.
  """

  worker: int
  seconds: float
  version: int
  age: int


def simulate_arrivals(
  step_seconds: Sequence[float],
  *,
  sync_period: int,
  num_arrivals: int,
  grace_seconds: float = 0.0,
) -> list[Arrival]:
  """The order in which workers of different speeds send their pseudo-gradients.

  A worker fetches the outer parameters, takes `sync_period` steps and sends. The server waits
  `grace_seconds` after the first arrival for others, or until all are in, and then sends the outer
  parameters to all that wait. Transfers take no time; ties go to the lower worker.

  Args:
    step_seconds: of each worker.
    sync_period: steps per pseudo-gradient.
    num_arrivals: how many to simulate.
    grace_seconds: 0 answers every worker at once.

  Raises:
    ValueError: a speed or a count is not positive, or `grace_seconds` is negative.

  References:
    The notebook of Liu et al., https://arxiv.org/abs/2401.09135, whose grace period this is (there
    the server knows who will come, and does not wait for nobody).

  Example:
    >>> from jaxcomm.transforms import simulate_arrivals
    >>> [(a.worker, a.age) for a in simulate_arrivals([1, 3], sync_period=2, num_arrivals=5)]
    [(0, 0), (0, 0), (0, 0), (1, 3), (0, 0)]
  """
  _check_seconds(step_seconds, grace_seconds)
  check_count("sync_period", sync_period, at_least=1)
  check_count("num_arrivals", num_arrivals, at_least=1)
  working = [(sync_period * s, worker, 0) for worker, s in enumerate(step_seconds)]
  heapq.heapify(working)
  arrivals: list[Arrival] = []
  while len(arrivals) < num_arrivals:
    deadline, waiting = working[0][0] + grace_seconds, []
    while working and working[0][0] <= deadline:
      seconds, worker, version = heapq.heappop(working)
      arrivals.append(Arrival(worker, seconds, version, len(arrivals) - version))
      waiting.append(worker)
    now = deadline if working else arrivals[-1].seconds
    for worker in waiting:
      finish = now + sync_period * step_seconds[worker]
      heapq.heappush(working, (finish, worker, len(arrivals)))
  return arrivals[:num_arrivals]


@dataclasses.dataclass(frozen=True)
class ArrivalSchedule:
  """What workers of different speeds do in T ticks of a clock. Made by `simulate_async`.

  Attributes:
    works: bool[T, N]; whether worker i ends an inner step in tick t.
    arrival: int32[T]; the worker whose pseudo-gradient the server takes after tick t, from 1; 0 for
      none.
    age: int32[T]; arrivals that the server took since that worker fetched the outer parameters.
    tick_seconds: length of a tick.
  """

  works: np.ndarray
  arrival: np.ndarray
  age: np.ndarray
  tick_seconds: float


def simulate_async(
  step_seconds: Sequence[float], *, num_ticks: int, sync_period: int
) -> ArrivalSchedule:
  """When the pseudo-gradients of workers of different speeds reach a server, in ticks.

  As `simulate_arrivals` without a grace period, but the server takes one arrival per tick, of the
  worker that waits longest, the lower one if two do; who waits takes no steps.

  Args:
    step_seconds: of each worker.
    num_ticks: T; a tick is the shortest of `step_seconds`.
    sync_period: steps per pseudo-gradient.

  Raises:
    ValueError: a speed or a count is not positive.

  Example:
    >>> from jaxcomm.transforms import simulate_async
    >>> clock = simulate_async([1, 1, 2], num_ticks=6, sync_period=2)
    >>> clock.arrival.tolist(), clock.age.tolist()
    ([0, 1, 2, 1, 3, 2], [0, 0, 1, 1, 3, 2])
    >>> clock.works[2].tolist()  # the second one waits until the server takes it
    [True, False, False]
  """
  _check_seconds(step_seconds, 0.0)
  check_count("num_ticks", num_ticks, at_least=1)
  check_count("sync_period", sync_period, at_least=1)
  seconds, tick = np.asarray(step_seconds, np.float64), float(min(step_seconds))
  num_workers = len(seconds)
  busy, done = np.zeros(num_workers), np.zeros(num_workers, int)  # seconds, steps of this round
  waited, version = np.zeros(num_workers, int), np.zeros(num_workers, int)
  works = np.zeros((num_ticks, num_workers), bool)
  arrival, age = np.zeros(num_ticks, np.int32), np.zeros(num_ticks, np.int32)
  arrivals = 0
  for t in range(num_ticks):
    active = done < sync_period
    busy[active] += tick
    works[t] = active & (busy * (1 + 1e-9) >= (done + 1) * seconds)
    done += works[t]
    waiting = done >= sync_period
    if not waiting.any():
      continue
    waited += waiting
    worker = int(np.argmax(waited))
    arrival[t], age[t] = worker + 1, arrivals - version[worker]
    arrivals += 1
    busy[worker], done[worker], waited[worker], version[worker] = 0, 0, 0, arrivals
  return ArrivalSchedule(works, arrival, age, tick)


@dataclasses.dataclass(frozen=True)
class QuorumSchedule:
  """What learners of different speeds do in T ticks of a clock. Made by `simulate_quorum`.

  Attributes:
    works: bool[T, N]; whether learner i ends an inner step in tick t.
    fragment: int32[T]; the fragment merged after tick t, from 1; 0 for none.
    weights: float32[T, N]; of each learner in that merge; they sum to 1, or are all 0.
    num_fragments: F.
    tick_seconds: length of a tick.
    goodput: inner steps taken, as a share of what the learners could take if none were ever down.
  """

  works: np.ndarray
  fragment: np.ndarray
  weights: np.ndarray
  num_fragments: int
  tick_seconds: float
  goodput: float


def simulate_quorum(
  step_seconds: Sequence[float],
  *,
  num_ticks: int,
  sync_period: int,
  num_fragments: int = 1,
  quorum: int,
  grace_seconds: float = 0.0,
  tokens_per_step: Sequence[float] | None = None,
  down: Sequence[tuple[int, float, float]] = (),
) -> QuorumSchedule:
  r"""Which learners are in each merge of Decoupled DiLoCo.

  Learners never wait. One reports fragment p every `sync_period` of its own steps, the first time
  after :math:`(p + 1) H / F`. A merge takes place once `quorum` learners have reported p, and
  after a grace window: it ends when all that are up have reported, when another fragment has its
  quorum and wants the link, and after `grace_seconds` at the latest. At most one merge per tick,
  the one that waits longest. With c tokens in n steps since the last merge of the fragment, which
  all learners take over, a report weighs

  .. math:: w_i \propto c_i \cdot c_i / n_i

  Args:
    step_seconds: of each learner.
    num_ticks: T; a tick is the shortest of `step_seconds`.
    sync_period: H.
    num_fragments: F, which divides H.
    quorum: learners that a merge needs, from 1 to N.
    grace_seconds: longest wait after the quorum.
    tokens_per_step: of each learner; default 1.
    down: (learner, from, to) in seconds: times in which a learner takes no step and is in no merge.
      It still takes over what is merged: it will restart from a healthy learner.

  Raises:
    ValueError: an argument outside these rules.

  References:
    Douillard et al., Decoupled DiLoCo, https://arxiv.org/abs/2604.21428 (quorum, grace window,
    weights). The ticks, and one merge per tick, are ours.

  Example:
    >>> from jaxcomm.transforms import simulate_quorum
    >>> clock = simulate_quorum([1, 1, 2], num_ticks=8, sync_period=4, quorum=2)
    >>> clock.fragment.tolist(), clock.weights[3].tolist(), round(clock.goodput, 2)
    ([0, 0, 0, 1, 0, 0, 0, 1], [0.5, 0.5, 0.0], 1.0)
  """
  _check_seconds(step_seconds, grace_seconds)
  for name, value in (("num_ticks", num_ticks), ("num_fragments", num_fragments)):
    check_count(name, value, at_least=1)
  check_count("quorum", quorum, at_least=1)
  if quorum > len(step_seconds):
    raise ValueError(f"`quorum` must be at most {len(step_seconds)} learners, got {quorum}.")
  tokens = [1.0] * len(step_seconds) if tokens_per_step is None else tokens_per_step
  if len(tokens) != len(step_seconds) or not all(0 < c < math.inf for c in tokens):
    raise ValueError(
      f"`tokens_per_step` must be a positive number for each of {len(step_seconds)} learners, got"
      f" {tokens_per_step!r}."
    )
  _check_down(down, len(step_seconds))
  every = check_spacing(sync_period, num_fragments)
  tick = float(min(step_seconds))
  works, up = _work(np.asarray(step_seconds, np.float64), tick, num_ticks, down)
  syncer = _Syncer(
    len(step_seconds), sync_period, every, num_fragments, quorum, grace_seconds / tick
  )
  merges = [syncer.tick(*row) for row in zip(works, up)]
  fragment = np.array([p for p, _ in merges], np.int32)
  raw = np.array([steps for _, steps in merges]) * np.square(np.asarray(tokens, np.float64))
  weights = raw / np.maximum(raw.sum(1, keepdims=True), 1e-30)
  undisturbed, _ = _work(np.asarray(step_seconds, np.float64), tick, num_ticks, ())
  return QuorumSchedule(
    works=works,
    fragment=fragment,
    weights=weights.astype(np.float32),
    num_fragments=num_fragments,
    tick_seconds=tick,
    goodput=float(works.sum() / undisturbed.sum()),
  )


def _work(seconds, tick, num_ticks, down):
  """bool[T, N] each: who ends a step in a tick, and who is up in all of it."""
  starts = tick * np.arange(num_ticks)
  up = np.ones((num_ticks, len(seconds)), bool)
  for learner, first, last in down:
    up[:, learner] &= (starts + tick <= first) | (starts >= last)
  worked = tick * np.cumsum(up, 0) * (1 + 1e-9)
  done = np.floor(worked / seconds)
  return np.diff(done, axis=0, prepend=0) > 0, up


class _Syncer:
  """Counts steps, and decides after each tick which fragment to merge, of whom."""

  def __init__(self, num_learners, sync_period, every, num_fragments, quorum, grace):
    self.sync_period, self.quorum, self.grace = sync_period, quorum, grace
    shape = (num_fragments, num_learners)
    self.to_report = np.zeros(shape, int) + every * np.arange(1, num_fragments + 1)[:, None]
    self.since_merge = np.zeros(shape, int)
    self.waited = np.full(num_fragments, -1)  # ticks since the quorum was in

  def tick(self, works, up):
    """The fragment merged, from 1, or 0; and the steps of each learner in it."""
    self.to_report -= works
    self.since_merge += works
    reported = (self.to_report <= 0) & (self.since_merge > 0) & up
    enough = reported.sum(1) >= self.quorum
    self.waited = np.where(enough, self.waited + 1, -1)
    p = int(np.argmax(self.waited))
    complete = (reported[p] == up).all()
    if not enough[p] or not (complete or enough.sum() > 1 or self.waited[p] >= self.grace):
      return 0, np.zeros(len(up))
    steps = np.where(reported[p], self.since_merge[p], 0)
    self.to_report[p, reported[p]] = self.sync_period
    self.since_merge[p] = 0
    self.waited[p] = -1
    return p + 1, steps


def _check_seconds(step_seconds: Sequence[float], grace_seconds: float) -> None:
  if not len(step_seconds) or not all(0 < s < math.inf for s in step_seconds):
    raise ValueError(f"`step_seconds` must be positive numbers, got {step_seconds!r}.")
  if not 0 <= grace_seconds < math.inf:
    raise ValueError(f"`grace_seconds` must be finite and at least 0, got {grace_seconds!r}.")


def _check_down(down: Sequence[tuple[int, float, float]], num_learners: int) -> None:
  for learner, first, last in down:
    if not 0 <= learner < num_learners or not 0 <= first < last:
      raise ValueError(
        f"`down` must be of learners below {num_learners}, each from a time to a later one, got"
        f" {(learner, first, last)!r}."
      )
