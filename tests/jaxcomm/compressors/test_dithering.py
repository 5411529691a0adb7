"""QSGD, natural compression and 8-bit floats: grids, constants, and the card's simulations."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxcomm.compressors import BlockInt, fp8, natural, qsgd, scaled_sign


def test_qsgd_with_the_maximum_norm_is_a_block_integer(both, normal):
  x = normal(300)
  for bits in (2, 4, 8):
    integers = BlockInt(bits, 128, "stochastic")
    payload, got = both(integers, x)
    other, same = both(qsgd(integers.qmax, 128, "linf"), x)
    np.testing.assert_array_equal(same, got)
    np.testing.assert_array_equal(other["codes"], payload["codes"])
    assert qsgd(integers.qmax, 128, "linf").omega == integers.omega


def test_qsgd_is_exact_on_its_grid(roundtrip):
  x = np.zeros(16, np.float32)
  x[[1, 3, 8, 15]] = [1, -2, 4, 10]  # norm 11
  for factor in (1.0, 3.0, 2.0**-90, 2.0**90):
    np.testing.assert_array_equal(roundtrip(qsgd(11, 16), x * np.float32(factor)), x * factor)


@pytest.mark.parametrize(("levels", "want"), [(16, 0.67), (64, 0.042)])
def test_qsgd_variance_on_gaussian_data(levels, want, normal, relative_variance):
  compressor = qsgd(levels, 1024)
  got = relative_variance(compressor, normal(1024 * 64))
  assert got == pytest.approx(want, rel=0.02)
  assert got < compressor.omega < min(1024 / levels**2, 1024**0.5 / levels) * (1 + 2**-15)


@pytest.mark.parametrize("levels", [1, 16])
def test_qsgd_omega_holds_where_the_variance_is_largest(levels, relative_variance):
  """Equal elements at a fraction of one level; and one large, the others in the middle."""
  compressor = qsgd(levels, 64)
  for x in (np.ones(64), np.r_[np.ones(13), np.zeros(51)], np.r_[8.0, np.full(63, 0.5)]):
    assert relative_variance(compressor, x.astype(np.float32)) <= compressor.omega


def test_qsgd_omega_is_nearly_reached(relative_variance):
  # sqrt(B) / s - 1 for equal elements below one level.
  assert relative_variance(qsgd(1, 1024), np.ones(1024, np.float32)) == pytest.approx(31, rel=1e-3)
  assert qsgd(1, 1024).omega == pytest.approx(32, rel=1e-3)


def test_natural_keeps_powers_of_two_and_is_worst_at_four_thirds(
  roundtrip, normal, relative_variance
):
  x = np.ldexp(np.tile([1.0, -1.0], 127), np.arange(-126, 128)).astype(np.float32)
  np.testing.assert_array_equal(roundtrip(natural(), x), x)
  assert relative_variance(natural(), np.full(8, 4 / 3, np.float32)) == pytest.approx(1 / 8)
  # The integral of (|x| - p) (2 p - |x|) over the normal distribution.
  assert relative_variance(natural(), normal(2**16)) == pytest.approx(0.08172, rel=0.01)


def test_natural_sends_subnormal_numbers_as_zero(roundtrip):
  x = np.asarray([1e-39, -1e-45, 1.1754944e-38], np.float32)
  got = roundtrip(natural(), x)
  np.testing.assert_array_equal(got, [0, 0, x[2]])


def test_scaled_sign_error_is_exact(normal, relative_variance):
  for seed in range(5):
    x = normal(33, seed) ** 3
    wide = x.astype(np.float64)
    l1, l2 = np.abs(wide).sum(), np.sqrt(np.square(wide).sum())
    assert relative_variance(scaled_sign(), x) == pytest.approx(1 - (l1 / l2) ** 2 / 33, rel=1e-4)
    want = 2 * (1 - l1 / (np.sqrt(33) * l2))
    assert relative_variance(scaled_sign("rms"), x) == pytest.approx(want, rel=1e-4)
  x = normal(2**16)
  assert 1 - relative_variance(scaled_sign(), x) == pytest.approx(2 / np.pi, abs=0.005)
  assert relative_variance(scaled_sign("rms"), x) == pytest.approx(0.411, abs=0.01)


@pytest.mark.parametrize("size", [5, 8, 1000])
def test_rms_sign_may_err_by_more_than_the_input(size, relative_variance):
  x = np.zeros(size, np.float32)
  x[2] = -3
  rms = relative_variance(scaled_sign("rms"), x)
  assert rms == pytest.approx(2 * (1 - size**-0.5), rel=1e-5)
  assert rms > 1
  assert scaled_sign("rms").alpha_at(size) is None
  assert "no alpha" in scaled_sign.__globals__["ScaledSign"].__doc__
  assert relative_variance(scaled_sign(), x) == pytest.approx(1 - scaled_sign().alpha_at(size))


FORMATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.mark.parametrize("format", FORMATS)
def test_fp8_keeps_every_finite_float8(format, both):
  values = np.arange(256, dtype=np.uint8).view(FORMATS[format]).astype(np.float32)
  values = values[np.isfinite(values)]
  for factor in (1.0, 2.0**-90, 2.0**90):
    x = values * np.float32(factor)
    payload, got = both(fp8(format), x)
    np.testing.assert_array_equal(got, x)
    bits = np.where(values == 0, 0, values.astype(FORMATS[format]).view(np.uint8))
    np.testing.assert_array_equal(payload["codes"], bits)
    assert payload["scales"].tolist() == [factor]


@pytest.mark.parametrize("format", FORMATS)
def test_fp8_rounds_as_the_dtype_does(format, roundtrip):
  largest = float(ml_dtypes.finfo(FORMATS[format]).max)
  x = np.random.default_rng(0).normal(size=512) ** 5
  x = (x / np.abs(x).max() * largest).astype(np.float32)
  grid = np.sort(x.astype(FORMATS[format]).astype(np.float32))
  x[:511] = (grid[1:] + grid[:-1]) / 2  # ties, and other numbers
  x[511] = largest
  want = x.astype(FORMATS[format]).astype(np.float32)
  np.testing.assert_array_equal(roundtrip(fp8(format, 512), x), want)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", [8, 4096])
def test_fp8_constants_hold_at_their_worst(format, block_size, relative_variance):
  mantissa = fp8(format).omega is None and {"e4m3": 3, "e5m2": 2}[format]
  near, stochastic = fp8(format, block_size), fp8(format, block_size, "stochastic")
  half = 2.0 ** -(mantissa + 1)
  x = np.full(block_size, 1 + half, np.float32)  # a tie right above a power of two
  lost = relative_variance(near, x)
  assert (1 - near.alpha) * 0.99 <= lost <= (1 - near.alpha) * (1 + 1e-6)
  a, b = 1.0, 1 + 2 * half
  x = np.full(block_size, 2 * a * b / (a + b), np.float32)
  lost = relative_variance(stochastic, x)
  assert stochastic.omega * 0.99 <= lost <= stochastic.omega * (1 + 1e-6)
  # The smallest numbers of the block, where the spacing no longer shrinks.
  x = np.full(block_size, 2.0 ** {"e4m3": -17, "e5m2": -31}[format] * 0.7, np.float32)
  x[0] = 1
  assert relative_variance(near, x) <= 1 - near.alpha
  assert relative_variance(stochastic, x) <= stochastic.omega


@pytest.mark.parametrize("bad", [0, 128, 2.0, True])
def test_qsgd_rejects_levels(bad):
  with pytest.raises(ValueError, match=r"`levels` must be in 1\.\.127, got"):
    qsgd(bad)


def test_rejects_other_fields():
  with pytest.raises(ValueError, match="`bucket_size` must be an integer of at least 8, got 4"):
    qsgd(4, 4)
  with pytest.raises(ValueError, match="`norm` must be 'l2' or 'linf', got 'l1'"):
    qsgd(4, norm="l1")
  with pytest.raises(ValueError, match="`scale` must be 'l1' or 'rms', got 'l2'"):
    scaled_sign("l2")
  with pytest.raises(ValueError, match="`format` must be 'e4m3' or 'e5m2', got 'e3m4'"):
    fp8("e3m4")


def test_bfloat16_goes_in_as_it_is(roundtrip, normal):
  x = jnp.asarray(normal(64), jnp.bfloat16)
  np.testing.assert_array_equal(roundtrip(fp8(), x), roundtrip(fp8(), x.astype(jnp.float32)))
