"""Tables of schedules: complete, in order, and as long as their formulas say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import bubble_fraction, peak_activations, schedule_table
from parallel.schedule import live_inputs

stages = st.integers(1, 9)
microbatches = st.integers(1, 25)
schedules = st.sampled_from(["gpipe", "1f1b", "zb"])
LENGTH = {
  "gpipe": lambda S, M: 2 * (M + S - 1),
  "1f1b": lambda S, M: M + 2 * (S - 1),
  "zb": lambda S, M: M + 2 * (S - 1),
}


@settings(max_examples=150, deadline=None)
@given(stages, microbatches, schedules)
def test_every_pass_once_and_after_what_it_needs(S, M, schedule):
  table = schedule_table(S, M, schedule)
  assert table.shape == (LENGTH[schedule](S, M), S, 3 if schedule == "zb" else 2)
  tick = np.full((table.shape[2], S, M), -1)
  for t, s, kind in np.argwhere(table >= 0):
    assert tick[kind, s, table[t, s, kind]] == -1
    tick[kind, s, table[t, s, kind]] = t
  assert (tick >= 0).all()
  forward, backward = tick[:2]
  # A message arrives with the next tick; the last stage may turn round at once.
  assert (np.diff(forward, axis=0) >= 1).all()
  assert (np.diff(backward, axis=0) <= -1).all()
  assert (backward >= forward).all()
  assert (tick[-1] >= backward).all()


@settings(max_examples=100, deadline=None)
@given(stages, microbatches)
def test_inputs_held(S, M):
  assert peak_activations(S, M, "gpipe") == M
  assert peak_activations(S, M, "zb") == min(M, 2 * S - 1)
  held = live_inputs(schedule_table(S, M, "1f1b")).max(0)
  np.testing.assert_array_equal(held, [min(M, 2 * (S - 1 - s) + 1) for s in range(S)])


@settings(max_examples=100, deadline=None)
@given(stages, microbatches)
def test_bubbles(S, M):
  want = (S - 1) / (M + S - 1)
  assert bubble_fraction(S, M, "gpipe") == pytest.approx(want)
  assert bubble_fraction(S, M, "1f1b") == pytest.approx(want)
  table = schedule_table(S, M, "1f1b")
  slots = 1 - M * S / (table.shape[0] * S)  # if every tick had room for both passes
  assert slots == pytest.approx(2 * (S - 1) / (M + 2 * (S - 1)))
  if M >= S - 1:
    zero_bubble = 3 * (S - 1) / (4 * M + 3 * (S - 1))
    assert bubble_fraction(S, M, "zb") == pytest.approx(zero_bubble)


def test_four_stages_of_six_microbatches():
  table = schedule_table(4, 6, "1f1b")
  assert len(table) == 12
  np.testing.assert_array_equal(table[3:9, 3], np.repeat(np.arange(6)[:, None], 2, 1))
  np.testing.assert_array_equal(table[:6, 0, 0], np.arange(6))
  np.testing.assert_array_equal(table[6:, 0, 1], np.arange(6))


def test_rejects():
  with pytest.raises(ValueError, match="`num_stages` must be at least 1, got 0"):
    schedule_table(0, 1, "gpipe")
  with pytest.raises(ValueError, match="`num_microbatches` must be at least 1, got -1"):
    bubble_fraction(1, -1, "1f1b")
  with pytest.raises(ValueError, match=r"`schedule` must be one of .*, got 'dualpipe'"):
    peak_activations(1, 1, "dualpipe")  # type: ignore[arg-type]
