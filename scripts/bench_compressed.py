"""Quality of compressed gradients at equal tokens: `examples/train_lm.py`, 8 replicas, 3 seeds.

The learning rate is tuned for data parallelism on seed 100 (four rates, then two finer ones) and
reused by every method but DeMo, whose update has another scale and which gets the same budget of
its own. To tune data parallelism one replica takes the whole batch: the same mean gradient in less
time. Then every method runs with seeds 0, 1 and 2. All runs are those of the command-line program:
the `tiny` model, 8 replicas stacked on one device, one thread each. The time of a step is taken
apart from them, on 8 virtual devices, one method after the other.

    python scripts/bench_compressed.py runs/compressed             # resumes where it stopped
    python scripts/bench_compressed.py runs/compressed --times     # on an idle machine
    python scripts/bench_compressed.py runs/compressed --report docs/evidence
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, TUNE_SEED, SEEDS = 1500, 100, (0, 1, 2)
SEQ_LEN, REPLICAS = "32", "8"
LEARNING_RATES = {"ddp": (2e-3, 4e-3, 8e-3, 16e-3), "demo": (5e-4, 1e-3, 2e-3, 4e-3)}
FINER = (0.7, 1.4)
ONE_REPLICA = ("--method", "none", "--replicas", "1")
METHODS = {
  "ddp": ("--method", "ddp"),
  "powersgd": ("--method", "powersgd", "--rank", "4"),
  "one_bit_adam": ("--method", "one_bit_adam"),
  # The same Adam without signs: its variances decay slower than those of ddp's.
  "exact_adam": ("--method", "one_bit_adam", "--exact-steps", str(STEPS)),
  "int8": ("--method", "ddp", "--compressor", "int8"),
  "int4": ("--method", "ddp", "--compressor", "int4", "--rounding", "stochastic",
           "--error-feedback"),
  "demo": ("--method", "demo"),
}  # fmt: skip


def train(out: pathlib.Path, *flags: str, threads: int | None = 1) -> dict:
  """Runs, or resumes, one training and returns its summary."""
  summary = out / "summary.json"
  if not summary.exists():
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    if threads == 1:
      env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, ROOT / "examples" / "train_lm.py", "--out", out, *flags]
    command += ["--seq-len", SEQ_LEN]
    if out.exists():
      command.append("--resume")
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_name(f"{out.name}.log").open("a") as log:
      subprocess.run([str(c) for c in command], env=env, stdout=log, stderr=log, check=True)
  return json.loads(summary.read_text())


def run(root: pathlib.Path, name: str, lr: float, seed: int) -> float:
  """Final evaluation loss of one run, which is made if it is not there."""
  flags = ["--steps", STEPS, "--eval-every", STEPS // 10, "--eval-batches", 32, "--max-devices", 1]
  flags += ["--log-every", 50, "--save-every", 500, "--lr", f"{lr:.3g}", "--seed", seed]
  method = (*METHODS[name], "--replicas", REPLICAS)
  if name == "ddp" and seed == TUNE_SEED:
    method = ONE_REPLICA
  out = root / name / f"lr_{lr:.3g}_seed_{seed}"
  loss = train(out, *method, *map(str, flags))["eval_loss"]
  print(f"{loss:.4f} {out}", flush=True)
  return loss


def tune(root: pathlib.Path, pool: concurrent.futures.Executor, name: str) -> float:
  """The best of four rates and of two beside it, on the tuning seed."""

  def best(rates):
    losses = list(pool.map(lambda lr: run(root, name, lr, TUNE_SEED), rates))
    return min(zip(losses, rates))[1]

  coarse = best(LEARNING_RATES[name])
  return best((coarse, *(coarse * factor for factor in FINER)))


def measure_times(root: pathlib.Path) -> None:
  """Trains each method for some steps on 8 virtual devices, compressed from the second step on."""
  flags = f"--replicas {REPLICAS} --steps 30 --log-every 1 --eval-every 0 --exact-steps 1".split()
  for name, method in METHODS.items():
    if name == "exact_adam":  # nothing compressed to be timed
      continue
    summary = train(root / "times" / name, *method, *flags, threads=None)
    print(f"{1e3 * summary['step_seconds']:.1f} ms {name}", flush=True)


def _reported(root: pathlib.Path, name: str) -> list[tuple[dict, list[tuple[int, float, float]]]]:
  """Summaries of the reported seeds, each with its curve of (step, loss, bytes sent)."""
  runs = []
  for seed in SEEDS:
    (folder,) = (root / name).glob(f"lr_*_seed_{seed}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [
      (row["step"], row["eval_loss"], row.get("wire_bytes_total", 0.0))
      for row in rows
      if "eval_loss" in row
    ]
    config = json.loads((folder / "config.json").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    runs.append(({**summary, "lr": config["lr"]}, curve))
  return runs


def report(root: pathlib.Path, directory: pathlib.Path) -> None:
  """Prints the table, writes every curve to compressed.jsonl and draws them."""
  ran = [name for name in METHODS if list((root / name).glob("lr_*_seed_0/summary.json"))]
  all_runs = {name: _reported(root, name) for name in ran}
  base = all_runs["ddp"]
  seconds = _step_seconds(root)
  print("| method | lr | bytes per device | of ddp | step time | loss | per seed | to ddp |")
  print("|---|---|---|---|---|---|---|---|")
  for name, runs in all_runs.items():
    losses = [summary["eval_loss"] for summary, _ in runs]
    gaps = [100 * (a / b["eval_loss"] - 1) for a, (b, _) in zip(losses, base)]
    sent = runs[0][0]["wire_bytes_total"]
    print(
      f"| {name} | {runs[0][0]['lr']:.3g} | {sent:,.0f} |"
      f" {sent / base[0][0]['wire_bytes_total']:.4f} | {_ratio(seconds, name)} |"
      f" {statistics.mean(losses):.4f} | {', '.join(f'{x:.4f}' for x in losses)} |"
      f" {statistics.mean(gaps):+.2f} % ({', '.join(f'{g:+.2f}' for g in gaps)}) |"
    )
  records = [
    {"method": name, "lr": s["lr"], "seed": seed, "commit": s["git_commit"], "curve": curve}
    for name, runs in all_runs.items()
    for seed, (s, curve) in zip(SEEDS, runs)
  ]
  (directory / "compressed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  _draw(all_runs, directory / "compressed.png")


def _step_seconds(root: pathlib.Path) -> dict[str, float]:
  """Of the methods that were timed."""
  found = sorted((root / "times").glob("*/summary.json"))
  return {path.parent.name: json.loads(path.read_text())["step_seconds"] for path in found}


def _ratio(seconds: dict[str, float], name: str) -> str:
  timed = name in seconds and "ddp" in seconds
  return f"{seconds[name] / seconds['ddp']:.2f}" if timed else "not timed"


def _draw(all_runs: dict, path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
  for name, runs in all_runs.items():
    curves = [curve[1:] for _, curve in runs]
    steps, loss = [p[0] for p in curves[0]], [statistics.mean(at) for at in _columns(curves)]
    gap = [
      100 * statistics.mean(ours[1] / ddp[1] - 1 for ours, ddp in zip(at, at_ddp))
      for at, at_ddp in zip(zip(*curves), zip(*(curve[1:] for _, curve in all_runs["ddp"])))
    ]
    left.plot([p[2] / 1e6 for p in curves[0]], loss, marker=".", lw=1, label=name)
    right.plot(steps, gap, marker=".", lw=1, label=name)
  left.set(xlabel="MB sent per device", ylabel="evaluation loss (nats/token)", xscale="log")
  right.set(xlabel="step", ylabel="loss above ddp (%)")
  for axes in (left, right):
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _columns(curves: list) -> list[list[float]]:
  """Losses of all seeds, by evaluation."""
  return [[point[1] for point in at] for at in zip(*curves)]


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("runs", type=pathlib.Path, help="folder of the run folders")
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--times", action="store_true", help="time the steps instead")
  parser.add_argument("--report", type=pathlib.Path, help="where to put the figure and the curves")
  parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
  args = parser.parse_args()
  if args.report:
    report(args.runs, args.report)
  elif args.times:
    measure_times(args.runs)
  else:
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
      tuned = [name for name in LEARNING_RATES if name in ("ddp", *args.methods)]
      rates = {name: tune(args.runs, pool, name) for name in tuned}
      jobs = [(name, rates.get(name, rates["ddp"])) for name in args.methods]
      list(pool.map(lambda job: run(args.runs, *job), [(*j, seed) for seed in SEEDS for j in jobs]))


if __name__ == "__main__":
  main()
