"""`report.png`: loss against steps and against what was sent."""

import pathlib

from jaxcomm.training._run_folder import read_metrics


def plot_report(path: str | pathlib.Path, *, title: str = "", dense_bytes_per_step: float = 0.0):
  """Draws the run in `path` to `report.png`; needs matplotlib.

  Args:
    path: a run folder with `metrics.jsonl`.
    title: of the figure.
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
  train = [r for r in rows if "loss" in r]
  evals = [r for r in rows if "eval_loss" in r]
  figure = Figure(figsize=(11, 4))
  left, right = figure.subplots(1, 2, sharey=True)
  left.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, alpha=0.6, label="train")
  left.plot([r["step"] for r in evals], [r["eval_loss"] for r in evals], "o-", ms=3, label="eval")
  left.set(xlabel="step", ylabel="loss (nats/token)")
  sent = [r for r in train if r.get("wire_bytes_total", 0) > 0]
  right.plot([r["wire_bytes_total"] for r in sent], [r["loss"] for r in sent], lw=1, alpha=0.6)
  marks = [r for r in sent if "eval_loss" in r]
  right.plot([r["wire_bytes_total"] for r in marks], [r["eval_loss"] for r in marks], "o-", ms=3)
  if dense_bytes_per_step and train:
    right.axvline(
      dense_bytes_per_step * train[-1]["step"], color="gray", ls="--", label="data parallel"
    )
    right.legend()
  right.set(xlabel="bytes sent per device", xscale="log" if sent else "linear")
  left.legend()
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.suptitle(title)
  figure.tight_layout()
  target = path / "report.png"
  figure.savefig(target, dpi=120)
  return target
