"""Quality at equal tokens: every method that exchanges rarely, late or with few, 4 and 8 replicas.

Every method gets the same tuning budget of eight full-length runs on seed 100, and is then run with
seeds 0, 1 and 2 (`METHODS` are the methods, `refine` is the second half of the budget):

- four learning rates, outer steps being plain averages (`dfedsam`: radius 0.05);
- then from the best of them, with an outer step: four outer settings, the inner rate lowered so
  that a round moves as far; `dfedsam`: two other radii and two finer rates; the rest: four finer
  rates.

With 8 replicas every method starts from what it found with 4 and tries that rate, a lower and a
higher one; `ddp` needs no trial: the mean gradient of the same batch is the same. Replicas are
stacked on one device, one process per core; the transforms are those of `examples/train_lm.py`.

The study of why H = 20 stays behind data parallelism (4-bit means, an exchange after every step,
three times as many steps, four times as many sequences per step) uses the settings found, and so
does the one of what Streaming DiLoCo's message, delay and mixing cost.

    python scripts/bench_quality.py --out docs/evidence/quality.jsonl    # resumes where it stopped
    python scripts/bench_quality.py --out docs/evidence/quality.jsonl --replicas 8 --methods co2 sgp
    python scripts/report_quality.py docs/evidence                       # tables and curves
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import pathlib
import sys
import threading
import time

SEQ_LEN, VOCAB = 32, 512
EVAL_BATCH, EVAL_BATCHES, NUM_EVALS = 64, 32, 10
TUNE_SEED, SEEDS = 100, (0, 1, 2)
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 16e-3)
FINER = (0.6, 0.8, 1.25, 1.6)
# Outer learning rate and momentum. The papers' own settings are among them.
OUTER = {
  "diloco": ((0.7, 0.9), (0.5, 0.8), (0.7, 0.6), (1.0, 0.5)),
  "streaming_diloco": ((0.7, 0.9), (0.5, 0.8), (0.7, 0.6), (1.0, 0.5)),
  "eager_diloco": ((0.7, 0.9), (0.5, 0.8), (0.7, 0.6), (1.0, 0.5)),
  "noloco": ((0.7, 0.5), (0.5, 0.8), (0.7, 0.6), (1.0, 0.5)),  # 0.9 is beyond its stability bound
  "co2": ((1.0, 0.2), (1.0, 0.5), (2.0, 0.0), (0.7, 0.6)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run. `sync_period` 0 means: no rounds."""

  method: str  # of train_lm.py, or "one": one replica alone
  sync_period: int = 0
  compressor: str = "none"
  lr: float = LEARNING_RATES[0]
  outer_lr: float = 1.0
  outer_momentum: float = 0.0
  seed: int = TUNE_SEED
  steps: int = 3000
  batch_size: int = 16  # sequences per step, over all replicas
  replicas: int = 4
  sam_rho: float = 0.0
  gossip_steps: int = 1
  delay: int = 1  # with `alpha`, of streaming_diloco
  alpha: float = 0.5

  @classmethod
  def of(cls, row: dict) -> "Job":
    """The job of a result; rows of earlier versions lack what was then always the default."""
    return cls(**{f.name: row.get(f.name, f.default) for f in dataclasses.fields(cls)})


METHODS = {
  "ddp": Job(method="ddp"),
  "one": Job(method="one"),
  "none": Job(method="none"),
  "diloco_5": Job(method="diloco", sync_period=5),
  "diloco": Job(method="diloco", sync_period=20),
  "diloco_50": Job(method="diloco", sync_period=50),
  "streaming_diloco": Job(method="streaming_diloco", sync_period=20, compressor="e3m0"),
  "eager_diloco": Job(method="eager_diloco", sync_period=20),
  "noloco": Job(method="noloco", sync_period=20),
  "co2": Job(method="co2", sync_period=12),
  "dfedsam": Job(method="dfedsam", sync_period=20, sam_rho=0.05, gossip_steps=2),
  "sgp": Job(method="sgp"),
}
# Of Streaming DiLoCo, what costs how much: without its message, delay, mixing, and all of these.
PARTS = ({"compressor": "none"}, {"delay": 0}, {"alpha": 0.0},
         {"compressor": "none", "delay": 0, "alpha": 0.0})  # fmt: skip
STUDY = ("diloco_5", "diloco", "diloco_50")  # with 4 replicas only, but for H = 20


@functools.cache
def _data():
  from jaxcomm import data

  corpus = data.prepare_text("sympy", vocab_size=VOCAB)
  train = data.load_text(corpus, split="train", seq_len=SEQ_LEN)
  validation = data.load_text(corpus, split="validation", seq_len=SEQ_LEN)
  return train, list(data.eval_batches(validation, EVAL_BATCH, EVAL_BATCHES))


def _method_flags(job: Job):
  from lm_methods import MethodConfig

  flags = {"sync_period": job.sync_period} if job.sync_period else {}
  if job.method == "dfedsam":
    flags |= {"sam_rho": job.sam_rho, "gossip_steps": job.gossip_steps}
  if job.method == "streaming_diloco":
    flags |= {"delay": job.delay, "alpha": job.alpha}
  return MethodConfig(
    method="none" if job.method == "one" else job.method,
    compressor=job.compressor,
    lr=job.lr,
    outer_lr=job.outer_lr,
    outer_momentum=job.outer_momentum,
    steps=job.steps,
    warmup=min(100, job.steps // 2),
    seed=job.seed,
    replicas=1 if job.method == "one" else job.replicas,
    **flags,
  )


def _train_step(job: Job):
  import jax
  from lm_gossip import training_loss
  from lm_methods import build_transform

  from jaxcomm.training import make_train_step
  from models import llama

  cfg, flags = llama.nano(), _method_flags(job)
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
  axes = llama.specs(cfg)
  stacked = jax.tree.map(lambda names: int("layers" in names), axes)
  specs = jax.tree.map(lambda _: jax.P(), axes)

  def loss(params, batch):
    return llama.loss(params, batch, cfg)

  return make_train_step(
    training_loss(flags, loss),
    lambda key: llama.init(key, cfg),
    build_transform(flags, specs, mesh, stacked),
    mesh,
    num_replicas=flags.replicas,
    eval_loss_fn=loss,
  )


def _set_up_worker():
  os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
  os.environ["JAX_PLATFORMS"] = "cpu"
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
  import jax

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/xla").absolute()))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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


def run(job: Job) -> dict:
  """Trains one configuration: its evaluation curve, and the loss of its replicas' mean.

  `eval_loss` is None if the run diverged.
  """
  import jax

  from jaxcomm import data
  from jaxcomm.training import Loop, LoopConfig, NonFiniteLossError

  train, validation = _data()
  ts = _train_step(job)
  # One replica alone sees what the first of several sees: a part of the rows, as many steps.
  rows = job.batch_size // job.replicas if job.method == "one" else job.batch_size
  batches = data.batches(train, batch_size=job.batch_size, seed=job.seed, row_count=rows)
  periods = {"log_every": 0, "save_every": 0, "eval_every": job.steps // NUM_EVALS}
  config = LoopConfig(steps=job.steps, **periods)
  recorder, start, ends = _Curve(), time.perf_counter(), {"eval_loss": None}
  loop = Loop(config, ts, batches, eval_batches=lambda: validation, progress=recorder)
  try:
    result = loop.run(ts.init(jax.random.key(job.seed)))
    ends = {"eval_loss": result.eval_loss, "mean_loss": loss_of_mean(result.state, validation)}
  except NonFiniteLossError as e:
    print(f"{job}: {e}", flush=True)
  jax.clear_caches()  # the next job compiles its own
  seconds = round(time.perf_counter() - start, 1)
  return {**dataclasses.asdict(job), **ends, "curve": recorder.points, "seconds": seconds}


def loss_of_mean(state, validation) -> float:
  """Evaluation loss of the mean of the replicas' parameters, outer ones where there are."""
  import jax

  from jaxcomm import outer_params
  from models import llama

  cfg, outer = llama.nano(), outer_params(state.opt_state)
  params = outer if jax.tree.leaves(outer) else state.params
  one = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  mean = jax.tree.map(lambda x, s: x.mean(0) if x.ndim > s.ndim else x, params, one)
  evaluate = jax.jit(lambda batch: llama.loss(mean, batch, cfg))
  pairs = [(float(loss), float(aux["tokens"])) for loss, aux in map(evaluate, validation)]
  return sum(loss * tokens for loss, tokens in pairs) / sum(tokens for _, tokens in pairs)


class Results:
  """Finished runs on disk, one JSON object per line; each configuration runs once."""

  def __init__(self, path: pathlib.Path, pool: concurrent.futures.Executor):
    self._path, self._pool, self._done = path, pool, {}
    self._lock = threading.Lock()
    if path.exists():
      for line in path.read_text().splitlines():
        row = json.loads(line)
        self._done[Job.of(row)] = row

  def losses(self, jobs: list[Job]) -> list[float]:
    """Evaluation losses of `jobs`, in order, running what is missing; infinite if diverged."""
    running = {self._pool.submit(run, job): job for job in jobs if job not in self._done}
    for future in concurrent.futures.as_completed(running):
      job, row = running[future], future.result()
      with self._lock, self._path.open("a") as f:
        f.write(json.dumps(row) + "\n")
      self._done[job] = row
      print(f"{row['eval_loss'] or math.inf:.4f} {row['seconds']:6.1f}s {job}", flush=True)
    losses = (self._done[job]["eval_loss"] for job in jobs)
    return [math.inf if loss is None else loss for loss in losses]

  def best(self, jobs: list[Job]) -> Job:
    """The one of `jobs` with the lowest loss, the first of equals."""
    losses = self.losses(jobs)
    return jobs[losses.index(min(losses))]


def refine(job: Job) -> list[Job]:
  """The second half of the tuning budget, around the best of the first."""
  change = functools.partial(dataclasses.replace, job)
  if job.method == "dfedsam":
    finer = [change(lr=job.lr * f) for f in (FINER[0], FINER[-1])]
    return [change(sam_rho=0.02), change(sam_rho=0.1), *finer]
  if job.method not in OUTER:
    return [change(lr=job.lr * f) for f in FINER]
  return [
    change(lr=_lowered(job, v, m), outer_lr=v, outer_momentum=m) for v, m in OUTER[job.method]
  ]


def _lowered(job: Job, outer_lr: float, outer_momentum: float) -> float:
  """The inner rate of `job`, which averages plainly, for a round that moves as far."""
  if job.method != "co2":
    return job.lr * (1 - outer_momentum) / outer_lr

  def reach(factor):  # of which the staleness gap, 1 + reach, is a part
    return (math.sqrt(1 + 4 * factor) - 1) / 2

  return job.lr * reach(1.0) / reach(outer_lr / (1 - outer_momentum))


def tune(results: Results, name: str, replicas: int) -> Job:
  """The best settings of a method, on the tuning seed."""
  if replicas != 4:
    found = dataclasses.replace(tune(results, name, 4), replicas=replicas)
    if name == "ddp":  # the same mean gradient
      return found
    rates = (found.lr * f for f in (1.0, FINER[0], FINER[-1]))
    return results.best([dataclasses.replace(found, lr=lr) for lr in rates])
  job = dataclasses.replace(METHODS[name], replicas=replicas)
  best = results.best([dataclasses.replace(job, lr=lr) for lr in LEARNING_RATES])
  return results.best([best, *refine(best)])


def tune_and_run(results: Results, name: str, replicas: int) -> None:
  """All of the runs of one method."""
  best = tune(results, name, replicas)
  final = [dataclasses.replace(best, seed=seed) for seed in SEEDS]
  results.losses(final)
  if replicas != 4:
    return
  more = []
  if name in STUDY:
    more += [dataclasses.replace(job, compressor="int4") for job in final]
  if name == "diloco_5":
    more += [dataclasses.replace(job, sync_period=1) for job in final]
  if name == "streaming_diloco":
    more += [dataclasses.replace(job, **change) for change in PARTS for job in final]
  if name in ("ddp", "diloco"):
    more += [dataclasses.replace(final[0], **c) for c in ({"steps": 9000}, {"batch_size": 64})]
  results.losses(more)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON lines, one per run")
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--replicas", nargs="+", type=int, default=[4, 8])
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
  args = parser.parse_args()
  tasks = [
    (name, n) for n in args.replicas for name in args.methods
    if n == 4 or name not in STUDY or name == "diloco"
  ]  # fmt: skip
  spawn = multiprocessing.get_context("spawn")
  with (
    concurrent.futures.ProcessPoolExecutor(
      args.workers, mp_context=spawn, initializer=_set_up_worker
    ) as pool,
    concurrent.futures.ThreadPoolExecutor(2) as methods,  # so that no worker waits for a phase
  ):
    results = Results(args.out, pool)
    list(methods.map(lambda task: tune_and_run(results, *task), tasks))


if __name__ == "__main__":
  main()
