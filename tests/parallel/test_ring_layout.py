"""Layouts as permutations, and how evenly they spread the work of a causal mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel import causal_balance, causal_work, context_permutation, shard_tokens

LAYOUTS = st.tuples(
  st.sampled_from(
    [("contiguous", 1), ("zigzag", 1), ("striped", 1), ("striped", 2), ("striped", 3)]
  ),
  st.integers(1, 9),
  st.integers(1, 4),
).map(lambda t: (*t[0], t[1], t[1] * t[2] * 2 * t[0][1]))  # layout, granularity, W, N


@given(LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_a_layout_is_a_permutation_and_its_parts_are_the_shards(case):
  layout, granularity, num_shards, seq_len = case
  order, inverse = context_permutation(seq_len, num_shards, layout, granularity)
  np.testing.assert_array_equal(np.sort(order), np.arange(seq_len))
  np.testing.assert_array_equal(order[inverse], np.arange(seq_len))
  for r, part in enumerate(order.reshape(num_shards, -1)):
    own = shard_tokens(r, num_shards, seq_len // num_shards, layout, granularity)
    np.testing.assert_array_equal(own, part)
    assert (np.diff(part) > 0).all()  # each device has its tokens in the order of the sequence


def test_where_tokens_go():
  """By their definitions: chunks r and 2W - 1 - r; token t on device (t // g) mod W."""
  owners = {name: np.empty(24, int) for name in ("zigzag", "striped")}
  for name, granularity in (("zigzag", 1), ("striped", 2)):
    order, _ = context_permutation(24, 3, name, granularity)
    owners[name][order] = np.repeat(np.arange(3), 8)
  np.testing.assert_array_equal(owners["zigzag"], np.repeat([0, 1, 2, 2, 1, 0], 4))
  np.testing.assert_array_equal(owners["striped"], np.arange(24) // 2 % 3)


@given(LAYOUTS)
@settings(max_examples=60, deadline=None)
def test_work_is_counted_pair_by_pair_and_its_balance_is_the_closed_form(case):
  layout, granularity, num_shards, seq_len = case
  work = causal_work(seq_len, num_shards, layout, granularity)
  assert work.sum() == seq_len * (seq_len + 1) // 2
  shards = context_permutation(seq_len, num_shards, layout, granularity)[0].reshape(num_shards, -1)
  r, step = num_shards - 1, num_shards // 2
  pairs = shards[r][:, None] >= shards[r - step][None]
  assert work[step, r] == pairs.sum()
  balance = work.max(axis=1).sum() / (work.sum() / num_shards)
  assert causal_balance(seq_len, num_shards, layout, granularity) == pytest.approx(
    balance, rel=1e-12
  )


def test_published_balance():
  """W = 8 and 128 tokens per device."""
  got = [causal_balance(1024, 8, name) for name in ("contiguous", "striped", "zigzag")]
  assert got == pytest.approx([1.8741, 8 * 129 / 1025, 1.0], abs=5e-5)


@pytest.mark.parametrize(
  ("args", "message"),
  [
    ((10, 4, "contiguous"), "`seq_len` must be a positive multiple of 4 .* got 10"),
    ((12, 4, "zigzag"), "`seq_len` must be a positive multiple of 8 .* got 12"),
    ((8, 4, "striped", 3), "`seq_len` must be a positive multiple of 12 .* got 8"),
    ((0, 4, "contiguous"), "got 0"),
    ((8, 4, "spiral"), "`layout` must be one of .* got 'spiral'"),
    ((8, 4, "zigzag", 2), "`granularity` must be .* got 2 with 'zigzag'"),
    ((8, 0, "zigzag"), "`num_shards` must be at least 1, got 0"),
  ],
)
def test_rejects_what_it_cannot_deal_out(args, message):
  with pytest.raises(ValueError, match=message):
    context_permutation(*args)
