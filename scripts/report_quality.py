"""Tables and curves of what `scripts/bench_quality.py` has run so far.

    python scripts/report_quality.py docs/evidence

Prints Markdown tables of the reported seeds: DiLoCo and data parallelism with 4 replicas, Streaming
DiLoCo without its parts, then all methods with 4 and with 8. Draws quality.png and
quality_methods.png beside quality.jsonl. `loss` is the mean over replicas of each one's own (all
the same where replicas agree), `of the mean` the loss of the mean of their parameters, `to X` the
mean over seeds of the relative differences.
"""

import argparse
import json
import pathlib
import statistics
from typing import Any

from bench_quality import METHODS, SEEDS, STUDY, Job

Groups = dict[Job, list[dict[str, Any]]]


def load(path: pathlib.Path) -> Groups:
  """Reported runs by settings, the seed taken out; seeds in order, diverged runs left out."""
  groups: Groups = {}
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in sorted(rows, key=lambda r: (r["steps"], r["batch_size"], r["seed"])):
    if row["seed"] in SEEDS and row["eval_loss"] is not None:
      groups.setdefault(Job.of(row | {"seed": 0}), []).append(row)
  return groups


def find(groups: Groups, name: str, like: Job) -> Job | None:
  """The run of method `name` with as many replicas, steps and rows as `like`, if there is one.

  Of several with other rates the last: it was tried again.
  """

  def kind(job: Job):
    return job.method, job.sync_period, job.compressor, job.delay, job.alpha

  def size(job: Job):
    return job.replicas, job.steps, job.batch_size

  for job in reversed(groups):
    if (kind(job), size(job)) == (kind(METHODS[name]), size(like)):
      return job
  return None


def label(job: Job) -> str:
  """Names a run; what all runs have is left out."""
  parts = [job.method]
  parts += [f"H={job.sync_period}"] if job.sync_period else []
  parts += ["4-bit"] if job.compressor != "none" else []
  parts += [f"rho={job.sam_rho}"] if job.sam_rho else []
  parts += [f"delay {job.delay}"] if job.delay != Job.delay else []
  parts += [f"alpha {job.alpha}"] if job.alpha != Job.alpha else []
  parts += [f"{job.steps} steps"] if job.steps != Job.steps else []
  parts += [f"batch {job.batch_size}"] if job.batch_size != Job.batch_size else []
  return " ".join(parts)


def gaps(groups: Groups, job: Job, name: str) -> list[float]:
  """Excess over method `name` along the curve, mean over the seeds both have, in percent."""
  base = find(groups, name, job)
  curves = {} if base is None else {row["seed"]: row["curve"] for row in groups[base]}
  pairs = [(row["curve"], curves[row["seed"]]) for row in groups[job] if row["seed"] in curves]
  excess = [[100 * (a / b - 1) for (_, a), (_, b) in zip(*pair)] for pair in pairs]
  return [statistics.mean(at) for at in zip(*excess)]


def print_table(groups: Groups, jobs: list[Job], bases: tuple[str, ...]) -> None:
  """One line for each of `jobs`, with its final gap to each of `bases`."""
  heads = ["run", "lr", "outer lr", "momentum", "loss", "per seed", "of the mean"]
  heads += [f"to {name}" for name in bases]
  print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
  for job in jobs:
    losses = [row["eval_loss"] for row in groups[job]]
    means = [row["mean_loss"] for row in groups[job] if "mean_loss" in row]
    cells = [label(job), f"{job.lr:.2e}", f"{job.outer_lr}", f"{job.outer_momentum}"]
    cells += [f"{statistics.mean(losses):.4f}", ", ".join(f"{x:.4f}" for x in losses)]
    cells.append(f"{statistics.mean(means):.4f}" if means else "")
    for name in bases:
      along = gaps(groups, job, name)
      cells.append(f"{along[-1]:+.1f} %" if along else "")
    print(f"| {' | '.join(cells)} |")


def draw_losses(axes, groups: Groups, jobs: list[Job]) -> None:
  """Evaluation loss against steps, mean over seeds."""
  for job in jobs:
    curves = [row["curve"] for row in groups[job]]
    steps = [step for step, _ in curves[0]]
    mean = [statistics.mean(at) for at in zip(*([loss for _, loss in c] for c in curves))]
    axes.plot(steps[1:], mean[1:], **_style(job))
  axes.set(xlabel="step", ylabel="evaluation loss (nats/token)", xscale="log", ylim=(None, 4.5))


def draw_gaps(axes, groups: Groups, jobs: list[Job]) -> None:
  """What methods with rounds lose to data parallelism, against rounds."""
  for job in jobs:
    along = gaps(groups, job, "ddp")
    if job.sync_period and along:
      steps = [step for step, _ in groups[job][0]["curve"]]
      axes.plot([s / job.sync_period for s in steps[1:]], along[1:], **_style(job))
  axes.set(xlabel="rounds", ylabel="loss above data parallelism (%)", xscale="log")


def _style(job: Job) -> dict[str, Any]:
  return {"label": label(job), "ls": "--" if job.compressor != "none" else "-",
          "marker": ".", "lw": 1}  # fmt: skip


def draw(path: pathlib.Path, panels: list[tuple[Any, Groups, list[Job], str]]) -> None:
  """Panels side by side: how to draw each, of what, and its title."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, row = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5))
  for axes, (draw_panel, groups, jobs, title) in zip(row, panels):
    draw_panel(axes, groups, jobs)
    axes.set_title(title)
    if jobs:
      axes.legend(fontsize=6)
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("directory", type=pathlib.Path, help="folder that holds quality.jsonl")
  directory = parser.parse_args().directory
  groups = load(directory / "quality.jsonl")
  study = [j for j in groups if j.replicas == 4 and j.method in ("ddp", "one", "none", "diloco")]
  print_table(groups, study, ("ddp",))
  panels = [(draw_losses, groups, study, ""), (draw_gaps, groups, study, "")]
  draw(directory / "quality.png", panels)
  print("\nStreaming DiLoCo without its parts")
  streaming = [j for j in groups if j.replicas == 4 and j.method == "streaming_diloco"]
  print_table(groups, streaming, ("diloco",))
  panels = []
  for replicas in (4, 8):
    like = Job(method="ddp", replicas=replicas)
    names = [n for n in METHODS if n == "diloco" or n not in STUDY]
    found = [job for n in names if (job := find(groups, n, like)) is not None]
    print(f"\n{replicas} replicas")
    print_table(groups, found, ("ddp", "diloco"))
    panels.append((draw_losses, groups, found, f"{replicas} replicas"))
  draw(directory / "quality_methods.png", panels)


if __name__ == "__main__":
  main()
