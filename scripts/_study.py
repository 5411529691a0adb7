"""What studies of quality share: a process per core, one loop, finished runs in a file."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Generic, TypeVar

JobT = TypeVar("JobT")
TUNE_SEED, SEEDS = 100, (0, 1, 2)  # what is tuned is not reported
EVAL_BATCH, EVAL_BATCHES = 64, 32


def set_up_worker() -> None:
  """Of one process: a thread, the CPU, the examples, and a cache of compiled programs."""
  os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
  import jax

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/xla").absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[concurrent.futures.Executor]:
  """So many processes, set up."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=spawn, initializer=set_up_worker
  ) as pool:
    yield pool


@functools.cache
def text_data(vocab_size: int, seq_len: int):
  """Rows for training, and evaluation batches."""
  from jaxcomm import data

  corpus = data.prepare_text("sympy", vocab_size=vocab_size)
  train = data.load_text(corpus, split="train", seq_len=seq_len)
  validation = data.load_text(corpus, split="validation", seq_len=seq_len)
  return train, list(data.eval_batches(validation, EVAL_BATCH, EVAL_BATCHES))


def make_step(flags: Any, model: ModuleType, cfg: Any):
  """The step of `model` under the `MethodConfig` flags, replicas stacked on one device."""
  import jax
  from lm_gossip import training_loss
  from lm_methods import build_transform

  from jaxcomm.training import make_train_step

  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
  axes = model.specs(cfg)
  stacked = jax.tree.map(lambda names: int("layers" in names), axes)
  specs = jax.tree.map(lambda _: jax.P(), axes)

  def loss(params, batch):
    return model.loss(params, batch, cfg)

  return make_train_step(
    training_loss(flags, loss),
    lambda key: model.init(key, cfg),
    build_transform(flags, specs, mesh, stacked),
    mesh,
    num_replicas=flags.replicas,
    eval_loss_fn=loss,
  )


class _Curve:
  """Stands in for the loop's progress display: keeps (step, evaluation loss)."""

  def __init__(self):
    self.points: list[tuple[int, float]] = []

  def advance(self, step: int) -> None:
    """Nothing to show."""

  def report(self, row: dict) -> None:
    """Keeps the rows of evaluations."""
    if "eval_loss" in row:
      self.points.append((row["step"], row["eval_loss"]))


def train(train_step: Any, batches: Any, validation: Any, *, steps: int, evals: int, seed: int):
  """Trains with the loop of every script, evaluating before it and `evals` times.

  Returns:
    Its result, None if the run diverged, and (step, evaluation loss) pairs.
  """
  import jax

  from jaxcomm.training import Loop, LoopConfig, NonFiniteLossError

  config = LoopConfig(steps=steps, log_every=0, save_every=0, eval_every=steps // evals)
  curve = _Curve()
  progress: Any = curve
  loop = Loop(config, train_step, batches, eval_batches=lambda: validation, progress=progress)
  try:
    return loop.run(train_step.init(jax.random.key(seed))), curve.points
  except NonFiniteLossError as e:
    print(e, flush=True)
    return None, curve.points


def job_of(job_type: type[JobT], row: dict[str, Any]) -> JobT:
  """The job of a result; rows of earlier versions lack what was then always the default."""
  fields: Any = dataclasses.fields(job_type)  # pyright: ignore[reportArgumentType]
  return job_type(**{f.name: row.get(f.name, f.default) for f in fields})


class Results(Generic[JobT]):
  """Finished runs on disk, one JSON object per line; each job, a frozen dataclass, runs once.

  Args:
    path: of the file.
    pool: where missing jobs run.
    job_type: dataclass whose fields a row has, all with defaults.
    run: makes the row of a job, with `eval_loss` (None: diverged) and `seconds`.
  """

  def __init__(
    self,
    path: pathlib.Path,
    pool: concurrent.futures.Executor,
    job_type: type[JobT],
    run: Callable[[JobT], dict[str, Any]],
  ):
    self._path, self._pool, self._run = path, pool, run
    self._done: dict[JobT, dict[str, Any]] = {}
    self._lock = threading.Lock()
    if path.exists():
      for line in path.read_text().splitlines():
        row = json.loads(line)
        self._done[job_of(job_type, row)] = row

  def losses(self, jobs: Sequence[JobT]) -> list[float]:
    """Evaluation losses of `jobs`, in order, running what is missing; infinite if diverged."""
    running = {self._pool.submit(self._run, job): job for job in jobs if job not in self._done}
    for future in concurrent.futures.as_completed(running):
      job, row = running[future], future.result()
      with self._lock, self._path.open("a") as f:
        f.write(json.dumps(row) + "\n")
      self._done[job] = row
      print(f"{row['eval_loss'] or math.inf:.4f} {row['seconds']:6.1f}s {job}", flush=True)
    losses = (self._done[job]["eval_loss"] for job in jobs)
    return [math.inf if loss is None else loss for loss in losses]

  def best(self, jobs: Sequence[JobT]) -> JobT:
    """The one of `jobs` with the lowest loss, the first of equals."""
    losses = self.losses(jobs)
    return jobs[losses.index(min(losses))]
