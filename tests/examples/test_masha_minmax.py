"""The min-max script: what it prints and leaves behind, resumes exactly, and refuses."""

import json
import os
import re
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxcomm.training import launch, read_metrics, tree_digest
from jaxcomm.transforms import draw_refresh
from tests.examples.load_script import load_script

SMALL = ["--size", "8", "--keep-ratio", "0.25", "--log-every", "1", "--save-every", "8"]
STEPS = 21


@pytest.fixture(scope="module")
def script():
  with load_script("masha_minmax", "minmax_problems") as module:
    yield module


@pytest.fixture
def solve(script, capsys):
  """Runs the script with flags: what it prints. Leaves the precision as the script chose it."""

  def run(*argv):
    capsys.readouterr()
    launch(script.Config, script.main, [*SMALL, "--steps", str(STEPS), *map(str, argv)])
    return capsys.readouterr().out

  yield run
  jax.config.update("jax_enable_x64", False)


def final_state(path):
  step = max(int(p.name) for p in (path / "checkpoints").iterdir())
  with ocp.StandardCheckpointer() as checkpointer:
    return step, checkpointer.restore(path / "checkpoints" / str(step) / "state")


@pytest.mark.slow
def test_a_run_and_one_that_was_interrupted(script, solve, tmp_path, monkeypatch):
  """Bit for bit the same rows and state, MASHA's reference and errors among it."""
  out = solve("--out", tmp_path / "once")
  assert "parameters: 16\nmesh: replica 8" in out
  assert "data parallel over replica would send 112 B" in out  # 2 * 7/8 * 4 * 16

  taken, whole = iter(range(STEPS)), script.WholeProblem.__next__

  def stop_at(self):
    if next(taken) == 10:
      os.kill(os.getpid(), signal.SIGTERM)
    return whole(self)

  with monkeypatch.context() as patch:
    patch.setattr(script.WholeProblem, "__next__", stop_at)
    assert "SIGTERM: stopped after step 11 of 21" in solve("--out", tmp_path / "twice")
  assert "resumed from step 11." in solve("--out", tmp_path / "twice", "--resume")

  rows, again = ([{**r, "tokens_per_s": 0} for r in read_metrics(tmp_path / n)]
                 for n in ("once", "twice"))  # fmt: skip
  assert rows == again
  (steps, state), resumed = (final_state(tmp_path / n) for n in ("once", "twice"))
  assert steps == resumed[0] == STEPS
  assert tree_digest(state) == tree_digest(resumed[1])
  assert np.asarray(state["params"]).dtype == np.float64

  # What a step sends is counted exactly, refreshes where they are drawn.
  refreshed = np.asarray(jax.vmap(lambda i: draw_refresh(0, i, 0.75))(np.arange(STEPS)))
  assert 0 < refreshed.sum() < STEPS
  payload = 7 * (4 * 4 + 4 * 4 // 8)  # an all-gather of 4 values and places, to 7 others
  want = payload + refreshed * (2 * 7 * 8 * 16 // 8)  # and an all-reduce of 16 float64
  assert [r["wire_bytes"] for r in rows] == want.tolist()
  assert [r["values"] for r in rows] == (16 + np.cumsum(4 + 16 * refreshed)).tolist()
  assert rows[-1]["loss"] < min(0.0, rows[0]["loss"])

  summary = json.loads((tmp_path / "once" / "summary.json").read_text())
  assert summary["wire_bytes_per_step"]["replica"] == pytest.approx(payload + 224 / 4)
  assert summary["data"]["name"] == "bilinear game, seed 0"
  for name in ("config.json", "report.png"):
    assert (tmp_path / "twice" / name).stat().st_size > 100


@pytest.mark.slow
def test_a_dry_run_prints_what_a_run_would_send(solve, tmp_path):
  out = solve("--dry-run", "--out", tmp_path / "none", "--method", "masha1", "--dtype", "float32")
  assert "  replica    154 B\n" in out  # as above, but for a refresh of 2 * 7/8 * 4 * 16 / 4
  assert "memory per device: " in out
  assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_dense_extragradient_and_an_evaluation(solve):
  out = solve("--method", "extragradient", "--problem", "adversarial", "--eval-every", "7")
  assert "  replica    672 B\n" in out  # two means of 24 float64
  start, end = re.search(r"eval loss (\S+) \(from (\S+)\)", out).groups()[::-1]
  assert (start, float(end) < -0.5) == ("0.0000", True)
  assert f"done: 21 steps, loss {end}, " in out


BAD = [
  ({"keep_ratio": 1.0}, r"`keep_ratio` must be in \(0, 1\), got 1.0"),
  ({"size": 0}, "`size` must be at least 1, got 0"),
  ({"tensor": 2}, "a replica must have 1 device .* got `data_parallel` = 1, .* `tensor` = 2"),
  ({"lr": 0.0}, "`learning_rate` must be positive and finite, got 0.0"),
  ({"tau": 1.0}, r"`tau` must be in \[0, 1\), got 1.0"),
  ({"method": "masha1", "compressor": "top_k"}, "`compressor` must be unbiased .* see masha2"),
  ({"replica_change": "average_replicas", "resume": True, "out": "x"}, "is another problem"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[m[:20] for _, m in BAD])
def test_bad_flags(script, flags, message):
  with pytest.raises(ValueError, match=message):
    script.Config(**flags)


def test_too_few_devices(script):
  with pytest.raises(ValueError, match=r"`replicas` must not exceed the 4 devices, got 8"):
    script.build_step(script.Config(), None, jax.devices()[:4])
