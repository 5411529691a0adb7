"""The one training loop: every script configures it, none has its own."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxcomm.training._checkpoints import CheckpointError, Checkpoints
from jaxcomm.training._layout import TrainState
from jaxcomm.training._metrics import all_finite, means, on_host
from jaxcomm.training._profile import ProfileWindow
from jaxcomm.training._progress import Progress
from jaxcomm.training._run_folder import RunFolder
from jaxcomm.training._signals import TerminationSignal
from jaxcomm.training._step import TrainStep
from jaxcomm.training._trackers import Tracker
from jaxcomm.training._wire import StepWire, bytes_over_replica


class NonFiniteLossError(RuntimeError):
  """Loss or parameters became NaN or infinite; the message names step and last checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
  """When the loop stops, logs, evaluates and saves; all periods in steps, 0 for never."""

  steps: int
  log_every: int = 10
  eval_every: int = 100
  save_every: int = 100
  tokens_per_step: int = 0

  def __post_init__(self):
    for name in ("steps", "log_every", "eval_every", "save_every", "tokens_per_step"):
      if getattr(self, name) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopResult:
  """Where the loop ended.

  Attributes:
    state: after the last step.
    step: steps taken in all.
    loss: of the last logged step; None if no step ran.
    eval_loss: of the last evaluation; None if there was none.
    first_eval_loss: before the first step of the run, if it was evaluated then.
    wire_bytes_total: bytes sent per device in all steps; None without a `StepWire`.
    step_seconds: median wall-clock of a step, without the first; None if fewer than two ran.
    wall_seconds: wall-clock of this start and of the earlier ones, of each up to its checkpoint.
    terminated: whether SIGTERM ended the loop early.
  """

  state: TrainState
  step: int
  loss: float | None
  eval_loss: float | None
  first_eval_loss: float | None
  wire_bytes_total: float | None
  step_seconds: float | None
  wall_seconds: float
  terminated: bool


class Loop:
  """Runs `TrainStep` over batches.

  While step n runs on the device the host reads the metrics of step n - 1, which is also when a
  non-finite loss stops the run (with several processes only at logged steps and evaluations, since
  reading is then a collective); parameters that are not finite are never saved. Evaluations also
  log `disagreement`, where the method exchanges and leaves replicas apart, in jobs of one process:
  between several it would send a dense mean that `wire` does not count. The iterator's state
  travels in every checkpoint; wire bytes are counted for every step from `wire`.

  Args:
    config: periods and length.
    train_step: from `make_train_step`.
    batches: yields this process's rows; `get_state()` and `set_state()` as grain iterators have.
    eval_batches: called for each evaluation; None for no evaluation.
    wire: what a step sends; None to leave the bytes out.
    folder: where to log; None for nowhere.
    checkpoints: of `train_step.logical_layout`, where to save; None for nowhere.
    progress: display; None for none.
    tracker: takes the rows too; None for none.
    profile: an entered `ProfileWindow`; None for no trace.
    started: `time.perf_counter()` from which to count `wall_seconds`; None for the call of `run`.
    signal: an entered `TerminationSignal` to heed; None to note SIGTERM only while `run` runs.
    data: name and hash of the data, kept in the checkpoints.
  """

  def __init__(
    self,
    config: LoopConfig,
    train_step: TrainStep,
    batches: Iterator[Any],
    *,
    eval_batches: Callable[[], Iterable[Any]] | None = None,
    wire: StepWire | None = None,
    folder: RunFolder | None = None,
    checkpoints: Checkpoints | None = None,
    progress: Progress | None = None,
    tracker: Tracker | None = None,
    profile: ProfileWindow | None = None,
    started: float | None = None,
    signal: TerminationSignal | None = None,
    data: dict[str, str] | None = None,
  ):
    self._config, self._ts, self._batches = config, train_step, batches
    self._eval_batches, self._wire = eval_batches, wire
    self._folder, self._checkpoints, self._progress = folder, checkpoints, progress
    self._tracker, self._profile = tracker, profile
    self._signal, self._data = signal, data
    self._started, self._seconds_before = started, 0.0
    self._loss: float | None = None
    self._eval_loss: float | None = None
    self._first_eval_loss: float | None = None
    self._disagreement: dict[str, float] = {}
    self._wire_total = 0.0
    self._durations: list[float] = []
    self._logged_at: tuple[int, float] = (0, time.perf_counter())

  def run(self, state: TrainState, *, meta: dict[str, Any] | None = None) -> LoopResult:
    """Trains from `state` until `config.steps` or SIGTERM.

    Args:
      state: donated. At step 0, or restored.
      meta: of the restored checkpoint: iterator state and counters. None at the start of a run.

    Raises:
      NonFiniteLossError: the loss, or a parameter about to be saved, is NaN or infinite.
      CheckpointError: a checkpoint could not be written.
    """
    step = int(state.step)
    if self._started is None:
      self._started = time.perf_counter()
    if meta is not None:
      self._load_meta(meta)
    elif step == 0 and self._config.eval_every:
      self._first_eval_loss = self._evaluate(state)
      if self._first_eval_loss is not None:
        self._log({"step": 0, "eval_loss": self._first_eval_loss})
    self._logged_at = (step, time.perf_counter())
    own = TerminationSignal() if self._signal is None else contextlib.nullcontext(self._signal)
    with own as signal:
      state, step = self._steps(state, step, signal)
      terminated = signal.received and step < self._config.steps
      if self._checkpoints is not None:
        self._checkpoints.wait()
        if step not in self._checkpoints.steps:
          self._save(step, state)
          self._checkpoints.wait()
    return LoopResult(
      state=state,
      step=step,
      loss=self._loss,
      eval_loss=self._eval_loss,
      first_eval_loss=self._first_eval_loss,
      wire_bytes_total=None if self._wire is None else self._wire_total,
      step_seconds=float(np.median(self._durations)) if self._durations else None,
      wall_seconds=self._wall_seconds(),
      terminated=terminated,
    )

  def _steps(self, state, step: int, signal: TerminationSignal) -> tuple[TrainState, int]:
    pending, before = None, None
    while step < self._config.steps and not signal.reached(step):
      batch = self._place(next(self._batches))
      step += 1
      if self._profile is not None:
        self._profile.before(step, state)
      with jax.profiler.StepTraceAnnotation("train", step_num=step):
        state, metrics = self._ts.step(state, batch)
      if pending is not None:
        self._read(*pending)
      now = time.perf_counter()
      if before is not None:
        self._durations.append(now - before)
      before = now
      pending = (step, metrics, None)
      if self._due(step, self._config.eval_every):
        jax.block_until_ready(metrics)
        self._read(step, metrics, self._evaluate(state))
        pending, before = None, None  # the evaluation is not part of a step's time
      if self._checkpoints is not None and self._due(step, self._config.save_every):
        if pending is not None:
          self._read(*pending)
          pending = None
        self._save(step, state)
    if pending is not None:
      self._read(*pending)
    return state, step

  def _due(self, step: int, period: int) -> bool:
    return period > 0 and (step % period == 0 or step == self._config.steps)

  def _place(self, batch):
    sharding = self._ts.batch_sharding
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

  def _read(self, step: int, metrics: dict[str, jax.Array], eval_loss: float | None) -> None:
    """Waits for a step's metrics, checks, counts and logs them."""
    level = int(metrics.get("level", 0))
    if self._wire is not None:
      self._wire_total += self._wire.sent(level)
    wanted = self._due(step, self._config.log_every) or eval_loss is not None
    if not wanted and jax.process_count() > 1:
      return  # reading would need all processes
    values = means(metrics)
    self._loss = values["loss"]
    if not math.isfinite(self._loss):
      self._stop_non_finite(f"the loss is {self._loss} at", step)
    if eval_loss is not None:
      self._eval_loss = eval_loss
    if wanted:
      self._log_step(step, values, level, eval_loss)
    elif self._progress is not None:
      self._progress.advance(step)

  def _log_step(self, step, values, level, eval_loss) -> None:
    now = time.perf_counter()
    last_step, last_time = self._logged_at
    self._logged_at = (step, now)
    tokens = (step - last_step) * self._config.tokens_per_step
    row = {"step": step, **values, "tokens_per_s": round(tokens / max(now - last_time, 1e-9), 1)}
    if self._wire is not None:
      row |= {"wire_bytes": self._wire.sent(level), "wire_bytes_total": self._wire_total}
    if eval_loss is not None:
      row |= {"eval_loss": eval_loss} | self._disagreement
    self._log(row)

  def _log(self, row: dict[str, Any]) -> None:
    if self._folder is not None:
      self._folder.log(row)
    if self._tracker is not None:
      self._tracker.log(row)
    if self._progress is not None:
      self._progress.report(row)

  def _evaluate(self, state: TrainState) -> float | None:
    if self._eval_batches is None:
      return None
    start = time.perf_counter()
    self._disagreement = self._measure(state)
    total = {"loss_sum": 0.0, "tokens": 0.0}
    for batch in self._eval_batches():
      parts = on_host(self._ts.evaluate(state, self._place(batch)))
      total = {k: total[k] + float(parts[k].astype(np.float64).sum()) for k in total}
    step, since = self._logged_at
    self._logged_at = (step, since + time.perf_counter() - start)  # tokens_per_s is of training
    return total["loss_sum"] / total["tokens"]

  def _measure(self, state: TrainState) -> dict[str, float]:
    """How far replicas are apart, of methods that exchange, where no slow link is in between."""
    if jax.process_count() > 1:  # a dense mean, behind the back of the wire meter
      return {}
    levels = () if self._wire is None else self._wire.levels
    if not any(bytes_over_replica(level) for level in levels) or self._ts.disagreement is None:
      return {}
    return means({"disagreement": self._ts.disagreement(state)})

  def _save(self, step: int, state: TrainState) -> None:
    assert self._checkpoints is not None
    if not all_finite(state.params):  # the loss shows it only one step later
      self._stop_non_finite("a parameter is not finite after", step)
    meta = {
      "data": self._data,
      "iterator": self._batches.get_state(),  # pyright: ignore[reportAttributeAccessIssue]
      "wire_bytes_total": self._wire_total,
      "loss": self._loss,
      "eval_loss": self._eval_loss,
      "first_eval_loss": self._first_eval_loss,
      "wall_seconds": self._wall_seconds(),
    }
    fresh = self._eval_loss if self._due(step, self._config.eval_every) else None
    self._checkpoints.save(step, self._ts.to_logical(state), meta, eval_loss=fresh)

  def _load_meta(self, meta: dict[str, Any]) -> None:
    self._batches.set_state(meta["iterator"])  # pyright: ignore[reportAttributeAccessIssue]
    self._wire_total = meta["wire_bytes_total"]
    self._loss, self._eval_loss = meta["loss"], meta["eval_loss"]
    self._first_eval_loss = meta["first_eval_loss"]
    self._seconds_before = meta.get("wall_seconds", 0.0)  # runs of older versions lack it

  def _wall_seconds(self) -> float:
    assert self._started is not None
    return self._seconds_before + time.perf_counter() - self._started

  def _stop_non_finite(self, what: str, step: int) -> None:
    saved = []
    if self._checkpoints is not None:
      with contextlib.suppress(CheckpointError):
        self._checkpoints.wait()
      saved = self._checkpoints.steps
    where = f"the last checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint"
    raise NonFiniteLossError(
      f"{what} step {step}; {where}. Try a lower learning rate, a longer warm-up or a smaller block"
      " size."
    )
