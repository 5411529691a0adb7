"""`report.png`: loss against steps and against what was sent."""

import itertools
import pathlib
from typing import Any

import numpy as np

from jaxcomm.training._progress import format_bytes
from jaxcomm.training._run_folder import read_metrics

_TRAIN, _EVAL, _DENSE, _TEXT = "#4477aa", "#cc3311", "#888888", "#222222"
PLOT_STYLE: dict[Any, Any] = {
  "font.size": 13,
  "axes.titlesize": 14,
  "axes.labelsize": 14,
  "axes.edgecolor": "#888888",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": "#e6e6e6",
  "legend.frameon": False,
  "text.color": _TEXT,
  "axes.labelcolor": _TEXT,
}
"""Matplotlib settings of all pictures of runs, for `matplotlib.rc_context`."""


def plot_report(
  path: str | pathlib.Path,
  *,
  title: str = "",
  subtitle: str = "",
  dense_bytes_per_step: float = 0.0,
) -> pathlib.Path:
  """Draws the run in `path` to `report.png`; needs matplotlib.

  Args:
    path: a run folder with `metrics.jsonl`.
    title: of the figure.
    subtitle: a line below it, for parameters and setting.
    dense_bytes_per_step: bytes per device and step of plain data parallelism, drawn as a mark of
      what the same number of steps would have sent; 0 for none.

  Returns:
    Path of the picture.
  """
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.figure import Figure

  path = pathlib.Path(path)
  rows = read_metrics(path)
  with matplotlib.rc_context(PLOT_STYLE):
    figure = Figure(figsize=(12.8, 5.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, rect=(0, 0, 1, 0.87))  # pyright: ignore
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
      axes.margins(y=0.13)
    _against_steps(left, rows)
    _against_bytes(right, rows, dense_bytes_per_step)
    figure.text(0.012, 0.965, title, fontsize=19, fontweight="bold", va="top")
    figure.text(0.012, 0.895, subtitle, fontsize=13, color="#666666", va="top")
    target = path / "report.png"
    figure.savefig(target, dpi=150)
  return target


def _against_steps(axes, rows: list[dict[str, Any]]) -> None:
  train = [r for r in rows if "loss" in r]
  evals = [r for r in rows if "eval_loss" in r]
  steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
  axes.plot(steps, losses, color=_TRAIN, lw=1, alpha=0.35)
  axes.plot(steps, _smooth(losses), color=_TRAIN, lw=2.2, label="training")
  steps, losses = [r["step"] for r in evals], [r["eval_loss"] for r in evals]
  axes.plot(steps, losses, "o-", color=_EVAL, lw=1.5, ms=6, label="evaluation")
  if evals:
    _label_last(axes, steps[-1], losses[-1])
  axes.set(xlabel="step", ylabel="loss")
  axes.legend(loc="upper right")


def _against_bytes(axes, rows: list[dict[str, Any]], dense_bytes_per_step: float) -> None:
  axes.set(xlabel="bytes sent per device")
  axes.tick_params(labelleft=True)
  sent = [r for r in rows if r.get("wire_bytes_total", 0) > 0]
  if not sent:
    axes.text(0.5, 0.5, "nothing was sent", ha="center", color="#666666", transform=axes.transAxes)
    axes.set(xticks=[])
    return
  axes.set_xscale("log")
  axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value).replace(".00", ""))
  groups = itertools.groupby(sent, key=lambda r: r["wire_bytes_total"])  # the steps of one round
  means = [(total, np.mean([r["loss"] for r in group])) for total, group in groups]
  totals, losses = zip(*means)
  axes.plot(totals, losses, color=_TRAIN, lw=1, alpha=0.35)
  axes.plot(totals, _smooth(losses), color=_TRAIN, lw=2.2)
  marks = [(r["wire_bytes_total"], r["eval_loss"]) for r in sent if "eval_loss" in r]
  if marks:
    axes.plot(*zip(*marks), "o-", color=_EVAL, lw=1.5, ms=6)
    _label_last(axes, *marks[-1])
  if dense_bytes_per_step:
    _mark_dense(axes, totals[-1], dense_bytes_per_step * rows[-1]["step"])


def _mark_dense(axes, sent: float, dense: float) -> None:
  """The line of data parallelism, and the arrow of what was saved."""
  axes.axvline(dense, color=_DENSE, ls="--", lw=1.8)
  side = "right" if dense >= sent else "left"
  axes.annotate(
    "data parallelism,\nsame steps",
    (dense, 0.98),
    xycoords=("data", "axes fraction"),
    xytext=(-10 if side == "right" else 10, 0),
    textcoords="offset points",
    ha=side,
    va="top",
    color="#555555",
  )
  ratio = dense / sent
  if ratio < 1.5:
    return
  axes.annotate(
    "",
    (sent, 0.42),
    (dense, 0.42),
    xycoords=("data", "axes fraction"),
    textcoords=("data", "axes fraction"),
    arrowprops={"arrowstyle": "->", "color": _TEXT, "lw": 1.6, "shrinkA": 0, "shrinkB": 4},
  )
  axes.annotate(
    f"{ratio:,.0f} times less" if ratio >= 10 else f"{ratio:.1f} times less",
    ((sent * dense) ** 0.5, 0.44),
    xycoords=("data", "axes fraction"),
    ha="center",
    va="bottom",
    fontweight="bold",
  )


def _label_last(axes, x: float, y: float) -> None:
  axes.annotate(
    f"{y:.3f}",
    (x, y),
    xytext=(0, -10),
    textcoords="offset points",
    ha="center",
    va="top",
    color=_EVAL,
    fontweight="bold",
    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
  )


def _smooth(values) -> np.ndarray:
  """Centred moving mean over about a twentieth of `values`, shorter at both ends."""
  values = np.asarray(values, float)
  half = len(values) // 40
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  reach = np.minimum(np.minimum(index, len(values) - 1 - index), half)
  return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)
