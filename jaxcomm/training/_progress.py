"""Progress of a run: a bar on a terminal, lines elsewhere."""

import importlib.util
import sys
import time
from typing import Any


class Progress:
  """Shows steps, loss and speed.

  On a terminal a bar, if `rich` is installed; otherwise a line for each row logged, at most one per
  `seconds`, and always those with an evaluation.

  Args:
    steps: total number of steps.
    seconds: least time between two lines.
    quiet: show nothing, as all processes but the first do.
  """

  def __init__(self, steps: int, *, seconds: float = 2.0, quiet: bool = False):
    self._steps, self._seconds, self._quiet = steps, seconds, quiet
    self._last = 0.0
    self._bar = self._task = None

  def __enter__(self):
    if not self._quiet and on_terminal():
      from rich import progress

      self._bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[shown]}"),
      )
      self._bar.start()
      self._task = self._bar.add_task("train", total=self._steps, shown="")
    return self

  def __exit__(self, *exc):
    if self._bar is not None:
      self._bar.stop()

  def advance(self, step: int) -> None:
    """Moves the bar."""
    if self._bar is not None and self._task is not None:
      self._bar.update(self._task, completed=step)

  def report(self, row: dict[str, Any]) -> None:
    """Shows a logged row."""
    if self._quiet:
      return
    if self._bar is not None and self._task is not None:
      self._bar.update(self._task, completed=row["step"], shown=_text(row))
      if "eval_loss" in row:
        self._bar.console.print(f"step {row['step']:>6}  {_text(row)}")
      return
    now = time.monotonic()
    if "eval_loss" in row or now - self._last >= self._seconds or row["step"] == self._steps:
      self._last = now
      print(f"step {row['step']:>6}/{self._steps}  {_text(row)}", flush=True)


def on_terminal() -> bool:
  """Whether bars and tables can be drawn: standard output is a terminal, and `rich` is there."""
  return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def _text(row: dict[str, Any]) -> str:
  parts = [f"{k} {row[k]:.4f}" for k in ("loss", "eval_loss") if k in row]
  if row.get("tokens_per_s"):
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
  if "wire_bytes_total" in row:
    parts.append(f"sent {format_bytes(row['wire_bytes_total'])}/device")
  return "  ".join(parts)


def format_bytes(num_bytes: float) -> str:
  """Bytes in decimal units.

  Example:
    >>> format_bytes(1_234_567), format_bytes(12)
    ('1.23 MB', '12 B')
  """
  for unit in ("B", "kB", "MB", "GB"):
    if abs(num_bytes) < 1000:
      return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.2f} {unit}"
    num_bytes /= 1000
  return f"{num_bytes:.2f} TB"
