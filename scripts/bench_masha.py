"""Distance to the solution against values sent: MASHA, dense and naively compressed extragradient.

    python scripts/bench_masha.py --out runs/masha           # resumes where it stopped
    python scripts/bench_masha.py --out runs/masha --picture docs/evidence/masha.png

Each method and step size is a run of `examples/masha_minmax.py` in a process of its own, up to
30,000 values per worker; of each method the step size with the best end is shown. Expected, after
ten minutes on two cores: at 10,000 values MASHA is 5 or more orders of magnitude closer to the
solution of the bilinear game than dense extragradient, and naive compression has stopped at 0.1
to 1.
"""

import dataclasses
import math
import pathlib
import subprocess
import sys
from typing import Any

import tyro

from jaxcomm.training import read_metrics

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "masha_minmax.py"
PROBLEMS = ("bilinear", "adversarial")
MARKS = (2_000, 10_000, 30_000)
DENSE = (0.15, 0.3, 0.42, 0.54)  # of the bilinear game 1 / L = 0.60
COMPRESSED = (0.05, 0.1, 0.2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
  name: str
  flags: tuple[str, ...]
  rates: tuple[float, ...]


METHODS = (
  Method(name="extragradient", flags=("--method", "extragradient"), rates=DENSE),
  *(
    Method(
      name=f"naive {c}", flags=("--method", "extragradient", "--compressor", c), rates=COMPRESSED
    )
    for c in ("rand_k", "top_k")
  ),
  Method(name="MASHA1 rand_k", flags=("--method", "masha1"), rates=COMPRESSED),
  Method(name="MASHA2 top_k", flags=("--method", "masha2"), rates=COMPRESSED),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  out: str
  """folder of the runs"""
  picture: str | None = None
  """where to draw the curves"""
  size: int = 40
  """numbers per player"""
  seed: int = 0
  """of the problem and of all random choices"""


def num_steps(cfg: Config, problem: str, method: Method) -> int:
  """Enough to send all values, though refreshes are random."""
  size = cfg.size * (2 if problem == "bilinear" else 3)
  per_step = size * (2.0 if method.name == "extragradient" else 0.2)
  return math.ceil(1.1 * MARKS[-1] / per_step)


def run(cfg: Config, problem: str, method: Method, rate: float) -> list[dict[str, Any]]:
  """Rows of metrics.jsonl; none if the run diverged."""
  out = pathlib.Path(cfg.out) / f"{problem}-{method.name.replace(' ', '-')}-{rate}"
  if not (out / "summary.json").exists():
    steps = num_steps(cfg, problem, method)
    flags = ["--problem", problem, *method.flags, "--lr", rate, "--steps", steps]
    flags += ["--size", cfg.size, "--seed", cfg.seed, "--log-every", 1, "--save-every", 0]
    flags += ["--out", out, *(["--resume"] if (out / "config.json").exists() else [])]
    command = [sys.executable, SCRIPT, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "the loss is" not in done.stderr:
      raise SystemExit(done.stderr)
    if done.returncode:
      return []
  return read_metrics(out)


def at(rows: list[dict[str, Any]], values: int) -> float:
  """Relative squared distance when so many values had been sent."""
  logs = [row["loss"] for row in rows if row["values"] <= values]
  return 10.0 ** logs[-1] if logs else math.inf


def measure(cfg: Config, problem: str) -> dict[str, list[dict[str, Any]]]:
  """The best run of each method, printed."""
  print(f"\n{problem}: squared distance (relative) after so many values sent per worker")
  print(f"{'method':<16}{'step size':>10}" + "".join(f"{m:>12,}" for m in MARKS))
  best = {}
  for method in METHODS:
    runs = {rate: run(cfg, problem, method, rate) for rate in method.rates}
    rate = min(runs, key=lambda rate: at(runs[rate], MARKS[-1]))
    best[method.name] = runs[rate]
    cells = "".join(f"{at(runs[rate], m):>12.1e}" for m in MARKS)
    print(f"{method.name:<16}{rate:>10.2f}{cells}", flush=True)
    others = {r: f"{at(rows, MARKS[1]):.1e}" for r, rows in runs.items() if r != rate}
    print(f"{'':<16}  others at {MARKS[1]:,}: {others}", flush=True)
  return best


def plot(path: str, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
  """One panel per problem."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4), layout="constrained")
  panels = figure.subplots(1, len(results), sharey=True)
  for axes, (problem, curves) in zip(panels, results.items()):
    for name, rows in curves.items():
      shown = [row for row in rows if row["values"] <= MARKS[-1]]
      axes.plot([r["values"] for r in shown], [r["loss"] for r in shown], lw=1.2, label=name)
    axes.set(title=problem, xlabel="values sent per worker")
    axes.grid(alpha=0.3)
  panels[0].set(ylabel="log10 of the squared distance")
  panels[0].legend(fontsize=8)
  figure.savefig(path, dpi=120)


def main(cfg: Config) -> None:
  results = {problem: measure(cfg, problem) for problem in PROBLEMS}
  if cfg.picture is not None:
    plot(cfg.picture, results)


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
