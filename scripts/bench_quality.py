"""Quality at equal tokens: every method that exchanges rarely, late or with few, 4 and 8 replicas.

Every method gets the same tuning budget of eight full-length runs on seed 100, and is then run with
seeds 0, 1 and 2 (`METHODS` are the methods, `refine` is the second half of the budget):

- four learning rates, outer steps being plain averages (`dfedsam`: radius 0.05);
- then from the best of them, with an outer step: four outer settings, the inner rate lowered so
  that a round moves as far; `dfedsam`: two other radii and two finer rates; the rest: four finer
  rates.

With 8 replicas every method has the settings that it found with 4. For `RETRIED` a lower and a
higher rate were tried as well: `none` and `diloco` kept theirs; `one`, which then sees half as many
rows, did not, and gets the better one. Eager DiLoCo fell behind `none`: two lower
outer rates were tried for it. Replicas are stacked on one device, one process per core; the
transforms are those of `examples/train_lm.py`.

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
import math
import os
import pathlib
import time

import _study
from _study import SEEDS, TUNE_SEED, Results, job_of

SEQ_LEN, VOCAB, NUM_EVALS = 32, 512, 10
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
    """The job of a result."""
    return job_of(cls, row)


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
RETRIED = ("one", "none", "diloco")  # with 8 replicas: are the rates found with 4 still good?
EAGER_OUTER_LR = (0.7, 0.5)  # with 8 replicas 7/8 of its mean are late, and its 1.0 falls behind
STUDY = ("diloco_5", "diloco", "diloco_50")  # with 4 replicas only, but for H = 20


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


def run(job: Job) -> dict:
  """Trains one configuration: its evaluation curve, and the loss of its replicas' mean.

  `eval_loss` is None if the run diverged.
  """
  import jax

  from jaxcomm import data
  from models import llama

  rows, validation = _study.text_data(VOCAB, SEQ_LEN)
  train_step = _study.make_step(_method_flags(job), llama, llama.nano())
  # One replica alone sees what the first of several sees: a part of the rows, as many steps.
  count = job.batch_size // job.replicas if job.method == "one" else job.batch_size
  batches = data.batches(rows, batch_size=job.batch_size, seed=job.seed, row_count=count)
  start, ends = time.perf_counter(), {"eval_loss": None}
  result, curve = _study.train(
    train_step, batches, validation, steps=job.steps, evals=NUM_EVALS, seed=job.seed
  )
  if result is not None:
    ends = {"eval_loss": result.eval_loss, "mean_loss": loss_of_mean(result.state, validation)}
  jax.clear_caches()  # the next job compiles its own
  seconds = round(time.perf_counter() - start, 1)
  return {**dataclasses.asdict(job), **ends, "curve": curve, "seconds": seconds}


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
    if name == "eager_diloco":
      rates = (found.outer_lr, *EAGER_OUTER_LR)
      return results.best([dataclasses.replace(found, outer_lr=lr) for lr in rates])
    if name not in RETRIED:
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
  with (
    _study.worker_pool(args.workers) as pool,
    concurrent.futures.ThreadPoolExecutor(2) as methods,  # so that no worker waits for a phase
  ):
    results = Results(args.out, pool, Job, run)
    list(methods.map(lambda task: tune_and_run(results, *task), tasks))


if __name__ == "__main__":
  main()
