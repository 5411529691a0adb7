"""Block integers: an independent numpy quantizer, the card's error table, and the constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import BlockInt, int4, int8


def numpy_quantize(x, bits, block_size):
  """(codes, scales, decoded) of a flat float32 array, element by element as the text says."""
  qmax = 2 ** (bits - 1) - 1
  codes, scales = np.zeros(x.size, np.int8), []
  for start in range(0, x.size, block_size):
    block = x[start : start + block_size]
    mantissa, exponent = np.frexp(np.abs(block).max() / np.float64(qmax))
    scale = np.float32(np.ldexp(np.ceil(mantissa * 2**17) / 2**17, exponent))
    scales.append(scale)
    if scale > 0:
      codes[start : start + block_size] = np.round(block * (np.float32(1) / scale))
  scales = np.asarray(scales, np.float32)
  decoded = codes.astype(np.float32) * np.repeat(scales, block_size)[: x.size]
  return codes, scales, decoded


@pytest.mark.parametrize(
  ("bits", "size"), [(b, 33) for b in range(2, 9)] + [(b, n) for b in (4, 8) for n in (15, 500)]
)
def test_equals_numpy_bit_for_bit(bits, size, both):
  x = (np.random.default_rng(size).normal(size=size) * 3).astype(np.float32)
  codes, scales, decoded = numpy_quantize(x, bits, 16)
  payload, got = both(BlockInt(bits, 16), x)
  np.testing.assert_array_equal(got, decoded)
  np.testing.assert_array_equal(payload["scales"], scales)
  if bits == 4:
    nibbles = np.pad(codes.astype(np.uint8) & 0xF, (0, size % 2)).reshape(-1, 2)
    codes = nibbles[:, 0] + 16 * nibbles[:, 1]
  if bits in (4, 8):
    np.testing.assert_array_equal(payload["codes"], codes)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("factor", [1.0, 3.0, 2.0**-90, 2.0**90, 1000.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_exact_on_the_grid(bits, factor, rounding, roundtrip):
  compressor = BlockInt(bits, 16, rounding)
  codes = np.random.default_rng(0).integers(-compressor.qmax, compressor.qmax + 1, (5, 16))
  codes[:, 3] = compressor.qmax * np.asarray([1, -1, 1, -1, 1])
  x = (codes * factor).astype(np.float32)
  np.testing.assert_array_equal(roundtrip(compressor, x), x)


@pytest.mark.parametrize(
  ("make", "block_size", "nearest", "stochastic"),
  [
    (int8, 256, 4.8e-5, 9.7e-5),
    (int4, 128, 1.4e-2, 2.8e-2),
    *(
      pytest.param(*row, marks=pytest.mark.slow)
      for row in (
        (int8, 2048, 6.8e-5, 1.4e-4),
        (int4, 32, 9.4e-3, 1.9e-2),
        (int4, 2048, 2.2e-2, 4.5e-2),
      )
    ),
  ],
)
def test_relative_error_on_gaussian_data(make, block_size, nearest, stochastic, roundtrip):
  x = np.random.default_rng(1).normal(size=2**18).astype(np.float32)
  power = (x.astype(np.float64) ** 2).sum()
  for rounding, want in (("nearest", nearest), ("stochastic", stochastic)):
    error = roundtrip(make(block_size, rounding), x).astype(np.float64) - x
    # The table has two digits: half a unit of the second is up to 4 %.
    assert (error**2).sum() / power == pytest.approx(want, rel=0.04)


@pytest.mark.parametrize("block_size", [8, 16, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_alpha_holds_on_the_worst_block_and_is_tight(bits, block_size, roundtrip):
  compressor = BlockInt(bits, block_size)
  x = np.full(block_size, 0.5 - 1e-4, np.float32)
  x[0] = compressor.qmax
  error = roundtrip(compressor, x).astype(np.float64) - x
  ratio = (error**2).sum() / (x.astype(np.float64) ** 2).sum()
  assert ratio <= 1 - compressor.alpha
  assert ratio >= (1 - compressor.alpha) * (1 - 1 / block_size) * 0.995


@pytest.mark.parametrize("block_size", [8, 16, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_omega_holds_on_the_worst_block_and_is_tight(bits, block_size):
  compressor = BlockInt(bits, block_size, "stochastic")
  qmax, omega = compressor.qmax, compressor.omega
  # Exact ratio of variance to power with one element at qmax and the others at f, in steps of s.
  f = np.linspace(0, 1, 100001)
  ratio = ((block_size - 1) * f * (1 - f)) / (qmax**2 + (block_size - 1) * f**2)
  assert ratio.max() <= omega
  assert ratio.max() >= omega * (1 - 1 / block_size) * 0.999
  assert omega <= block_size / (4 * qmax**2) * (1 + 2**-15)  # the usual bound
  for seed in range(20):  # and no random block is worse
    x = np.random.default_rng(seed).exponential(size=block_size) ** 3
    steps = x / x.max() * qmax
    fraction = steps - np.floor(steps)
    assert (fraction * (1 - fraction)).sum() <= omega * (steps**2).sum()


def test_constants_by_class():
  assert int8().omega is None
  assert int8().alpha == pytest.approx(1 / (1 + 256 / (4 * 127**2)), rel=1e-4)
  stochastic = int8(rounding="stochastic")
  assert stochastic.omega == pytest.approx(256 / (4 * 127**2), rel=0.01)
  assert stochastic.alpha == 1 - stochastic.omega
  assert int4(2048, "stochastic").omega > 1
  assert int4(2048, "stochastic").alpha is None


def test_magnitudes_at_the_ends_of_float32(roundtrip):
  x = np.asarray([1.0, -0.5, 0.25, 0.1], np.float32)
  for factor in (1e-30, 1e-35, 1e30, 3.4e38):
    got = roundtrip(int8(), x * np.float32(factor)) / np.float32(factor)
    np.testing.assert_allclose(got, x, atol=1 / 127 / 2 * 1.001)
  # Below, the scale is not a normal number: zeros, as documented, and never NaN.
  assert not np.any(roundtrip(int8(), x * np.float32(1.4e-36)))
  assert not np.any(roundtrip(int4(), x * np.float32(8e-38)))
  assert np.any(roundtrip(int8(), x * np.float32(1.6e-36)))


def test_stochastic_codes_never_leave_the_range(both):
  """Blocks of equal elements, whose ratio is within 2^-16 of qmax or equal to it."""
  x = np.random.default_rng(0).uniform(1, 2, (512, 1)).astype(np.float32)
  x = x * np.where(np.arange(16) % 2, 1, -1).astype(np.float32)
  for bits, qmax in ((8, 127), (4, 7)):
    compressor = BlockInt(bits, 16, "stochastic")
    payload, got = both(compressor, x)
    got = got.reshape(512, 16) / payload["scales"][:, None]
    np.testing.assert_array_equal(np.sign(got), np.sign(x))
    assert set(np.abs(got).reshape(-1)) <= {qmax, qmax - 1}
    assert (np.abs(got) == qmax).mean() > 0.99


@pytest.mark.parametrize("bits", [1, 9, 16, "8", True, None])
def test_rejects_bits(bits):
  with pytest.raises(ValueError, match=r"`bits` must be in 2\.\.8, got"):
    BlockInt(bits)


def test_scalar_is_a_block_of_one():
  payload = jax.jit(int8().compress)(None, jnp.asarray(-127.0))
  assert payload["codes"].tolist() == [-127]
  assert payload["scales"].tolist() == [1.0]
