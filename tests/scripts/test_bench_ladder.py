"""What `bench_ladder.py` makes of its runs, and that a study runs each job once."""

import concurrent.futures
import dataclasses
import importlib.util
import json
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture(scope="module")
def bench():
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_ladder", SCRIPTS / "bench_ladder.py")
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, "bench_ladder", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module


def study(bench, path, loss):
  """Results of jobs that take no time, and the jobs that were run."""
  ran = []

  def run(job):
    ran.append(job)
    return {**dataclasses.asdict(job), "eval_loss": loss(job), "seconds": 0.0}

  pool = concurrent.futures.ThreadPoolExecutor(1)
  return bench.Results(path, pool, bench.Job, run), ran


def test_a_study_goes_on_where_it_stopped_and_tunes_standard_only(bench, tmp_path):
  path = tmp_path / "runs.jsonl"

  def loss(job):  # 16e-3 diverges
    return None if job.lr > 12e-3 else abs(job.lr - 5e-3)

  results, ran = study(bench, path, loss)
  assert bench.tune(results) == 4e-3 * 1.4
  assert [job.lr for job in ran] == [2e-3, 4e-3, 8e-3, 16e-3, 4e-3 * 0.7, 4e-3 * 1.4]
  assert {(job.residual, job.seed) for job in ran} == {("standard", bench.TUNE_SEED)}

  # An older version had no conversions: its rows lack their fields.
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  kept = [row for row in rows if row["lr"] != 4e-3 * 1.4]
  old = [{k: v for k, v in row.items() if k != "start_lr"} for row in kept]
  path.write_text("".join(json.dumps(row) + "\n" for row in old))
  results, ran = study(bench, path, loss)
  assert bench.tune(results) == 4e-3 * 1.4
  assert [job.lr for job in ran] == [4e-3 * 1.4]


def rows_of(bench, residual, losses, **changes):
  return [
    {
      **dataclasses.asdict(bench.Job(residual=residual, lr=4e-3, seed=seed, **changes)),
      "first_eval_loss": 3.5 if changes else 6.0,
      "eval_loss": loss,
      "curve": [(0, 3.5 if changes else 6.0), (10, loss)],
    }
    for seed, loss in zip((0, 1, 2), losses)
  ]


def test_the_report_says_what_holds(bench, tmp_path, capsys):
  retrained = {"steps": 50, "start_lr": 4e-3}
  rows = [
    *rows_of(bench, "desync-2x", (3.06, 3.03, 3.09)),
    *rows_of(bench, "standard", (3.0, 3.0, 3.0)),
    *rows_of(bench, "ladder", (3.15, 3.0, 3.15)),
    *rows_of(bench, "desync-4x", (3.03, 3.03, None)),
    *rows_of(bench, "standard", (2.95, 2.95, 2.95), **retrained),
    *rows_of(bench, "ladder", (3.0, 3.05, 2.95), **retrained, ladder_layers=4),
    *rows_of(bench, "ladder", (3.2, 3.2, 3.2), **retrained, ladder_layers=8),
    {**rows_of(bench, "standard", (1.0,))[0], "seed": bench.TUNE_SEED},  # not reported
  ]
  path = tmp_path / "runs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  streams, tokens = bench.RESIDUALS, 1024
  bench.report(bench.load(path), tmp_path, streams, num_layers=8, tokens=tokens)
  lines = capsys.readouterr().out.splitlines()
  assert "| standard | 4.00e-03 | 3.0000 | 3.0000, 3.0000, 3.0000 | +0.00 % |" in lines[3]
  assert "| ladder | 4.00e-03 | 3.1000 |" in lines[4]
  assert "| +3.33 % | +5.00, +0.00, +5.00 |" in lines[4]
  # Jumps of 0.5, of which 0.5, 0.45 and 0.55 are gone.
  half = "| 4 of 8 | 4.00e-03 | 3.0000 | 3.5000 | 3.0000 | 100.0 % | 100.0, 90.0, 110.0 | +0.0500 |"
  assert half in lines
  assert lines[-4:] == [
    "ladder within 3 % of standard: MISSED (+3.33 %)",
    "desync-4x worse than desync-2x worse than standard: MISSED",
    "4 converted layers recover 80 % of the jump: holds (100.0 %)",
    "8 converted layers recover 80 % of the jump: MISSED (60.0 %)",
  ]
  assert (tmp_path / "ladder.png").stat().st_size > 10_000
