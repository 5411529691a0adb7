"""E3M0 against a search over all its values, and its constants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import e3m0

LEVELS = np.asarray([0.0, *2.0 ** np.arange(-6, 1)])


def numpy_nearest(x, block_size):
  """Indices, scales and decoded values by trying all levels; the later one wins ties."""
  index, scales = np.zeros(x.size, int), []
  for start in range(0, x.size, block_size):
    block = np.abs(x[start : start + block_size]).astype(np.float64)
    scales.append(block.max())
    distance = np.abs(block[:, None] - LEVELS * block.max())
    index[start : start + block_size] = 7 - np.argmin(distance[:, ::-1], axis=1)
  scales = np.asarray(scales, np.float32)
  decoded = np.sign(x) * LEVELS[index] * np.repeat(scales, block_size)[: x.size]
  return index, scales, decoded.astype(np.float32)


@pytest.mark.parametrize("size", [1, 15, 16, 33, 500])
def test_equals_a_search_over_all_levels(size, both):
  x = (np.random.default_rng(size).normal(size=size) * 3).astype(np.float32)
  index, scales, decoded = numpy_nearest(x, 16)
  payload, got = both(e3m0(16), x)
  codes = index + 8 * ((x < 0) & (index > 0))
  nibbles = np.pad(codes, (0, size % 2)).reshape(-1, 2)
  np.testing.assert_array_equal(payload["codes"], nibbles[:, 0] + 16 * nibbles[:, 1])
  np.testing.assert_array_equal(payload["scales"], scales)
  np.testing.assert_array_equal(got, decoded)


def test_ties_go_up(roundtrip):
  middles = (LEVELS[1:] + LEVELS[:-1]) / 2
  x = np.asarray([1.0, *middles], np.float32)
  np.testing.assert_array_equal(roundtrip(e3m0(), x)[1:], LEVELS[1:])
  np.testing.assert_array_equal(roundtrip(e3m0(), -x)[1:], -LEVELS[1:])
  for scale in (3.0, 12345.0):  # exact ties whose quotient by the scale is not exact
    y = x * np.float32(scale)
    np.testing.assert_array_equal(roundtrip(e3m0(), y)[1:], (LEVELS[1:] * scale).astype("f4"))
  below = np.nextafter(x, np.float32(0))
  below[0] = 1
  np.testing.assert_array_equal(roundtrip(e3m0(), below)[1:], LEVELS[:-1])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("factor", [1.0, 3.0, 1e-30, 1e30])
def test_exact_on_the_levels(factor, rounding, roundtrip):
  x = np.asarray([*LEVELS, *-LEVELS], np.float32) * np.float32(factor)
  np.testing.assert_array_equal(roundtrip(e3m0(rounding=rounding), x), x)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-30, 30), power=st.sampled_from([1, 5]))
def test_error_sign_and_order(seed, exponent, power, roundtrip):
  x = np.random.default_rng(seed).normal(size=64) ** power * 10.0**exponent
  x = np.sort(x.astype(np.float32))
  got = roundtrip(e3m0(64), x)
  scale = np.abs(x).max()
  large = np.abs(x) >= 2.0**-6 * scale
  error = np.abs(got.astype(np.float64) - x)
  assert np.all(error[large] <= np.abs(x[large]) / 3 * (1 + 1e-6))
  assert np.all(error[~large] <= 2.0**-7 * scale * (1 + 1e-6))
  assert np.all(got * np.sign(x) >= 0)
  assert np.all(np.diff(got) >= 0)
  assert np.abs(got).max() == scale


@pytest.mark.parametrize("block_size", [8, 256, 4096])
def test_alpha_is_reached_on_the_worst_block(block_size, roundtrip):
  worst = 0.0
  for rest in (0.75, 2.0**-7):
    x = np.full(block_size, rest, np.float32)
    x[0] = 1
    error = roundtrip(e3m0(block_size), x).astype(np.float64) - x
    worst = max(worst, (error**2).sum() / (x.astype(np.float64) ** 2).sum())
  assert worst == pytest.approx(1 - e3m0(block_size).alpha, rel=1e-6)


@pytest.mark.parametrize("block_size", [8, 256, 4096])
def test_omega_is_the_supremum_of_the_exact_ratio(block_size):
  x = np.linspace(0, 1, 2_000_001)[1:]
  low = np.searchsorted(LEVELS, x, side="right") - 1
  variance = (LEVELS[np.minimum(low + 1, 7)] - x) * (x - LEVELS[low])
  n = block_size - 1
  ratio = (n * variance / (1 + n * x**2)).max()
  assert ratio == pytest.approx(e3m0(block_size, "stochastic").omega, rel=1e-6)


def test_constants_by_class():
  assert e3m0().omega is None
  stochastic = e3m0(rounding="stochastic")
  assert stochastic.alpha == 1 - stochastic.omega
  assert 8 / 9 < e3m0().alpha < 1


def test_magnitudes_at_the_ends_of_float32(roundtrip):
  x = np.asarray([1.0, -0.5, 0.25, 2.0**-6], np.float32)
  for factor in (2.0**-119, 2.0**127):
    np.testing.assert_array_equal(roundtrip(e3m0(), x * factor), x * np.float32(factor))
  assert not np.any(roundtrip(e3m0(), np.asarray([1.4e-36, -1e-37], np.float32)))
