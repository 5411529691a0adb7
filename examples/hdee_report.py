"""What `train_hdee.py` prints, writes and draws."""

import dataclasses
import json
import math
import pathlib
import statistics
from typing import Any

from models import hdee

Results = dict[str, dict[str, dict[str, float]]]  # regime, rule, domain -> perplexity


def print_plans(plans: dict[str, list[hdee.Plan]], seeds: list[hdee.Plan]) -> None:
  """A line per regime: its experts and what they cost."""
  cost = ", ".join(f"{p.name} {p.flops / 1e9:.1f}" for p in seeds)
  print(f"training GFLOPs of the seed models: {cost}; of what branches from them:")
  for regime, experts in plans.items():
    names = ", ".join(p.name for p in experts)
    print(f"  {regime:<12}{sum(p.flops for p in experts) / 1e9:8.1f}  {names}", flush=True)


def write_plans(
  path: pathlib.Path, todo: list[hdee.Plan], plans: dict[str, list[hdee.Plan]]
) -> None:
  """The manifest: every model with its parent, steps and FLOPs, and who uses it."""
  models = [dataclasses.asdict(p) | {"flops": p.flops} for p in todo]
  regimes = {r: [p.name for p in ps] for r, ps in plans.items()}
  path.write_text(json.dumps({"models": models, "regimes": regimes}, indent=2) + "\n")


def mean_perplexity(by_domain: dict[str, float]) -> float:
  """Of the mean loss over the domains."""
  return math.exp(statistics.mean(math.log(x) for x in by_domain.values()))


def print_results(results: Results) -> None:
  """Perplexity on the test split of each domain, a row per regime and rule."""
  domains = list(next(iter(next(iter(results.values())).values())))
  width = max(9, *(len(d) + 2 for d in domains))
  head = "".join(f"{d:>{width}}" for d in [*domains, "mean"])
  print(f"\ntest perplexity\n{'regime':<13}{'mixing':<22}{head}")
  for regime, rules in results.items():
    for rule, by_domain in rules.items():
      cells = [f"{by_domain[d]:.2f}" if d in by_domain else "" for d in domains]
      cells.append(f"{mean_perplexity(by_domain):.2f}" if len(by_domain) == len(domains) else "")
      print(f"{regime:<13}{rule:<22}" + "".join(f"{c:>{width}}" for c in cells), flush=True)


def plot_results(path: pathlib.Path, results: Results) -> None:
  """Perplexity of each regime relative to the first one, by domain; needs matplotlib."""
  from matplotlib.figure import Figure

  shown: dict[str, Any] = {
    r: rules.get("posterior", rules.get("alone")) for r, rules in results.items()
  }
  base_name, base = next(iter(shown.items()))
  domains = list(base)
  figure = Figure(figsize=(2 + 1.6 * len(domains), 4.2), layout="constrained")
  axes = figure.subplots()
  width = 0.8 / len(shown)
  for i, (regime, by_domain) in enumerate(shown.items()):
    heights = [100 * (by_domain[d] / base[d] - 1) for d in domains]
    axes.bar([k + i * width for k in range(len(domains))], heights, width, label=regime)
  axes.set_xticks([k + 0.4 - width / 2 for k in range(len(domains))], domains, rotation=15)
  axes.set(ylabel=f"perplexity above {base_name} (%)", title="test perplexity at equal compute")
  axes.axhline(0, color="#888888", lw=0.8)
  axes.legend(fontsize=8)
  axes.grid(axis="y", alpha=0.3)
  figure.savefig(path, dpi=120)
