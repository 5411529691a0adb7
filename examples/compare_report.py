"""Tables and pictures of several finished runs: what `compare_methods.py` leaves behind."""

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm.training import PLOT_STYLE, bytes_over_replica, format_bytes, read_metrics

MODEL = "modelled seconds: steps x step time here\n+ bytes / link speed (no latency, no overlap)"
_STYLE: dict[Any, Any] = {**PLOT_STYLE, "font.size": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """A finished run.

  Attributes:
    name: of its folder.
    steps: int[E], at which it was evaluated.
    sent: float[E], bytes that a device had sent over `replica` by then.
    losses: float[E], of these evaluations.
    tokens: seen by all replicas, in all.
    step_seconds: median time of a step, without evaluations.
  """

  name: str
  steps: np.ndarray
  sent: np.ndarray
  losses: np.ndarray
  tokens: int
  step_seconds: float

  def seconds(self, mbits: float) -> np.ndarray:
    """Modelled time of the evaluations over a link of `mbits` Mbit/s: float[E]."""
    return self.steps * self.step_seconds + 8 * self.sent / (1e6 * mbits)


def read_run(path: pathlib.Path, tokens_per_step: int) -> Run:
  """The run in folder `path`, one of `train_lm.py` that has finished and was evaluated."""
  summary, rows = json.loads((path / "summary.json").read_text()), read_metrics(path)
  per_step = summary["wire_bytes_per_step"]
  inside = sum(per_step.values()) - bytes_over_replica(per_step)
  evals = [row for row in rows if "eval_loss" in row]
  steps = np.array([row["step"] for row in evals])
  totals = np.array([row.get("wire_bytes_total", 0.0) for row in evals])
  # Of all starts of the run, unlike the summary's time of a step, which is of the last.
  speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
  return Run(
    name=path.name,
    steps=steps,
    sent=totals - inside * steps,
    losses=np.array([row["eval_loss"] for row in evals]),
    tokens=tokens_per_step * summary["steps"],
    step_seconds=tokens_per_step / float(np.median(speeds)),
  )


def table(runs: Sequence[Run], links: Sequence[float]) -> list[dict[str, Any]]:
  """One row per run: its end, and its modelled time at each link speed."""
  return [
    {
      "method": run.name,
      "eval_loss": float(run.losses[-1]),
      "steps": int(run.steps[-1]),
      "tokens": run.tokens,
      "bytes_sent": float(run.sent[-1]),
      "step_seconds": run.step_seconds,
      **{f"seconds_at_{mbits:g}_mbits": float(run.seconds(mbits)[-1]) for mbits in links},
    }
    for run in runs
  ]


def write_csv(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Writes the table; floats with all of their digits."""
  with path.open("w", newline="") as f:
    writer = csv.DictWriter(f, rows[0])
    writer.writeheader()
    writer.writerows(rows)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
  """The table for people."""
  links = [key for key in rows[0] if key.startswith("seconds_at_")]
  heads = ["method", "eval loss", "sent/device", "ms/step"]
  heads += [f"s at {key.split('_')[2]} Mbit/s" for key in links]
  lines = [heads]
  for row in rows:
    line = [row["method"], f"{row['eval_loss']:.4f}", format_bytes(row["bytes_sent"])]
    line.append(f"{1000 * row['step_seconds']:.1f}")
    lines.append(line + [f"{row[key]:,.1f}" for key in links])
  return align(lines)


def align(lines: Sequence[Sequence[str]]) -> str:
  """Columns of `lines`, the first one to the left."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  return "\n".join(
    "  ".join(
      [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:]))]
    ).rstrip()
    for line in lines
  )


def draw(path: pathlib.Path, runs: Sequence[Run], links: Sequence[float], title: str) -> None:
  """Evaluation loss against steps, against bytes, and against modelled time at each speed."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(16, 6.5), layout="constrained")
    grid = figure.add_gridspec(len(links), 3)
    by_step = figure.add_subplot(grid[:, 0])
    by_bytes = figure.add_subplot(grid[:, 1], sharey=by_step)
    by_time: list[Any] = []
    for i in range(len(links)):
      first = by_time[0] if by_time else None
      by_time.append(figure.add_subplot(grid[i, 2], sharey=by_step, sharex=first, xscale="log"))
    for i, run in enumerate(runs):
      style = {"color": f"C{i}", "marker": "os^vDPX*"[i % 8], "ms": 4, "lw": 1.5}
      by_step.plot(run.steps, run.losses, label=run.name, **style)
      _against_bytes(by_bytes, run, style)
      for axes, mbits in zip(by_time, links):
        axes.plot(run.seconds(mbits)[1:], run.losses[1:], **style)
    _label(by_step, by_bytes, by_time, links)
    figure.legend(loc="outside lower center", ncols=min(len(runs), 6))
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _against_bytes(axes, run: Run, style: dict[str, Any]) -> None:
  some = run.sent > 0
  if some.any():
    axes.plot(run.sent[some], run.losses[some], **style)
  else:  # no place on a logarithmic axis
    axes.axhline(run.losses[-1], color=style["color"], ls=":", lw=1.5)


def _label(by_step, by_bytes, by_time, links: Sequence[float]) -> None:
  by_step.set(xlabel="step", ylabel="evaluation loss (nats/token)", title="equal tokens")
  by_bytes.set(
    xlabel="bytes sent per device\n(dotted: the end of a run that sends nothing)",
    title="bytes sent",
    xscale="log",
  )
  by_bytes.xaxis.set_major_formatter(lambda value, _: format_bytes(value).replace(".00", ""))
  by_time[0].set_title("time")
  for axes, mbits in zip(by_time, links):
    axes.text(0.98, 0.92, f"{mbits:g} Mbit/s", ha="right", va="top", transform=axes.transAxes)
    axes.tick_params(labelbottom=axes is by_time[-1])
  by_time[-1].set_xlabel(MODEL)
