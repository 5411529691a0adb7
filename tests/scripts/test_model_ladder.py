"""The model of a ladder's speed-up: its limits, and what it says of the published table."""

import dataclasses
import importlib.util
import pathlib
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "scripts" / "model_ladder.py"
SPEC = importlib.util.spec_from_file_location("model_ladder", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
model = importlib.util.module_from_spec(SPEC)
sys.modules["model_ladder"] = model  # where dataclasses look for their module
SPEC.loader.exec_module(model)


def rate(machine, residual, interference=0.0):
  return model.tokens_per_second(machine, residual, 4, "fast", interference)


def test_limits():
  free = model.Machine(fast_latency=0.0, fast_bandwidth=float("inf"))
  assert rate(free, "standard") == rate(free, "ladder") == rate(free, "none")
  machine = model.Machine()
  assert rate(machine, "standard") < rate(machine, "ladder", 0.2) < rate(machine, "ladder")
  assert rate(machine, "ladder") < rate(machine, "none")  # the last all-reduce is awaited
  # Where the link takes all of the time a ladder gains nothing: all-reduces wait for each other.
  slow = dataclasses.replace(machine, fast_bandwidth=1e4)
  assert rate(slow, "ladder") == pytest.approx(rate(slow, "standard"), rel=1e-3)


def test_a_block_slowed_by_interference_takes_longer_by_that_share_of_the_all_reduce():
  p = model.Pass(attention=4.0, feed_forward=8.0, all_reduce=2.0, head=0.0)
  assert model.exposed(p, "ladder", 0.25) == (2 * model.LAYERS - 1) * 0.5 + 2.0
  assert model.exposed(p, "standard", 0.25) == 2 * model.LAYERS * 2.0
  longer = dataclasses.replace(p, all_reduce=6.0)
  assert model.exposed(longer, "ladder", 0.0) == (model.LAYERS - 1) * 2.0 + 6.0


def test_one_set_of_constants_is_within_a_tenth_of_the_paper():
  machine, error = model.fit()
  assert error < 0.1
  for interference, least in ((0.0, 5), (model.INTERFERENCE, 8)):
    rows = model.table(machine, interference)
    near = [abs(speedup / published - 1) <= 0.1 for *_, speedup, published in rows]
    assert sum(near) >= least
    assert all(0 < share < 1 for _, _, share, _, _ in rows)
