"""What is printed of a finished run: a table with the curve of its loss, and one line."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxcomm.training._progress import format_bytes, on_terminal
from jaxcomm.training._wire import bytes_over_replica

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-:=+*#"
_ASCII = str.maketrans(dict(zip(_BARS, _ASCII_BARS)) | {"→": "->"})


def sparkline(values: Sequence[float], width: int = 32) -> str:
  """A curve in one line: means of `width` equal parts of `values`, from lowest to highest.

  Example:
    >>> sparkline([8.0, 4.0, 2.0, 1.0])
    '█▄▂▁'
  """
  if not values:
    return ""
  parts = [part.mean() for part in np.array_split(np.asarray(values), min(width, len(values)))]
  low, high = min(parts), max(parts)
  scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
  return "".join(_BARS[round((part - low) * scale)] for part in parts)


def print_results(
  summary: dict[str, Any], rows: Sequence[dict[str, Any]], path: pathlib.Path | None = None
) -> None:
  """Prints the table: with rules and colours on a terminal that has `rich`, else plain.

  Args:
    summary: content of summary.json.
    rows: content of metrics.jsonl.
    path: the run folder; None for none.
  """
  table = _table(summary, rows, path)
  if on_terminal():
    _print_rich(summary["title"], table)
    return
  width = max(len(name) for name, _ in table)
  text = "\n".join(f"  {name:<{width}}  {value}" for name, value in table)
  print(_printable(f"{summary['title']}\n{text}"), flush=True)


def describe_end(summary: dict[str, Any]) -> str:
  """The last line of a run."""
  parts = [f"done: {summary['steps']} steps"]
  if summary["final_loss"] is not None:
    parts.append(f"loss {summary['final_loss']:.4f}")
  if summary["eval_loss"] is not None:
    start = summary["first_eval_loss"]
    begin = f" (from {start:.4f})" if start is not None else ""
    parts.append(f"eval loss {summary['eval_loss']:.4f}{begin}")
  if summary["wire_bytes_total"] is not None:
    parts.append(f"sent {format_bytes(summary['wire_bytes_total'])} per device")
  return ", ".join(parts)


def _table(summary, rows, path) -> list[tuple[str, str]]:
  table = [("time", _time(summary, rows))]
  for name, label in (("loss", "loss"), ("eval_loss", "eval loss")):
    values = [row[name] for row in rows if name in row]
    if len(values) > 1:
      table.append((label, f"{values[0]:.4f} → {values[-1]:.4f}  {sparkline(values)}"))
  if summary["wire_bytes_total"] is not None:
    table.append(("sent per device", _sent(summary)))
  if path is not None:
    table.append(("run folder", f"{path} (report.png, summary.json, metrics.jsonl)"))
  return table


def _time(summary, rows) -> str:
  text = f"{summary['wall_seconds']:,.1f} s for {summary['steps']:,} steps"
  if summary["step_seconds"] is not None:
    text += f", {1000 * summary['step_seconds']:.1f} ms per step"
  speeds = [row["tokens_per_s"] for row in rows if row.get("tokens_per_s")]
  return f"{text}, {np.median(speeds):,.0f} tokens/s" if speeds else text


def _sent(summary) -> str:
  sent = summary["wire_bytes_total"]
  steps, per_step = summary["steps"], summary["wire_bytes_per_step"]
  dense = summary["dense_wire_bytes_per_step"] * steps
  inner = sum(per_step.values()) - bytes_over_replica(per_step)
  over = sent - inner * steps
  logical = " (logical: the replicas share devices)" if summary["wire_bytes_logical"] else ""
  text = f"{format_bytes(sent)}{logical}"
  if inner:
    text += f", of it {format_bytes(over)} over replica"
  if dense and over:
    text += f"; data parallelism {format_bytes(dense)}, {dense / over:,.1f} times as much"
  return text


def _print_rich(title: str, table: Sequence[tuple[str, str]]) -> None:
  from rich import box, console, text
  from rich import table as rich_table

  grid = rich_table.Table(
    title=text.Text(title, "bold"), title_justify="left", show_header=False, box=box.HORIZONTALS
  )
  grid.add_column(style="cyan", no_wrap=True)
  grid.add_column()
  for name, value in table:
    grid.add_row(name, text.Text(_printable(value)))
  console.Console().print(grid)


def _printable(value: str) -> str:
  """`value` in the characters that standard output can show."""
  try:
    value.encode(getattr(sys.stdout, "encoding", None) or "ascii")
  except UnicodeEncodeError:
    return value.translate(_ASCII)
  return value
