"""One run from start to summary: what every training script does around its model."""

import contextlib
import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jaxcomm.training._checkpoints import CheckpointError, Checkpoints
from jaxcomm.training._launch import FREE_ON_RESUME, RunConfig
from jaxcomm.training._loop import Loop, LoopConfig, LoopResult
from jaxcomm.training._progress import Progress, format_bytes
from jaxcomm.training._report import plot_report
from jaxcomm.training._run_folder import RunFolder, RunFolderError
from jaxcomm.training._signals import TerminationSignal
from jaxcomm.training._step import TrainStep
from jaxcomm.training._wire import StepWire, step_wire

# Rough rates for estimates before the first step; bf16 matrix peak at 40 % where known.
_FLOPS_PER_SECOND = {"H100": 0.4 * 989e12, "H200": 0.4 * 989e12, "A100": 0.4 * 312e12}
_FLOPS_PER_SECOND |= {"TPU v5 lite": 0.4 * 197e12, "TPU v5": 0.4 * 459e12, "TPU v4": 0.4 * 275e12}
_CPU_FLOPS_PER_SECOND = 4e10  # a laptop's whole processor


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
    sync_period: steps per round; None if every step exchanges, or none does.
    data: `name` and `sha256` of the data, for the summary.
    title: one line that names the run.
  """

  train_step: TrainStep
  batches: Iterator[Any]
  eval_batches: Callable[[], Iterable[Any]]
  batch_shapes: Any
  tokens_per_step: int
  flops_per_step: float
  sync_period: int | None
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
  say(_describe(config, task), flush=True)
  if config.dry_run:
    say(_describe_memory(_compile(task)[0]))
    return None
  started = time.perf_counter()
  result, wire = _train(config, task, folder, signal)
  if result.terminated:
    saved = (
      f"saved step {result.step} in {config.out}; --resume continues" if folder else "not saved"
    )
    say(f"SIGTERM: stopped after step {result.step} of {config.steps}, {saved}.", flush=True)
    return result
  if result.step_seconds:
    say(_describe_wire(task, wire, result.step_seconds, "measured"), flush=True)
  if folder is not None:
    folder.summarise(_summary(task, wire, result, time.perf_counter() - started))
    if first:
      plot_report(folder.path, title=task.title, dense_bytes_per_step=wire.dense)
      say(f"report: {folder.path / 'report.png'}", flush=True)
  say(_describe_end(result), flush=True)
  return result


def _open_folder(config: RunConfig, out: str, first: bool) -> RunFolder:
  """The run folder; if one process cannot use it, all of them raise."""
  may_change = FREE_ON_RESUME | {"replicas"}  # the checkpoint says what that needs
  saved, folder, error = dataclasses.asdict(config), None, None
  try:
    folder = RunFolder(out, saved, resume=config.resume, may_change=may_change, write=first)
  except (OSError, RunFolderError) as e:
    error = e
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    failed = multihost_utils.process_allgather(np.asarray(error is not None))
    if error is None and failed.any():
      error = RunFolderError(f"process {failed.argmax()} cannot use the run folder {out}.")
  if error is not None:
    raise error
  assert folder is not None
  return folder


def _train(config, task, folder, signal) -> tuple[LoopResult, StepWire]:
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
      layout = task.train_step.layout
      checkpoints = stack.enter_context(Checkpoints(folder.checkpoints, layout, keep=config.keep))
    state, meta = _start(config, task, folder, checkpoints)  # refuses before anything is compiled
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
      signal=signal,
      data=task.data,
    )
    return loop.run(state, meta=meta), wire


def _compile(task: Task) -> tuple[jax.stages.Compiled, StepWire]:
  """The compiled step and what it sends, which is printed."""
  started, say = time.perf_counter(), _say()
  compiled = task.train_step.compile(task.batch_shapes)
  wire = step_wire(task.train_step, compiled)
  say(f"compiled in {time.perf_counter() - started:.1f} s", flush=True)
  say(_describe_wire(task, wire, _guess_step_seconds(task), "estimated"), flush=True)
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
  return restored.state, restored.meta


def _say() -> Callable[..., None]:
  """`print` on the first process, nothing on the others."""
  return print if jax.process_index() == 0 else lambda *_, **__: None


def _num_params(task: Task) -> int:
  layout = task.train_step.layout
  leaves = zip(jax.tree.leaves(layout.shapes.params), jax.tree.leaves(layout.varying.params))
  return sum(math.prod(s.shape[1:] if varies else s.shape) for s, varies in leaves)


def _describe(config: RunConfig, task: Task) -> str:
  layout = task.train_step.layout
  mesh = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  device = layout.mesh.devices.flat[0].device_kind
  stacked = f", {config.replicas} replicas stacked on the devices" if layout.stacked else ""
  return (
    f"{task.title}\nparameters: {_num_params(task):,}\n"
    f"mesh: {mesh} on {layout.mesh.size} x {device}{stacked}"
  )


def _describe_wire(task: Task, wire: StepWire, step_seconds: float, how: str) -> str:
  kind = "logical, " if wire.logical else ""
  lines = [f"bytes sent per device and step ({kind}mean over a round):"]
  per_step = wire.per_step(task.sync_period)
  lines += [f"  {axis:<10} {format_bytes(sent)}" for axis, sent in per_step.items()]
  sent = per_step.get("replica", 0.0)
  ratio = f", {wire.dense / sent:,.1f} times as much" if sent else ""
  lines.append(f"  data parallel over replica would send {format_bytes(wire.dense)}{ratio}")
  speed = wire.break_even(task.sync_period, step_seconds)
  claim = f"below {speed * 8 / 1e6:,.1f} Mbit/s per device" if speed > 0 else "at no link speed"
  lines.append(
    f"faster than data parallel {claim} (at {1000 * step_seconds:.1f} ms of computation per step,"
    f" {how}; data parallel granted perfect overlap)"
  )
  return "\n".join(lines)


def _describe_memory(compiled: jax.stages.Compiled) -> str:
  memory = compiled.memory_analysis()
  if memory is None:
    return "memory per device: the compiler does not say"
  state = memory.argument_size_in_bytes
  fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
  temporary = memory.temp_size_in_bytes
  return (
    f"memory per device: {format_bytes(state + fresh + temporary)} (state and batch"
    f" {format_bytes(state)}, temporary {format_bytes(temporary)}, new outputs"
    f" {format_bytes(fresh)})"
  )


def _guess_step_seconds(task: Task) -> float:
  mesh = task.train_step.layout.mesh
  kind = mesh.devices.flat[0].device_kind
  rate = next((v for k, v in _FLOPS_PER_SECOND.items() if k in kind), None)
  total = _CPU_FLOPS_PER_SECOND if rate is None else rate * mesh.size
  return task.flops_per_step / total


def _summary(task: Task, wire: StepWire, result: LoopResult, seconds: float) -> dict[str, Any]:
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  device = task.train_step.layout.mesh.devices.flat[0]
  return {
    "title": task.title,
    "params": _num_params(task),
    "steps": result.step,
    "final_loss": result.loss,
    "eval_loss": result.eval_loss,
    "first_eval_loss": result.first_eval_loss,
    "wire_bytes_per_step": wire.per_step(task.sync_period),
    "dense_wire_bytes_per_step": wire.dense,
    "wire_bytes_total": result.wire_bytes_total,
    "wire_bytes_logical": wire.logical,
    "step_seconds": result.step_seconds,
    "wall_seconds": round(seconds, 2),
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


def _describe_end(result: LoopResult) -> str:
  parts = [f"done: {result.step} steps"]
  if result.loss is not None:
    parts.append(f"loss {result.loss:.4f}")
  if result.eval_loss is not None:
    start = result.first_eval_loss
    parts.append(
      f"eval loss {result.eval_loss:.4f}" + (f" (from {start:.4f})" if start is not None else "")
    )
  if result.wire_bytes_total is not None:
    parts.append(f"sent {format_bytes(result.wire_bytes_total)} per device")
  return ", ".join(parts)
