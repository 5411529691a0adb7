"""The loop: what is read when, what is saved when, and when it stops."""

import itertools
import os
import shutil
import signal
import time
import types

import jax
import numpy as np
import pytest

from jaxcomm.training import (
  Checkpoints,
  Loop,
  LoopConfig,
  NonFiniteLossError,
  RunFolder,
  StepWire,
  read_metrics,
  tree_digest,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")
WIRE = StepWire(
  levels=({"fsdp": 10.0}, {"fsdp": 10.0, "replica": 300.0}), dense=1000.0, logical=False
)


@pytest.fixture(scope="module")
def step(tiny):
  return tiny.build_step(replicas=2, method="diloco_int4")


@pytest.fixture
def folder(tmp_path):
  folder = RunFolder(tmp_path / "run", {})
  yield folder
  folder.close()


def config(**kwargs):
  defaults = {"steps": 10, "log_every": 1, "eval_every": 0, "save_every": 0}
  return LoopConfig(**{**defaults, **kwargs})


def without_speed(rows):
  return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


# The order of things, on a step that only takes notes.


class Recorder:
  """Looks like a `TrainStep`; notes when a step is dispatched and when its metrics are read."""

  def __init__(self, losses=None):
    self.events, self._losses = [], losses or {}
    self.state = types.SimpleNamespace(step=0, params={"w": np.zeros(1, np.float32)})
    devices = np.array(jax.devices()[:1])
    self.batch_sharding = jax.NamedSharding(jax.sharding.Mesh(devices, ("replica",)), jax.P())
    self._steps = 0

  def step(self, state, batch):
    self._steps += 1
    self.events.append(f"dispatch {self._steps}")
    return state, {"loss": Metric(self, self._steps, self._losses.get(self._steps, 1.0))}

  def to_logical(self, state):
    return state

  def evaluate(self, state, batch):
    self.events.append(f"evaluate {self._steps}")
    ones = np.ones(2, np.float32)
    return {"loss_sum": 6.0 * ones, "tokens": 2.0 * ones}

  def save(self, step, state, meta, *, eval_loss=None):
    self.events.append(f"save {step}")

  def wait(self):
    self.events.append("wait")

  @property
  def steps(self):
    return sorted({int(e.split()[1]) for e in self.events if e.startswith("save")})


class Metric:
  def __init__(self, recorder, step, value):
    self._recorder, self._step, self._value = recorder, step, value

  def __array__(self, dtype=None, copy=None):
    self._recorder.events.append(f"read {self._step}")
    return np.full(2, self._value, dtype or np.float32)


def test_metrics_of_a_step_are_read_while_the_next_runs(tiny):
  recorder = Recorder()
  result = Loop(config(steps=4), recorder, tiny.Batches()).run(recorder.state)
  want = ["dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2", "dispatch 4", "read 3"]
  assert recorder.events == [*want, "read 4"]
  assert (result.step, result.loss, result.terminated) == (4, 1.0, False)


def test_a_step_is_read_before_it_is_evaluated_or_saved_for_good(tiny):
  recorder = Recorder()
  loop = Loop(
    config(steps=4, eval_every=4, save_every=3),
    recorder,
    tiny.Batches(),
    eval_batches=lambda: [next(tiny.Batches())],
    checkpoints=recorder,
  )
  result = loop.run(recorder.state)
  assert recorder.events == [
    *("evaluate 0", "dispatch 1", "dispatch 2", "read 1"),
    *("dispatch 3", "read 2", "read 3", "save 3"),
    *("dispatch 4", "evaluate 4", "read 4", "save 4", "wait"),
  ]
  assert (result.eval_loss, result.first_eval_loss) == (3.0, 3.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_stops_after_one_more_dispatch(tiny, bad):
  recorder = Recorder(losses={3: bad})
  loop = Loop(config(steps=9, save_every=1), recorder, tiny.Batches(), checkpoints=recorder)
  message = rf"the loss is {bad} at step 3; the last checkpoint is of step 2\. Try a lower"
  with pytest.raises(NonFiniteLossError, match=message):
    loop.run(recorder.state)
  assert recorder.steps == [1, 2]
  recorder = Recorder(losses={3: bad})
  with pytest.raises(NonFiniteLossError, match="at step 3; there is no checkpoint"):
    Loop(config(steps=9), recorder, tiny.Batches()).run(recorder.state)
  assert recorder.events[-2:] == ["dispatch 4", "read 3"]


# Stopping before anything bad is saved.


def test_nan_loss_leaves_the_last_good_checkpoint(tiny, step, folder):
  bad = {"x": np.full((8, 8), np.nan, np.float32), "scale": np.ones((8,), np.float32)}
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    loop = Loop(
      config(save_every=3), step, tiny.Batches({8: bad}), folder=folder, checkpoints=checkpoints
    )
    with pytest.raises(NonFiniteLossError, match=r"nan at step 8; the last .* of step 6"):
      loop.run(step.init(jax.random.key(0)))
    assert checkpoints.steps == [3, 6]
    state = checkpoints.restore().state
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))
  assert [r["step"] for r in read_metrics(folder.path)] == list(range(1, 8))


def test_parameters_that_are_not_finite_are_never_saved(tiny, step, folder):
  """The gradient of step 6 is NaN though its loss is finite: its state must not be kept."""
  good = next(tiny.Batches())
  bad = {"x": good["x"], "scale": np.zeros((8,), np.float32)}
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    loop = Loop(
      config(save_every=3), step, tiny.Batches({6: bad}), folder=folder, checkpoints=checkpoints
    )
    with pytest.raises(NonFiniteLossError, match=r"not finite after step 6; the last .* step 3"):
      loop.run(step.init(jax.random.key(0)))
    assert checkpoints.steps == [3]
  rows = read_metrics(folder.path)
  assert rows[-1]["step"] == 6
  assert np.isfinite(rows[-1]["loss"])


# What is logged and counted.


def test_rows_and_bytes(tiny, step, folder):
  loop = Loop(
    config(steps=9, log_every=2, eval_every=5, tokens_per_step=7),
    step,
    tiny.Batches(),
    eval_batches=lambda: [next(tiny.Batches())],
    wire=WIRE,
    folder=folder,
  )
  result = loop.run(step.init(jax.random.key(0)))
  rows = {row["step"]: row for row in read_metrics(folder.path)}
  assert sorted(rows) == [0, 2, 4, 5, 6, 8, 9]  # the last step is always logged and evaluated
  assert set(rows[0]) == {"step", "eval_loss"}
  common = {"step", "loss", "tokens", "tokens_per_s", "wire_bytes", "wire_bytes_total"}
  assert [s for s, row in rows.items() if set(row) == common | {"eval_loss"}] == [5, 9]
  assert all(set(rows[s]) == common for s in (2, 4, 6, 8))
  # A round ends at steps 4 and 8; every step is counted, logged or not.
  assert {s: row["wire_bytes"] for s, row in rows.items() if s} == {
    2: 10.0, 4: 310.0, 5: 10.0, 6: 10.0, 8: 310.0, 9: 10.0,
  }  # fmt: skip
  assert [rows[s]["wire_bytes_total"] for s in (2, 4, 5, 6, 8, 9)] == [20, 340, 350, 360, 680, 690]
  assert result.wire_bytes_total == 690
  assert (result.loss, result.eval_loss) == (rows[9]["loss"], rows[9]["eval_loss"])
  assert result.first_eval_loss == rows[0]["eval_loss"]
  assert rows[5]["tokens_per_s"] > 0


def test_losses_are_those_of_the_step(tiny, step, folder):
  state = step.init(jax.random.key(0))
  Loop(config(), step, tiny.Batches(), folder=folder).run(state)
  state, losses = tiny.advance(step, step.init(jax.random.key(0)), tiny.Batches(), 10)
  np.testing.assert_allclose([r["loss"] for r in read_metrics(folder.path)], losses, rtol=1e-6)


def test_no_logging_no_evaluation_no_checkpoints(tiny, step, folder):
  result = Loop(config(log_every=0), step, tiny.Batches(), folder=folder).run(
    step.init(jax.random.key(0))
  )
  assert read_metrics(folder.path) == []
  assert result.step == 10
  assert result.wire_bytes_total is None
  assert result.eval_loss is None


def test_no_steps(tiny, step):
  state = step.init(jax.random.key(0))
  digest = tree_digest(state)
  result = Loop(config(steps=0), step, tiny.Batches()).run(state)
  assert (result.step, result.loss, result.step_seconds) == (0, None, None)
  assert tree_digest(result.state) == digest


# Checkpoints of the loop.


@pytest.mark.parametrize("split", [3, 4, 6])
def test_resume_gives_the_same_rows_and_bits(tiny, step, folder, tmp_path, split):
  """At the end of a round (4) and within one."""
  common = {"eval_batches": lambda: [next(tiny.Batches())], "wire": WIRE}
  periods = {"eval_every": 3, "tokens_per_step": 7}
  whole = RunFolder(tmp_path / "whole", {})
  want = Loop(config(**periods), step, tiny.Batches(), folder=whole, **common).run(
    step.init(jax.random.key(0))
  )
  parts = {"folder": folder, **common}
  with Checkpoints(folder.checkpoints, step.layout, keep=9) as checkpoints:
    loop = Loop(
      config(**periods, save_every=split), step, tiny.Batches(), checkpoints=checkpoints, **parts
    )
    loop.run(step.init(jax.random.key(0)))
    later = [s for s in checkpoints.steps if s > split]
  for s in later:  # as if killed some time after step `split`
    shutil.rmtree(folder.checkpoints / str(s))
  folder.close()
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    restored = checkpoints.restore()
    assert restored.step == split
    folder.continue_from(split)
    loop = Loop(config(**periods), step, tiny.Batches(), checkpoints=checkpoints, **parts)
    got = loop.run(restored.state, meta=restored.meta)
  whole.close()
  rows = without_speed(read_metrics(whole.path))
  assert without_speed(read_metrics(folder.path)) == rows
  assert tree_digest(got.state) == tree_digest(want.state)
  for name in ("step", "loss", "eval_loss", "first_eval_loss", "wire_bytes_total"):
    assert getattr(got, name) == getattr(want, name), name


def test_a_finished_run_restored_keeps_its_losses(tiny, step, folder):
  common = {"eval_batches": lambda: [next(tiny.Batches())], "wire": WIRE}
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    first = Loop(config(eval_every=5), step, tiny.Batches(), checkpoints=checkpoints, **common).run(
      step.init(jax.random.key(0))
    )
    restored = checkpoints.restore()
    again = Loop(config(eval_every=5), step, tiny.Batches(), checkpoints=checkpoints, **common).run(
      restored.state, meta=restored.meta
    )
    assert checkpoints.steps == [10]
  assert again.step == 10
  assert (again.loss, again.eval_loss) == (first.loss, first.eval_loss)
  assert again.wire_bytes_total == first.wire_bytes_total


def test_the_end_is_saved_once_and_the_best_is_kept(tiny, step, folder):
  """Evaluation losses 5, 1, 4, 4, ... at steps 0, 2, 4, ...: step 2 stays beside the latest."""
  losses = itertools.chain([5.0, 1.0], itertools.repeat(4.0))
  loop_step = tiny.replace(step, evaluate=lambda state, batch: {
    "loss_sum": np.float32(next(losses)), "tokens": np.float32(1),
  })  # fmt: skip
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    Loop(
      config(steps=11, eval_every=2, save_every=2),
      loop_step,
      tiny.Batches(),
      eval_batches=lambda: [next(tiny.Batches())],
      checkpoints=checkpoints,
    ).run(step.init(jax.random.key(0)))
    assert checkpoints.steps == [2, 10, 11]
    assert checkpoints.restore().state.step == 11


def test_only_the_end_is_saved_with_a_period_of_zero(tiny, step, folder):
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    Loop(config(steps=3), step, tiny.Batches(), checkpoints=checkpoints).run(
      step.init(jax.random.key(0))
    )
    assert checkpoints.steps == [3]


def test_wall_seconds_go_on_from_those_of_the_checkpoint(tiny):
  """Of a run whose earlier starts took 1000 s, in a start that began 50 s ago."""
  recorder, metas = Recorder(), []
  recorder.save = lambda step, state, meta, **kwargs: metas.append(meta)
  counters = dict.fromkeys(("loss", "eval_loss", "first_eval_loss"), None)
  meta = {"iterator": {"taken": 0}, "wire_bytes_total": 0.0, "wall_seconds": 1000.0, **counters}
  loop = Loop(
    config(steps=2, save_every=1),
    recorder,
    tiny.Batches(),
    checkpoints=recorder,
    started=time.perf_counter() - 50,
  )
  result = loop.run(recorder.state, meta=meta)
  first, second, *_ = (m["wall_seconds"] for m in metas)
  assert 1050 < first < second < result.wall_seconds < 1100


# SIGTERM.


class Terminated:
  """Batches of which number `at` brings SIGTERM along."""

  def __init__(self, batches, at):
    self._batches, self._at = batches, at

  def __next__(self):
    batch = next(self._batches)
    if self._batches.taken == self._at:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch

  def __getattr__(self, name):
    return getattr(self._batches, name)


def test_sigterm_finishes_the_step_and_saves(tiny, step, folder):
  before = signal.getsignal(signal.SIGTERM)
  with Checkpoints(folder.checkpoints, step.layout) as checkpoints:
    loop = Loop(
      config(), step, Terminated(tiny.Batches(), 5), folder=folder, checkpoints=checkpoints
    )
    result = loop.run(step.init(jax.random.key(0)))
    assert (result.step, result.terminated) == (5, True)
    assert checkpoints.steps == [5]
    restored = checkpoints.restore()
  assert tree_digest(restored.state) == tree_digest(result.state)
  assert restored.meta["iterator"] == {"taken": 5}
  assert [r["step"] for r in read_metrics(folder.path)] == [1, 2, 3, 4, 5]
  assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_at_the_last_step_is_no_interruption(tiny, step, folder):
  loop = Loop(config(), step, Terminated(tiny.Batches(), 10))
  result = loop.run(step.init(jax.random.key(0)))
  assert (result.step, result.terminated) == (10, False)


@pytest.mark.parametrize("name", ["steps", "log_every", "eval_every", "save_every"])
def test_config_rejects_negative_numbers(name):
  with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got -1"):
    config(**{name: -1})
