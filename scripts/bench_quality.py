"""Quality at equal tokens: data parallel, DiLoCo (H = 5, 20, 50), one replica, no communication.

Every method gets the same tuning budget of eight full-length runs on seed 100 (four learning
rates, for DiLoCo with plain averaging; then, from the best of them, four finer rates or, for
DiLoCo, four outer settings with the inner rate divided by outer_lr / (1 - momentum), so that a
round moves as far) and is then run with seeds 0, 1 and 2. DiLoCo is tuned with float32 means, and
the 4-bit runs reuse its settings. Replicas are stacked on one device, one process per core.

Why H = 20 stays behind data parallelism is asked afterwards, with the settings found: an exchange
after every step (what local Adam costs by itself), three times as many steps, and four times as
many sequences per step.

    python scripts/bench_quality.py --out docs/evidence/quality.jsonl    # resumes where it stopped
    python scripts/bench_quality.py --report docs/evidence               # table and curves
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import time

SEQ_LEN, REPLICAS, VOCAB = 32, 4, 512
EVAL_BATCH, EVAL_BATCHES, NUM_EVALS = 64, 32, 10
TUNE_SEED, SEEDS = 100, (0, 1, 2)
LEARNING_RATES = (2e-3, 4e-3, 8e-3, 16e-3)
FINER = (0.6, 0.8, 1.25, 1.6)
OUTER = ((0.7, 0.9), (0.5, 0.8), (0.7, 0.6), (1.0, 0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One run. `sync_period` 0 means: no rounds (`ddp`, `one`, `none`)."""

  method: str  # ddp | diloco | one | none
  sync_period: int = 0
  compressor: str = "none"
  lr: float
  outer_lr: float = 1.0
  outer_momentum: float = 0.0
  seed: int
  steps: int = 3000
  batch_size: int = 16  # sequences per step, over all replicas


@functools.cache
def _data():
  from jaxcomm import data

  corpus = data.prepare_text("sympy", vocab_size=VOCAB)
  train = data.load_text(corpus, split="train", seq_len=SEQ_LEN)
  validation = data.load_text(corpus, split="validation", seq_len=SEQ_LEN)
  return train, list(data.eval_batches(validation, EVAL_BATCH, EVAL_BATCHES))


@functools.cache
def _train_step(method: str, sync_period: int, compressor: str, steps: int):
  """One compiled step for all hyperparameters: they are part of the optimizer state."""
  import jax
  import optax

  import jaxcomm
  from jaxcomm.training import make_train_step
  from models import llama

  shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, 100, steps, end_value=0.1)
  inner = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b1=0.9, b2=0.95),
    optax.add_decayed_weights(0.1),
    optax.scale_by_schedule(shape),
    optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0),
  )
  mean = jaxcomm.pmean_over("replica")
  if compressor != "none":
    mean = jaxcomm.compressed_mean("replica", getattr(jaxcomm, compressor)())
  if method == "diloco":
    sgd = optax.inject_hyperparams(optax.sgd, static_args=("nesterov",))
    outer = optax.chain(mean, sgd(learning_rate=0.0, momentum=0.0, nesterov=True))
    tx = jaxcomm.diloco(inner, outer, sync_period=sync_period)
  else:
    tx = optax.chain(mean, inner) if method == "ddp" else inner
  cfg = llama.nano()
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
  return make_train_step(
    lambda params, batch: llama.loss(params, batch, cfg),
    lambda key: llama.init(key, cfg),
    tx,
    mesh,
    num_replicas=1 if method == "one" else REPLICAS,
  )


def _with_hyperparams(opt_state, job: Job):
  import jax.numpy as jnp
  import optax

  def put(state, **values):
    return optax.tree.set(state, **{k: jnp.asarray(v, jnp.float32) for k, v in values.items()})

  if job.method != "diloco":
    return put(opt_state, learning_rate=job.lr)
  outer = put(opt_state.outer_state, learning_rate=job.outer_lr, momentum=job.outer_momentum)
  return opt_state._replace(
    inner_state=put(opt_state.inner_state, learning_rate=job.lr), outer_state=outer
  )


def _set_up_worker():
  os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(".cache/xla").absolute()))


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
  """Trains one configuration and returns its evaluation curve."""
  import jax

  from jaxcomm import data
  from jaxcomm.training import Loop, LoopConfig

  train, validation = _data()
  ts = _train_step(job.method, job.sync_period, job.compressor, job.steps)
  state = ts.init(jax.random.key(job.seed))
  state = state.replace(opt_state=_with_hyperparams(state.opt_state, job))
  # One replica alone sees what the first of four sees: a quarter of the rows, as many steps.
  rows = job.batch_size // REPLICAS if job.method == "one" else job.batch_size
  batches = data.batches(train, batch_size=job.batch_size, seed=job.seed, row_count=rows)
  periods = {"log_every": 0, "save_every": 0, "eval_every": job.steps // NUM_EVALS}
  config = LoopConfig(steps=job.steps, **periods)
  recorder = _Curve()
  start = time.perf_counter()
  Loop(config, ts, batches, eval_batches=lambda: validation, progress=recorder).run(state)
  seconds, curve = round(time.perf_counter() - start, 1), recorder.points
  return {**dataclasses.asdict(job), "eval_loss": curve[-1][1], "curve": curve, "seconds": seconds}


class Results:
  """Finished runs on disk, one JSON object per line; each configuration runs once."""

  def __init__(self, path: pathlib.Path, pool: concurrent.futures.Executor):
    self._path, self._pool, self._done = path, pool, {}
    if path.exists():
      for line in path.read_text().splitlines():
        row = json.loads(line)
        self._done[Job(**{f.name: row[f.name] for f in dataclasses.fields(Job)})] = row

  def losses(self, jobs: list[Job]) -> list[float]:
    """Evaluation losses of `jobs`, in order, running what is missing."""
    running = {self._pool.submit(run, job): job for job in jobs if job not in self._done}
    for future in concurrent.futures.as_completed(running):
      job, row = running[future], future.result()
      self._done[job] = row
      with self._path.open("a") as f:
        f.write(json.dumps(row) + "\n")
      print(f"{row['eval_loss']:.4f} {row['seconds']:6.1f}s {job}", flush=True)
    return [self._done[job]["eval_loss"] for job in jobs]


MORE = ({"steps": 9000}, {"batch_size": 64})
METHODS = (
  {"method": "ddp"},
  {"method": "one"},
  {"method": "none"},
  {"method": "diloco", "sync_period": 5},
  {"method": "diloco", "sync_period": 20},
  {"method": "diloco", "sync_period": 50},
)


def tune_and_run(results: Results) -> None:
  """The whole experiment; all methods of a phase share the pool."""
  coarse = [[Job(**m, lr=lr, seed=TUNE_SEED) for lr in LEARNING_RATES] for m in METHODS]
  losses = iter(results.losses([job for jobs in coarse for job in jobs]))
  best = [min(zip([next(losses) for _ in jobs], range(9), jobs))[2] for jobs in coarse]

  def refine(job: Job) -> list[Job]:
    if job.method != "diloco":
      return [dataclasses.replace(job, lr=job.lr * f) for f in FINER]
    return [
      dataclasses.replace(job, lr=job.lr * (1 - m) / v, outer_lr=v, outer_momentum=m)
      for v, m in OUTER
    ]

  fine = [[job, *refine(job)] for job in best]
  losses = iter(results.losses([job for jobs in fine for job in jobs]))
  best = [min(zip([next(losses) for _ in jobs], range(9), jobs))[2] for jobs in fine]
  final = [dataclasses.replace(job, seed=seed) for seed in SEEDS for job in best]
  quantized = [
    dataclasses.replace(job, compressor="int4") for job in final if job.method == "diloco"
  ]
  results.losses(final + quantized)
  closer = [j for j in final if j.seed == 0 and (j.method == "ddp" or j.sync_period == 20)]
  always = [dataclasses.replace(j, sync_period=1) for j in final if j.sync_period == 5]
  results.losses([*always, *(dataclasses.replace(j, **more) for j in closer for more in MORE)])


def _label(key: tuple) -> str:
  method, sync_period, compressor, steps, batch_size = key
  parts = [
    method,
    f"H={sync_period}" if sync_period else "",
    "4-bit" if compressor != "none" else "",
  ]
  parts += [f"{steps} steps" if steps != Job.steps else ""]
  parts += [f"batch {batch_size}" if batch_size != Job.batch_size else ""]
  return " ".join(part for part in parts if part)


def _groups(rows: list[dict]) -> dict[tuple, list[dict]]:
  """Reported runs by everything but the seed, seeds in order."""
  groups: dict[tuple, list[dict]] = {}
  for row in sorted(rows, key=lambda r: (r["steps"], r["batch_size"], r["seed"])):
    if row["seed"] in SEEDS:
      names = ("method", "sync_period", "compressor", "steps", "batch_size")
      groups.setdefault(tuple(row[n] for n in names), []).append(row)
  return groups


def _gap(groups: dict[tuple, list[dict]], key: tuple) -> list[float]:
  """Relative excess over data parallelism along the curve, mean over the seeds, in percent."""
  base = {row["seed"]: row["curve"] for row in groups["ddp", 0, "none", *key[3:]]}
  gaps = []
  for row in groups[key]:
    pairs = zip(row["curve"], base[row["seed"]])
    gaps.append([100 * (ours / theirs - 1) for (_, ours), (_, theirs) in pairs])
  return [statistics.mean(at) for at in zip(*gaps)]


def report(directory: pathlib.Path) -> None:
  """Prints the table of the reported seeds and draws the curves."""
  groups = _groups([json.loads(s) for s in (directory / "quality.jsonl").read_text().splitlines()])
  print("| run | lr | outer lr | momentum | loss | per seed | to ddp |")
  print("|---|---|---|---|---|---|---|")
  for key, runs in groups.items():
    losses, first = [r["eval_loss"] for r in runs], runs[0]
    print(
      f"| {_label(key)} | {first['lr']:.2e} | {first['outer_lr']} | {first['outer_momentum']} |"
      f" {statistics.mean(losses):.4f} | {', '.join(f'{x:.4f}' for x in losses)} |"
      f" {_gap(groups, key)[-1]:+.1f} % |"
    )
  _draw(groups, directory / "quality.png")


def _draw(groups: dict[tuple, list[dict]], path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
  for key, runs in groups.items():
    style = {"label": _label(key), "ls": "--" if key[2] != "none" else "-", "marker": ".", "lw": 1}
    steps = [step for step, _ in runs[0]["curve"]]
    mean = [statistics.mean(at) for at in zip(*([loss for _, loss in r["curve"]] for r in runs))]
    left.plot(steps[1:], mean[1:], **style)
    if key[1]:
      right.plot([step / key[1] for step in steps[1:]], _gap(groups, key)[1:], **style)
  left.set(xlabel="step", ylabel="evaluation loss (nats/token)", xscale="log", ylim=(None, 4.5))
  right.set(xlabel="rounds", ylabel="loss above data parallelism (%)", xscale="log")
  for axes in (left, right):
    axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, help="JSON lines, one per run")
  parser.add_argument("--report", type=pathlib.Path, help="folder that holds quality.jsonl")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
  args = parser.parse_args()
  if args.out:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
      args.workers, mp_context=spawn, initializer=_set_up_worker
    ) as pool:
      tune_and_run(Results(args.out, pool))
  if args.report:
    report(args.report)


if __name__ == "__main__":
  main()
