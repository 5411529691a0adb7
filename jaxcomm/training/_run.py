"""One run from start to summary: what every training script does around its model."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxcomm.inspect import current_compilation
from jaxcomm.training._checkpoints import CheckpointError, Checkpoints
from jaxcomm.training._describe import (
  describe_memory,
  describe_run,
  describe_setting,
  describe_wire,
  guess_step_seconds,
  num_params,
)
from jaxcomm.training._launch import RunConfig
from jaxcomm.training._loop import Loop, LoopConfig, LoopResult
from jaxcomm.training._profile import ProfileWindow, parse_window
from jaxcomm.training._progress import Progress
from jaxcomm.training._report import plot_report
from jaxcomm.training._results import describe_end, print_results
from jaxcomm.training._run_folder import RunFolder, RunFolderError, read_metrics
from jaxcomm.training._signals import TerminationSignal
from jaxcomm.training._step import TrainStep
from jaxcomm.training._trackers import TensorBoard, Tracker, Trackers, WandB
from jaxcomm.training._wire import StepWire, step_wire

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """What is trained, on what, and how often it exchanges.

  Attributes:
    train_step: from `make_train_step`.
    batches: this process's training rows, with `get_state` and `set_state`.
    eval_batches: gives the evaluation batches, anew at each call.
    batch_shapes: `jax.ShapeDtypeStruct`s of a global batch.
    tokens_per_step: over all replicas.
    flops_per_step: over all replicas, forward and backward, for the estimates before the start.
    exchange_shares: share of the steps at each level of exchange (`exchange_level`), for the means
      that are printed: (1,) if all steps send the same, (1 - 1 / H, 1 / H) for rounds of H.
    data: `name` and `sha256` of the data, for the summary.
    title: one line that names the run.
  """

  train_step: TrainStep
  batches: Iterator[Any]
  eval_batches: Callable[[], Iterable[Any]]
  batch_shapes: Any
  tokens_per_step: int
  flops_per_step: float
  exchange_shares: Sequence[float]
  data: dict[str, str]
  title: str


def run(config: RunConfig, task: Task) -> LoopResult | None:
  """Compiles, says what will cross the wire, trains, and leaves the run folder behind.

  SIGTERM at any time from here on: the step is finished, the state saved, and a line says so.

  Returns:
    Where the loop ended; None after a dry run, or if the run to resume had finished.

  Raises:
    RunFolderError, CheckpointError, NonFiniteLossError: see there.
  """
  with TerminationSignal() as signal:
    return _run(config, task, signal)


def _run(config: RunConfig, task: Task, signal: TerminationSignal) -> LoopResult | None:
  first, say = jax.process_index() == 0, _say()
  folder = None if config.out is None or config.dry_run else _open_folder(config, config.out, first)
  if config.resume and folder is not None and (folder.finished_steps or 0) >= config.steps:
    say(
      f"the run in {config.out} has already finished, at step {folder.finished_steps}: nothing to"
      " do. Give a larger --steps to train on.",
      flush=True,
    )
    return None
  say(describe_run(task), flush=True)
  if config.dry_run:
    compiled = _compile(task)[0]
    say(describe_memory(compiled))
    if (compilation := current_compilation()) is not None:
      compilation.programs.append((compiled, task.train_step.layout.mesh))
    return None
  result, wire = _train(config, task, folder, signal)
  if result.terminated:
    saved = (
      f"saved step {result.step} in {config.out}; --resume continues" if folder else "not saved"
    )
    say(f"SIGTERM: stopped after step {result.step} of {config.steps}, {saved}.", flush=True)
    return result
  if result.step_seconds:
    say(describe_wire(task, wire, result.step_seconds, "measured"), flush=True)
  summary = _summary(task, wire, result)
  if folder is not None:
    folder.summarise(summary)
  if first:
    _show(task, summary, folder)
  say(describe_end(summary), flush=True)
  return result


def _show(task: Task, summary: dict[str, Any], folder: RunFolder | None) -> None:
  """The picture and the table of a finished run."""
  if folder is None:
    print_results(summary, [])
    return
  inner = summary["wire_bytes_per_step"].keys() - {"replica"}  # then there is nothing to compare
  dense = 0.0 if inner else summary["dense_wire_bytes_per_step"]
  plot_report(
    folder.path, title=task.title, subtitle=describe_setting(task), dense_bytes_per_step=dense
  )
  print_results(summary, read_metrics(folder.path), folder.path)


def _open_folder(config: RunConfig, out: str, first: bool) -> RunFolder:
  may_change = config.free_on_resume | {"replicas"}  # the checkpoint says what that needs
  saved = dataclasses.asdict(config)

  def open_folder():
    return RunFolder(out, saved, resume=config.resume, may_change=may_change, write=first)

  return _together(open_folder, f"use the run folder {out}")


def _open_trackers(config: RunConfig, folder: RunFolder | None, step: int) -> Trackers:
  """What the flags ask for, on the first process; `step` is the last one taken so far."""

  def open_trackers():
    trackers: list[Tracker] = []
    if folder is not None and jax.process_index() == 0:
      rows = read_metrics(folder.path)
      if config.tensorboard:
        trackers.append(TensorBoard(folder.path / "tensorboard", rows, step + 1 if rows else 0))
      if config.wandb is not None:
        flags = dataclasses.asdict(config)
        trackers.append(WandB(folder.path, config.wandb, flags, rows))
    return Trackers(trackers)

  return _together(open_trackers, "start its logs")


def _together(make: Callable[[], T], what: str) -> T:
  """What `make` returns; if it fails in one process, all of them raise."""
  made, error = None, None
  try:
    made = make()
  except (OSError, ValueError, ImportError) as e:
    error = e
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    failed = multihost_utils.process_allgather(np.asarray(error is not None))
    if error is None and failed.any():
      error = RunFolderError(f"process {failed.argmax()} cannot {what}.")
  if error is not None:
    raise error
  assert made is not None
  return made


def _train(config, task, folder, signal) -> tuple[LoopResult, StepWire]:
  started = time.perf_counter()
  loop_config = LoopConfig(
    steps=config.steps,
    log_every=config.log_every,
    eval_every=config.eval_every,
    save_every=config.save_every,
    tokens_per_step=task.tokens_per_step,
  )
  with contextlib.ExitStack() as stack:
    checkpoints = None
    if folder is not None:
      stack.callback(folder.close)
      layout = task.train_step.logical_layout
      checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, layout, keep=config.keep))
    state, meta = _start(config, task, folder, checkpoints)  # refuses before anything is compiled
    trackers = stack.enter_context(_open_trackers(config, folder, int(state.step)))
    wire = _compile(task)[1]
    loop = Loop(
      loop_config,
      task.train_step,
      task.batches,
      eval_batches=task.eval_batches,
      wire=wire,
      folder=folder,
      checkpoints=checkpoints,
      progress=stack.enter_context(Progress(config.steps, quiet=jax.process_index() != 0)),
      tracker=trackers,
      profile=_profile(config, folder, stack),
      started=started,
      signal=signal,
      data=task.data,
    )
    result = loop.run(state, meta=meta)
    if not result.terminated:
      trackers.summary = _summary(task, wire, result)
    return result, wire


def _profile(config, folder, stack: contextlib.ExitStack) -> ProfileWindow | None:
  if config.profile_steps is None or folder is None:
    return None
  window = ProfileWindow(folder.path / "profile", *parse_window(config.profile_steps))
  return stack.enter_context(window)


def _compile(task: Task) -> tuple[jax.stages.Compiled, StepWire]:
  """The compiled step and what it sends, which is printed."""
  started, say = time.perf_counter(), _say()
  compiled = task.train_step.compile(task.batch_shapes)
  wire = step_wire(task.train_step, compiled)
  say(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
  say(describe_wire(task, wire, guess_step_seconds(task), "estimated"), flush=True)
  return compiled, wire


def _start(config, task, folder, checkpoints):
  say = _say()
  if not config.resume:
    return task.train_step.init(jax.random.key(config.seed)), None
  if not checkpoints.steps:
    if folder.finished_steps:
      raise CheckpointError(
        f"the run in {config.out} reached step {folder.finished_steps}, but its checkpoints are"
        " gone: it cannot go on. Start another run in another folder."
      )
    say("no checkpoint yet: starting from step 0.", flush=True)
    folder.continue_from(-1)
    return task.train_step.init(jax.random.key(config.seed)), None
  restored = checkpoints.restore(replica_change=config.replica_change)
  if restored.meta["data"] != task.data:
    raise CheckpointError(
      f"the run was trained on the data {restored.meta['data']}, which is now {task.data}."
    )
  folder.continue_from(restored.step)
  say(f"resumed from step {restored.step}.", flush=True)
  return task.train_step.from_logical(restored.state), restored.meta


def _say() -> Callable[..., None]:
  """`print` on the first process, nothing on the others."""
  return print if jax.process_index() == 0 else lambda *_, **__: None


def _summary(task: Task, wire: StepWire, result: LoopResult) -> dict[str, Any]:
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  device = task.train_step.layout.mesh.devices.flat[0]
  return {
    "title": task.title,
    "params": num_params(task),
    "steps": result.step,
    "final_loss": result.loss,
    "eval_loss": result.eval_loss,
    "first_eval_loss": result.first_eval_loss,
    "wire_bytes_per_step": wire.per_step(task.exchange_shares),
    "dense_wire_bytes_per_step": wire.dense,
    "wire_bytes_total": result.wire_bytes_total,
    "wire_bytes_logical": wire.logical,
    "step_seconds": result.step_seconds,
    "wall_seconds": round(result.wall_seconds, 2),
    "devices": f"{task.train_step.layout.mesh.size} x {device.device_kind}",
    "versions": {n: importlib.metadata.version(n) for n in names}
    | {"python": platform.python_version()},
    "git_commit": _git_commit(),
    "data": task.data,
  }


def _git_commit() -> str | None:
  folder = pathlib.Path(sys.argv[0]).resolve().parent
  command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
  try:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None
