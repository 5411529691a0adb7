"""The profiler window: which steps it holds, and that it is always closed."""

import contextlib
import gzip
import json

import jax
import pytest

from jaxcomm.training import RunConfig
from jaxcomm.training._profile import ProfileWindow, parse_window


@pytest.fixture
def trace(monkeypatch, tmp_path):
  """Notes of start and stop, in place of the profiler."""
  notes = []
  monkeypatch.setattr("jax.profiler.start_trace", lambda path: notes.append("start"))
  monkeypatch.setattr("jax.profiler.stop_trace", lambda: notes.append("stop"))

  def run(first, stop, steps):
    notes.clear()
    with ProfileWindow(tmp_path, first, stop) as window:
      for step in steps:
        window.before(step, ())
        notes.append(step)
    return list(notes)

  return run


def test_the_window_holds_its_steps(trace):
  assert trace(2, 4, range(1, 6)) == [1, "start", 2, 3, "stop", 4, 5]
  assert trace(1, 2, range(1, 4)) == ["start", 1, "stop", 2, 3]


def test_the_window_is_closed_where_the_loop_ends(trace):
  assert trace(3, 99, range(1, 5)) == [1, 2, "start", 3, 4, "stop"]


def test_a_resumed_run_may_begin_within_the_window_or_behind_it(trace):
  assert trace(2, 6, range(5, 8)) == ["start", 5, "stop", 6, 7]
  assert trace(2, 6, range(6, 8)) == [6, 7]


def test_the_window_is_closed_after_an_error(trace, tmp_path, monkeypatch):
  stopped = []
  monkeypatch.setattr("jax.profiler.stop_trace", lambda: stopped.append(True))
  with contextlib.suppress(KeyError), ProfileWindow(tmp_path, 1, 9) as window:
    window.before(1, ())
    raise KeyError
  assert stopped == [True]


@pytest.mark.parametrize("text", ["", "5", "5:", ":5", "0:5", "5:5", "6:5", "-1:5", "a:b", "1:2:3"])
def test_rejects(text):
  with pytest.raises(ValueError, match="`profile_steps` must be START:STOP with 1 <= START < STOP"):
    parse_window(text)


def test_a_window_behind_the_run_is_refused():
  with pytest.raises(ValueError, match="must begin at most at `steps` = 5, got '6:8'"):
    RunConfig(steps=5, profile_steps="6:8", out="x")


def test_a_trace_is_written(tiny, tmp_path):
  """With the real profiler: the steps of the window by name, and no others."""
  from jaxcomm.training import Loop, LoopConfig

  step = tiny.build_step(replicas=1, method="ddp")
  config = LoopConfig(steps=4, eval_every=0, save_every=0)
  with ProfileWindow(tmp_path / "profile", 2, 4) as window:
    Loop(config, step, tiny.Batches(), profile=window).run(step.init(jax.random.key(0)))
  (file,) = (tmp_path / "profile").rglob("*.trace.json.gz")
  events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
  steps = {e["args"]["step_num"] for e in events if e.get("name") == "train" and "args" in e}
  assert steps == {"2", "3"}
