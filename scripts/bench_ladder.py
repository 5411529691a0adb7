"""Quality of residual streams at equal tokens, and what converting a trained Llama costs.

The learning rate is tuned for `standard` on seed 100, which is not reported (four rates, then two
finer ones), and reused by `ladder`, `parallel`, `desync-2x` and `desync-4x` (of 4 devices), each
with seeds 0, 1 and 2: 8 layers, 0.25M parameters, 1,000 steps of 32 sequences of 32 tokens, 1.02 M
tokens a run.

Then each of the three standard models is converted, in its upper half and whole, and retrained with
50 steps, 5 % of its tokens; of four rates the best for the half on seed 100 is taken. As a control
the unconverted model is retrained in the same way. `recovered` is the share of the loss's jump that
is gone afterwards, `beyond control` the loss that is left above that of the control.

    python scripts/bench_ladder.py --out docs/evidence/ladder.jsonl      # resumes where it stopped
    python scripts/bench_ladder.py --out docs/evidence/ladder.jsonl --report docs/evidence

About an hour of one core, so half an hour on two (21 runs of 1,000 steps at 2 to 3 minutes, 13 of
50 steps at half a minute). `--report` prints the tables, says which expectations hold, and draws
ladder.png. Standard models are kept in .cache/bench_ladder for their conversion, and are trained
again where they are missing.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

import _study
from _ladder_report import report
from _study import SEEDS, TUNE_SEED, Results, job_of

SEQ_LEN, VOCAB, BATCH_SIZE, NUM_EVALS = 32, 512, 32, 10
LAYERS, DEVICES = 8, 4
STEPS, RETRAIN_STEPS = 1000, 50
LEARNING_RATES, FINER = (2e-3, 4e-3, 8e-3, 16e-3), (0.7, 1.4)
RETRAIN_RATES = (0.02, 0.05, 0.1, 0.25)  # of the rate of the model
RESIDUALS = ("standard", "ladder", "parallel", "desync-2x", "desync-4x")
CONVERTED = (LAYERS // 2, LAYERS, 0)  # layers; 0: the control
CACHE = pathlib.Path(".cache") / "bench_ladder"
Groups = dict["Job", list[dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run, from new weights, or, if `start_lr` is not 0, from a trained standard model."""

  residual: str = "standard"  # as in train_ladder.py
  lr: float = LEARNING_RATES[0]
  seed: int = TUNE_SEED
  steps: int = STEPS
  start_lr: float = 0.0  # with which that model was trained, same seed, STEPS steps
  ladder_layers: int = 0  # of it that are converted, the last ones

  @property
  def source(self) -> "Job":
    """The run of the model that is converted."""
    return Job(lr=self.start_lr, seed=self.seed)


def run(job: Job) -> dict[str, Any]:
  """Trains one configuration: its evaluation curve, from before the first step on.

  `eval_loss` is None if the run diverged.
  """
  import jax

  from models import hdee, ladder

  start = time.perf_counter()
  cfg = _config(job)
  train_step = _study.make_step(_flags(job), ladder, cfg)
  if job.start_lr:
    train_step = hdee.branch(train_step, _trained(job.source))
  result, curve = _train(job, train_step)
  loss = None if result is None else result.eval_loss
  if result is not None and _is_source(job):
    _save(job, result.state, train_step)
  found = {"first_eval_loss": None, "eval_loss": loss, "curve": curve}
  if result is not None:
    found["first_eval_loss"] = result.first_eval_loss
  jax.clear_caches()  # the next job compiles its own
  seconds = round(time.perf_counter() - start, 1)
  return {**dataclasses.asdict(job), **found, "seconds": seconds}


def _config(job: Job):
  from train_ladder import variant

  from models import ladder, llama

  base = llama.LlamaConfig(
    vocab_size=VOCAB, hidden_size=48, num_layers=LAYERS, intermediate_size=128, num_heads=DEVICES,
    num_kv_heads=DEVICES, rope_theta=10_000.0, tie_embeddings=True, max_seq_len=SEQ_LEN,
    dtype="float32",
  )  # fmt: skip
  if job.start_lr:
    return ladder.convert_to_ladder(None, base, job.ladder_layers)[1]
  return variant(base, job.residual, DEVICES)


def _flags(job: Job):
  from lm_methods import MethodConfig

  warmup = min(100, job.steps // 10)
  flags: dict[str, Any] = {"lr": job.lr, "steps": job.steps, "seed": job.seed, "warmup": warmup}
  return MethodConfig(method="none", replicas=1, **flags)


def _train(job: Job, train_step):
  from jaxcomm import data

  rows, validation = _study.text_data(VOCAB, SEQ_LEN)
  # Retraining sees the rows in another order than the model did.
  order = job.seed + 1000 if job.start_lr else job.seed
  batches = data.batches(rows, batch_size=BATCH_SIZE, seed=order)
  counts = {"steps": job.steps, "evals": NUM_EVALS, "seed": job.seed}
  return _study.train(train_step, batches, validation, **counts)


def _is_source(job: Job) -> bool:
  return job == Job(lr=job.lr, seed=job.seed)


def _path(job: Job) -> pathlib.Path:
  return CACHE / f"lr_{job.lr!r}_seed_{job.seed}_steps_{job.steps}.npz"


def _save(job: Job, state, train_step) -> None:
  """Keeps the parameters of the one replica, in the order of the tree's leaves."""
  import jax
  import numpy as np

  CACHE.mkdir(parents=True, exist_ok=True)
  partial = _path(job).with_suffix(f".{os.getpid()}.npz")
  varying = train_step.layout.varying.params
  params = jax.tree.map(lambda x, stacked: x[0] if stacked else x, state.params, varying)
  np.savez(partial, *jax.device_get(jax.tree.leaves(params)))
  partial.replace(_path(job))


def _trained(job: Job):
  """The parameters that `job` makes."""
  import jax
  import numpy as np

  from models import ladder

  cfg = _config(job)
  if not _path(job).exists():
    train_step = _study.make_step(_flags(job), ladder, cfg)
    result, _ = _train(job, train_step)
    if result is None:
      raise ValueError(f"the model to convert diverged: {job}.")
    _save(job, result.state, train_step)
  tree = jax.tree.structure(jax.eval_shape(lambda: ladder.init(jax.random.key(0), cfg)))
  with np.load(_path(job)) as arrays:
    return jax.tree.unflatten(tree, [arrays[f"arr_{i}"] for i in range(tree.num_leaves)])


def tune(results: Results[Job]) -> float:
  """The rate of `standard`."""
  best = results.best([Job(lr=lr) for lr in LEARNING_RATES])
  return results.best([best, *(Job(lr=best.lr * f) for f in FINER)]).lr


def tune_retraining(results: Results[Job], lr: float) -> float:
  """The rate of retraining, for the converted half."""
  half = Job(residual="ladder", steps=RETRAIN_STEPS, start_lr=lr, ladder_layers=CONVERTED[0])
  return results.best([dataclasses.replace(half, lr=lr * f) for f in RETRAIN_RATES]).lr


def conversions(lr: float, retrain_lr: float) -> list[Job]:
  """All that starts from the reported standard models."""
  return [
    Job(
      residual="ladder" if count else "standard",
      lr=retrain_lr,
      seed=seed,
      steps=RETRAIN_STEPS,
      start_lr=lr,
      ladder_layers=count,
    )
    for count in CONVERTED
    for seed in SEEDS
  ]


def load(path: pathlib.Path) -> Groups:
  """Reported runs by settings, the seed taken out; seeds in order, diverged runs left out."""
  groups: Groups = {}
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in sorted(rows, key=lambda r: r["seed"]):
    if row["seed"] in SEEDS and row["eval_loss"] is not None:
      groups.setdefault(job_of(Job, row | {"seed": 0}), []).append(row)
  return groups


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON lines, one per run")
  parser.add_argument("--report", type=pathlib.Path, help="only report; where to put the picture")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
  args = parser.parse_args()
  if args.report:
    report(load(args.out), args.report, RESIDUALS, num_layers=LAYERS, tokens=BATCH_SIZE * SEQ_LEN)
    return
  with _study.worker_pool(args.workers) as pool:
    results = Results(args.out, pool, Job, run)
    lr = tune(results)
    results.losses([Job(residual=name, lr=lr, seed=s) for s in SEEDS for name in RESIDUALS])
    results.losses(conversions(lr, tune_retraining(results, lr)))


if __name__ == "__main__":
  main()
