"""Tables and picture of what `bench_ladder.py` has run so far."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

Rows = list[dict[str, Any]]
Groups = dict[Any, Rows]  # reported runs by job


def excess(rows: Rows, base: Rows) -> list[float]:
  """Loss above that of `base`, in percent, of the seeds that both have."""
  losses = {row["seed"]: row["eval_loss"] for row in base}
  pairs = [(row["eval_loss"], losses[row["seed"]]) for row in rows if row["seed"] in losses]
  return [100 * (a / b - 1) for a, b in pairs]


def recovered(row: dict[str, Any], source: dict[str, Any]) -> float:
  """Share of the jump, in percent, that retraining has brought back."""
  jump = row["first_eval_loss"] - source["eval_loss"]
  return 100 * (row["first_eval_loss"] - row["eval_loss"]) / jump


def variants(groups: Groups) -> dict[str, Rows]:
  """Runs from new weights, by residual stream."""
  return {job.residual: rows for job, rows in groups.items() if not job.start_lr}


def print_variants(runs: dict[str, Rows]) -> None:
  """One line for each residual stream."""
  print("\n| residual | lr | loss | per seed | to standard | per seed |\n|---|---|---|---|---|---|")
  for name, rows in runs.items():
    losses = [row["eval_loss"] for row in rows]
    gaps = excess(rows, runs["standard"])
    print(
      f"| {name} | {rows[0]['lr']:.2e} | {statistics.mean(losses):.4f} |"
      f" {', '.join(f'{x:.4f}' for x in losses)} | {statistics.mean(gaps):+.2f} % |"
      f" {', '.join(f'{x:+.2f}' for x in gaps)} |"
    )


def conversion_rows(groups: Groups) -> Rows:
  """One row per number of converted layers: means over seeds."""
  sources = {row["seed"]: row for row in variants(groups)["standard"]}
  found = {job.ladder_layers: rows for job, rows in groups.items() if job.start_lr}
  control = {row["seed"]: row["eval_loss"] for row in found.get(0, [])}
  table = []
  for count, rows in sorted(found.items()):
    pairs = [(row, sources[row["seed"]]) for row in rows]
    left = [row["eval_loss"] - control[row["seed"]] for row in rows if row["seed"] in control]
    table.append(
      {
        "layers": count,
        "lr": rows[0]["lr"],
        "before": statistics.mean(source["eval_loss"] for _, source in pairs),
        "converted": statistics.mean(row["first_eval_loss"] for row in rows),
        "retrained": statistics.mean(row["eval_loss"] for row in rows),
        "recovered": [recovered(*pair) for pair in pairs] if count else [],
        "left": statistics.mean(left) if left else None,
      }
    )
  return table


def print_conversions(table: Rows, num_layers: int) -> None:
  """One line for each number of converted layers."""
  heads = ["ladder layers", "lr", "loss before", "converted", "retrained", "recovered", "per seed"]
  print(f"\n| {' | '.join(heads)} | beyond control |\n|{'---|' * (len(heads) + 1)}")
  for row in table:
    shares = row["recovered"]
    cells = [f"{row['layers']} of {num_layers}" if row["layers"] else "none (control)"]
    cells += [f"{row['lr']:.2e}", *(f"{row[k]:.4f}" for k in ("before", "converted", "retrained"))]
    cells += [f"{statistics.mean(shares):.1f} %" if shares else ""]
    cells += [", ".join(f"{x:.1f}" for x in shares)]
    cells.append("" if row["left"] is None else f"{row['left']:+.4f}")
    print(f"| {' | '.join(cells)} |")


def print_expectations(runs: dict[str, Rows], table: Rows) -> None:
  """What was asked for, and whether it holds, of runs that are there."""
  means = {name: statistics.mean(excess(rows, runs["standard"])) for name, rows in runs.items()}
  print()
  if "ladder" in means:
    gap = means["ladder"]
    print(f"ladder within 3 % of standard: {_verdict(gap <= 3)} ({gap:+.2f} %)")
  if {"desync-2x", "desync-4x"} <= means.keys():
    holds = means["desync-4x"] > means["desync-2x"] > 0
    print(f"desync-4x worse than desync-2x worse than standard: {_verdict(holds)}")
  for row in table:
    if row["layers"]:
      share = statistics.mean(row["recovered"])
      what = f"{row['layers']} converted layers recover 80 % of the jump"
      print(f"{what}: {_verdict(share >= 80)} ({share:.1f} %)")


def _verdict(holds: bool) -> str:
  return "holds" if holds else "MISSED"


def draw(path: pathlib.Path, runs: dict[str, Rows], groups: Groups, tokens: int) -> None:
  """Left: loss against tokens. Right: loss of converted models while they are retrained."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
  for name, rows in runs.items():
    _draw_mean(left, rows, name, first=1)
  for job, rows in sorted(groups.items(), key=lambda item: item[0].ladder_layers):
    if job.start_lr:
      label = f"{job.ladder_layers} ladder layers" if job.ladder_layers else "control"
      _draw_mean(right, rows, label)
  left.set(title="from new weights", xscale="log")
  right.set(title="trained as standard, converted, retrained")
  for axes in (left, right):
    axes.set(xlabel=f"step ({tokens} tokens each)", ylabel="evaluation loss (nats/token)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _draw_mean(axes, rows: Rows, label: str, first: int = 0) -> None:
  curves = [row["curve"][first:] for row in rows]
  steps = [step for step, _ in curves[0]]
  mean = [statistics.mean(at) for at in zip(*([loss for _, loss in c] for c in curves))]
  axes.plot(steps, mean, marker=".", lw=1, label=label)


def report(
  groups: Groups, directory: pathlib.Path, names: Sequence[str], *, num_layers: int, tokens: int
) -> None:
  """Tables, expectations and picture.

  Args:
    groups: reported runs by job, the seed taken out.
    directory: where ladder.png goes.
    names: of residual streams, in the order of the table.
    num_layers: of the models.
    tokens: per step.
  """
  found = variants(groups)
  if "standard" not in found:
    raise SystemExit("error: there is no reported run of 'standard' yet.")
  runs = {name: found[name] for name in names if name in found}
  table = conversion_rows(groups)
  print_variants(runs)
  print_conversions(table, num_layers)
  print_expectations(runs, table)
  draw(directory / "ladder.png", runs, groups, tokens)
