"""What `bench_network.py` makes of its measurements."""

import importlib.util
import json
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "scripts" / "bench_network.py"


@pytest.fixture(scope="module")
def bench():
  spec = importlib.util.spec_from_file_location("bench_network", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["bench_network"] = module  # dataclasses look their module up
  spec.loader.exec_module(module)
  return module


def test_a_peak_lies_between_two_pauses(bench):
  """Of host 1: 20 kB, a gap of 0.2 s and 30 kB are one burst; after 0.4 s comes another."""
  sent = [0, 20, 20, 20, 50, 50, 50, 50, 50, 90]
  rows = [{"seconds": 0.1 * i, "sent": [0, 1000 * kb]} for i, kb in enumerate(sent)]
  assert bench.peak(rows) == 50_000


def test_the_report_takes_medians_and_counts_steps_to_the_loss_of_ddp(bench, tmp_path, capsys):
  common = {"hosts": 2, "git_commit": "0"}
  bytes_ = {"socket_bytes": 1.01e6, "meter_bytes": 1e6, "peak_bytes": 2e6}
  rows = [
    {"method": name, "rate": "10mbit", "repeat": i, "seconds_per_step": x, **bytes_, **common}
    for name, times in (("none", [1, 1, 9]), ("ddp", [8, 8, 8]), ("int8", [2, 4, 3]))
    for i, x in enumerate(times)
  ]
  rows += [
    {"method": name, "rate": None, "repeat": 0, "curve": curve, **common}
    for name, curve in (
      ("none", [[0, 7.0], [60, 6.0]]),
      ("ddp", [[0, 7.0], [60, 5.0]]),
      ("int8", [[0, 7.0], [20, 5.0], [60, 4.0]]),
    )
  ]
  (tmp_path / "network.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  bench.main(["--out", str(tmp_path), "--report", str(tmp_path / "report")])
  lines = capsys.readouterr().out.splitlines()
  assert "2 hosts, 10mbit" in lines
  assert "| none | 1.000 | 1.00 | 8.00 | 1.010 | 1.000 | 2.000 | - | - | - |" in lines
  assert "| int8 | 3.000 | 3.00 | 2.67 | 1.010 | 1.000 | 2.000 | 20 | 60 | 8.00 |" in lines
  assert {path.name for path in (tmp_path / "report").iterdir()} == {"network.jsonl", "network.png"}


def test_rejects(bench, capsys):
  with pytest.raises(SystemExit, match="2"):
    bench.main(["--out", "unused", "--repeats", "0"])
  assert "`repeats` must be at least 1, got 0" in capsys.readouterr().err
