"""TensorBoard and W&B: the same steps once, whatever was killed and resumed."""

import contextlib
import dataclasses
import importlib.util
import json
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from jaxcomm.training import RunConfig, launch
from jaxcomm.training._trackers import TensorBoard, Trackers, WandB

ROWS = [{"step": step, "loss": 9.0 - step, "wire_bytes": 10 * step} for step in range(7)]


def records(file):
  data = file.read_bytes()
  while data:  # length, its checksum, an event, its checksum
    (size,) = struct.unpack("<Q", data[:8])
    yield event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]


def scalars(path, name):
  """(step, value) that TensorBoard shows: a start voids earlier events from its step on."""
  points = []
  for file in sorted(path.glob("events.*")):
    for event in records(file):
      if event.session_log.status == event_pb2.SessionLog.START:
        points = [p for p in points if p[0] < event.step]
      points += [(event.step, v.simple_value) for v in event.summary.value if v.tag == name]
  return points


def write(path, rows, kept=(), first_step=0):
  tracker = TensorBoard(path, kept, first_step)
  for row in rows:
    tracker.log(row)
  return tracker


def test_tensorboard_has_all_numbers_at_once(tmp_path):
  tracker = write(tmp_path, ROWS)
  assert scalars(tmp_path, "loss") == [(r["step"], r["loss"]) for r in ROWS]  # before it is closed
  assert scalars(tmp_path, "wire_bytes") == [(r["step"], r["wire_bytes"]) for r in ROWS]
  tracker.close()


def test_tensorboard_shows_no_step_twice_after_a_kill(tmp_path):
  """Steps 0 to 5 were logged; the checkpoint is of step 3."""
  write(tmp_path, ROWS[:6])
  (file,) = tmp_path.iterdir()
  file.rename(file.with_name("events.out.tfevents.0000000001.host"))  # of an earlier second
  new = [{**row, "loss": 100.0 + row["step"]} for row in ROWS[4:]]
  write(tmp_path, new, kept=ROWS[:4], first_step=4).close()
  want = [(r["step"], r["loss"]) for r in [*ROWS[:4], *new]]
  assert scalars(tmp_path, "loss") == want


def test_tensorboard_of_a_run_that_began_without(tmp_path):
  write(tmp_path, ROWS[4:], kept=ROWS[:4], first_step=4).close()
  assert scalars(tmp_path, "loss") == [(r["step"], r["loss"]) for r in ROWS]


@pytest.fixture
def wandb(monkeypatch):
  """A package that takes notes; `module.has` is the number of steps that its server has got."""
  runs = []

  def init(**kwargs):
    run = types.SimpleNamespace(kwargs=kwargs, rows=[], summary={}, exit_code=None, step=module.has)
    run.log = lambda row, step: run.rows.append((step, row))
    run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
    runs.append(run)
    return run

  module = types.SimpleNamespace(init=init, Error=type("Error", (Exception,), {}), has=0)
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module, runs


@pytest.mark.parametrize("has", [6, 3, 0])
def test_wandb_goes_on_with_one_run_and_what_it_lacks(wandb, tmp_path, has):
  """Steps 0 to 5 were logged, the checkpoint is of step 3; W&B has got `has`, 0 offline."""
  module, runs = wandb
  with Trackers([WandB(tmp_path, "mine", {"lr": 1}, [])]) as trackers:
    for row in ROWS[:6]:
      trackers.log(row)
    trackers.summary = {"steps": 6}
  module.has = has
  trackers = Trackers([WandB(tmp_path, "mine", {"lr": 1}, ROWS[:4])])
  with contextlib.suppress(KeyError), trackers:
    for row in ROWS[4:]:
      trackers.log(row)
    raise KeyError
  first, second = runs
  assert first.kwargs["project"] == "mine"
  assert first.kwargs["config"] == {"lr": 1}
  kept = json.loads((tmp_path / "wandb.json").read_text())["id"]
  assert second.kwargs["id"] == first.kwargs["id"] == kept
  logged = first.rows[:has] + second.rows
  assert logged == [(r["step"], {k: r[k] for k in ("loss", "wire_bytes")}) for r in ROWS]
  assert (first.exit_code, first.summary) == (0, {"steps": 6})
  assert (second.exit_code, second.summary) == (1, {})


def test_wandb_that_cannot_start_leaves_no_trace(wandb, tmp_path):
  module, _ = wandb

  def init(**kwargs):
    raise module.Error("api_key not configured")

  module.init = init
  with pytest.raises(ValueError, match="`wandb` could not start the run: api_key not configured"):
    WandB(tmp_path, "mine", {}, [])
  assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Flags of a script."""


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--tensorboard"], '--tensorboard needs `tensorboardX`: pip install "jaxcomm[train]"'),
    (["--wandb", "mine"], '--wandb needs `wandb`: pip install "jaxcomm[wandb]"'),
  ],
)
def test_a_missing_package_is_one_line_before_anything_starts(argv, message, monkeypatch, capsys):
  find = importlib.util.find_spec
  missing = ("tensorboardX", "wandb")
  monkeypatch.setattr(
    "importlib.util.find_spec", lambda name, *a: None if name in missing else find(name, *a)
  )
  started = []
  with pytest.raises(SystemExit) as exit_info:
    launch(Config, started.append, [*argv, "--out", "x"])
  assert exit_info.value.code == 1
  assert capsys.readouterr().err == f"error: {message}\n"
  assert started == []


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"tensorboard": True}, "`tensorboard` needs `out`"),
    ({"wandb": "mine"}, "`wandb` needs `out`"),
    ({"wandb": "", "out": "x"}, "`wandb` must name a project, got ''"),
    ({"profile_steps": "1:3"}, "`profile_steps` needs `out`"),
  ],
)
def test_rejects(flags, message):
  with pytest.raises(ValueError, match=message):
    RunConfig(**flags)
