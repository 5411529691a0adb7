"""The closed formulas, against a count of the messages of a simulated ring."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm import inspect

FORMULAS = (
  inspect.all_gather_bytes,
  inspect.all_reduce_bytes,
  inspect.all_to_all_bytes,
  inspect.collective_permute_bytes,
  inspect.reduce_scatter_bytes,
)


def ring_all_reduce(values_GN):
  """Sums over devices by a ring; returns the result per device and the elements device 0 sent."""
  group = len(values_GN)
  blocks = [np.array_split(v.copy(), group) for v in values_GN]
  sent = 0
  for phase in range(2):  # reduce-scatter, then all-gather
    for hop in range(group - 1):
      # Device d sends block d - hop (then d + 1 - hop, the one it has finished) to d + 1.
      moves = [(d, (d + 1) % group, (d + phase - hop) % group) for d in range(group)]
      messages = [blocks[source][block].copy() for source, _, block in moves]
      for (source, target, block), message in zip(moves, messages):
        blocks[target][block] = message + (blocks[target][block] if phase == 0 else 0)
        sent += message.size if source == 0 else 0
  return [np.concatenate(b) for b in blocks], sent


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 5))
def test_ring_all_reduce_sends_the_formula(group, block):
  values = np.random.default_rng(group).normal(size=(group, group * block))
  results, sent = ring_all_reduce(values)
  for result in results:
    np.testing.assert_allclose(result, values.sum(0), rtol=1e-12, atol=1e-12)
  assert 8 * sent == pytest.approx(inspect.all_reduce_bytes(values[0].nbytes, group), rel=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 1024), st.integers(0, 2**40))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(group, num_bytes):
  parts = inspect.reduce_scatter_bytes(num_bytes, group) + inspect.all_gather_bytes(
    num_bytes, group
  )
  assert inspect.all_reduce_bytes(num_bytes, group) == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize("formula", FORMULAS)
def test_one_device_sends_nothing(formula):
  assert formula(4096, 1) == 0


@pytest.mark.parametrize("formula", FORMULAS)
def test_rejects_bad_input(formula):
  with pytest.raises(ValueError, match="`num_bytes` must not be negative, got -1"):
    formula(-1, 2)
  with pytest.raises(ValueError, match="`group_size` must be at least 1, got 0"):
    formula(1, 0)
