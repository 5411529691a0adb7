"""Perplexity of heterogeneous and homogeneous domain experts and a dense model at equal compute.

    python -m jaxcomm.data fetch english-docs
    python scripts/bench_hdee.py --out runs/bench_hdee      # resumes where it stopped

Six text domains in three groups of difficulty, set by the perplexity of the seed model, and one
domain that no expert has seen. Every regime of `examples/train_hdee.py` gets the same tuning
budget: three peak learning rates on seed 100, of which the validation splits choose one. Then seeds
0, 1 and 2. Each process uses one core; --workers of them run at once: about an hour of one core
in all, half of it with two.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import tyro

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "train_hdee.py"
sys.path.insert(0, str(SCRIPT.parent))
from hdee_report import Results, mean_perplexity, plot_results  # noqa: E402

GROUP_OF = {
  "sympy-tests": "easy",
  "sympy-docstrings": "easy",
  "sympy-modules": "medium",
  "python-manual": "medium",
  "postgresql-manual": "hard",
  "wordnet-glosses": "hard",
}
UNSEEN = "scipy-docstrings"
REGIMES = ("sizes", "homogeneous", "steps", "dense")  # the first has all seed models
TUNE_SEED, SEEDS = 100, (0, 1, 2)
LEARNING_RATES = (2e-3, 4e-3, 8e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  out: str
  """folder of the runs"""
  picture: str | None = None
  """where to draw the means over the seeds"""
  steps: int = 600
  """of a homogeneous expert"""
  seed_steps: int = 1500
  """of a seed model"""
  schedule: str = "per_expert"
  """as of train_hdee.py"""
  workers: int = 2
  """processes at once, each on one core"""


def run(cfg: Config, seed: int, lr: float, regimes: list[str], parents: str | None) -> dict:
  """summary.json of one run of the script."""
  out = pathlib.Path(cfg.out) / f"seed{seed}-lr{lr}"
  if not (out / "summary.json").exists():
    flags = ["--out", out, "--seed", seed, "--lr", lr, "--steps", cfg.steps]
    flags += ["--seed-steps", cfg.seed_steps, "--schedule", cfg.schedule, "--unseen", UNSEEN]
    flags += ["--domains", *GROUP_OF, "--groups", *GROUP_OF.values(), "--regimes", *regimes]
    flags += ["--eval-every", 0, "--save-every", 0, "--eval-sequences", 256]
    flags += ["--parents", parents] if parents else []
    flags += ["--resume"] if (out / "config.json").exists() else []
    command = [sys.executable, SCRIPT, *map(str, flags)]
    one_core = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | one_core
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
      raise SystemExit(done.stderr)
    print(f"{out}: done", flush=True)
  return json.loads((out / "summary.json").read_text())


def tune(cfg: Config, pool: concurrent.futures.Executor) -> dict[str, float]:
  """The learning rate of each regime."""
  first = run(cfg, TUNE_SEED, LEARNING_RATES[0], list(REGIMES), None)
  parents = f"{cfg.out}/seed{TUNE_SEED}-lr{LEARNING_RATES[0]}"
  others = [
    pool.submit(run, cfg, TUNE_SEED, lr, list(REGIMES), parents) for lr in LEARNING_RATES[1:]
  ]
  summaries = dict(zip(LEARNING_RATES, [first, *(f.result() for f in others)]))
  best = {}
  for regime in REGIMES:
    scores = {}
    for lr, summary in summaries.items():
      by_domain = summary["validation_perplexity"][regime]
      scores[lr] = mean_perplexity({d: by_domain[d] for d in GROUP_OF})
    best[regime] = min(scores, key=lambda lr: scores[lr])
    print(f"{regime}: validation {scores}, chosen {best[regime]}", flush=True)
  return best


def measure(cfg: Config, seed: int, best: dict[str, float]) -> Results:
  """Test perplexities of all regimes with their learning rates."""
  results, parents = {}, None
  for lr in dict.fromkeys(best[r] for r in REGIMES):  # that of "sizes" first
    regimes = [r for r in REGIMES if best[r] == lr]
    results |= run(cfg, seed, lr, regimes, parents)["perplexity"]
    parents = parents or f"{cfg.out}/seed{seed}-lr{lr}"
  return {r: results[r] for r in ("homogeneous", "steps", "sizes", "dense")}


def mean_of(runs: list[Results]) -> Results:
  """Means over the seeds of the perplexities."""
  return {
    regime: {
      rule: {d: sum(r[regime][rule][d] for r in runs) / len(runs) for d in by_domain}
      for rule, by_domain in rules.items()
    }
    for regime, rules in runs[0].items()
  }


def report(runs: list[Results]) -> None:
  """The table, and on how many domains heterogeneous experts are better."""
  mean, domains = mean_of(runs), [*GROUP_OF, UNSEEN]
  print("| regime | mixing | " + " | ".join([*domains, "mean of the six"]) + " |")
  print("|---" * (len(domains) + 3) + "|")
  for regime, rules in mean.items():
    for rule, by_domain in rules.items():
      cells = []
      for d in domains:
        if d in by_domain:
          each = [r[regime][rule][d] for r in runs]
          cells.append(f"{by_domain[d]:.2f} ({min(each):.2f}-{max(each):.2f})")
        else:
          cells.append("")
      cells.append(f"{mean_perplexity({d: by_domain[d] for d in GROUP_OF}):.2f}")
      print(f"| {regime} | {rule} | " + " | ".join(cells) + " |")
  for regimes in (("steps",), ("sizes",), ("steps", "sizes")):
    for rule in ("posterior", "own expert"):
      won = [sum(_better(r, regimes, rule, d) for d in GROUP_OF) for r in runs]
      print(f"better than homogeneous, {rule}, {' or '.join(regimes)}: {won} of {len(GROUP_OF)}")


def _better(results: Results, regimes: tuple[str, ...], rule: str, domain: str) -> bool:
  return min(results[r][rule][domain] for r in regimes) < results["homogeneous"][rule][domain]


def main(cfg: Config) -> None:
  with concurrent.futures.ThreadPoolExecutor(cfg.workers) as pool:
    best = tune(cfg, pool)
    runs = list(pool.map(lambda seed: measure(cfg, seed, best), SEEDS))
  report(runs)
  if cfg.picture is not None:
    plot_results(pathlib.Path(cfg.picture), mean_of(runs))


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
