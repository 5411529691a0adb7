"""What is printed of a finished run."""

import io
import sys

import pytest

from jaxcomm.training._describe import format_count
from jaxcomm.training._results import describe_end, print_results, sparkline

SUMMARY = {
  "title": "a run", "steps": 4, "final_loss": 1.0, "eval_loss": 1.5, "first_eval_loss": 5.0,
  "wire_bytes_total": 2e4, "dense_wire_bytes_per_step": 1e6, "wire_bytes_logical": False,
  "wire_bytes_per_step": {"replica": 5e3}, "step_seconds": 0.05, "wall_seconds": 61.234,
}  # fmt: skip
ROWS = [
  {"step": 0, "eval_loss": 5.0},
  {"step": 2, "loss": 3.0, "tokens_per_s": 900.0},
  {"step": 4, "loss": 1.0, "eval_loss": 1.5, "tokens_per_s": 1100.0},
]


def printed(monkeypatch, *args, encoding="utf-8", terminal=False):
  stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
  stream.isatty = lambda: terminal
  monkeypatch.setattr(sys, "stdout", stream)
  print_results(*args)
  return stream.buffer.getvalue().decode(encoding)


def test_sparkline_goes_from_the_lowest_to_the_highest_mean():
  assert sparkline([0.0, 1.0, 7.0]) == "▁▂█"
  assert sparkline([1.0, 3.0, 0.0, 2.0, 9.0, 9.0], width=3) == "▂▁█"  # means 2, 1, 9
  assert sparkline([2.0, 2.0]) == "▁▁"
  assert sparkline([]) == ""
  assert len(sparkline(list(range(1000)))) == 32


def test_plain_without_a_terminal(monkeypatch, tmp_path):
  lines = printed(monkeypatch, SUMMARY, ROWS, tmp_path).splitlines()
  assert lines == [
    "a run",
    "  time             61.2 s for 4 steps, 50.0 ms per step, 1,000 tokens/s",
    "  loss             3.0000 → 1.0000  █▁",
    "  eval loss        5.0000 → 1.5000  █▁",
    "  sent per device  20.00 kB; data parallelism 4.00 MB, 200.0 times as much",
    f"  run folder       {tmp_path} (report.png, summary.json, metrics.jsonl)",
  ]


def test_data_parallelism_is_compared_over_replica_only(monkeypatch):
  summary = SUMMARY | {"wire_bytes_per_step": {"fsdp": 4e3, "replica": 1e3}}
  assert (
    "20.00 kB, of it 4.00 kB over replica; data parallelism 4.00 MB, 1,000.0 times as much"
    in printed(monkeypatch, summary, ROWS)
  )


@pytest.mark.parametrize("terminal", [False, True])
def test_what_cannot_be_shown_is_replaced(monkeypatch, terminal):
  text = printed(monkeypatch, SUMMARY, ROWS, encoding="ascii", terminal=terminal)
  assert "3.0000 -> 1.0000  #_" in text


def test_a_table_on_a_terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  text = printed(monkeypatch, SUMMARY, ROWS, terminal=True)
  assert "3.0000 → 1.0000  █▁" in text
  assert "─" in text


def test_a_run_that_logged_and_sent_nothing(monkeypatch):
  bare = {**SUMMARY, "final_loss": None, "eval_loss": None, "step_seconds": None}
  assert printed(monkeypatch, {**bare, "wire_bytes_total": 0.0}, []).splitlines() == [
    "a run", "  time             61.2 s for 4 steps", "  sent per device  0 B",
  ]  # fmt: skip
  assert describe_end({**bare, "wire_bytes_total": None}) == "done: 4 steps"
  assert describe_end(SUMMARY) == (
    "done: 4 steps, loss 1.0000, eval loss 1.5000 (from 5.0000), sent 20.00 kB per device"
  )


@pytest.mark.parametrize(
  ("count", "text"),
  [(999, "999"), (131_392, "131k"), (976_000, "976k"), (1.1e8, "110M"), (8_030_261_248, "8.03B")],
)
def test_counts_for_people(count, text):
  assert format_count(count) == text
