"""The checks that both compressed means must pass, and what each of them computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import (
  allgather_pmean,
  allgather_pmean_with_error,
  compressed_pmean,
  compressed_pmean_with_error,
)
from jaxcomm.compressors import e3m0, identity, int4, int8

AXIS = "replica"
KEY = jax.random.key(5)
MEANS = {"two_hop": compressed_pmean, "one_hop": allgather_pmean}
WITH_ERROR = {"two_hop": compressed_pmean_with_error, "one_hop": allgather_pmean_with_error}
COMPRESSORS = [int8(16), int4(16), e3m0(16), int4(16, "stochastic"), identity()]


SLOW = pytest.mark.slow
# Where one way of running tells most of what all three do.
CHECKED_FIRST = ["checked", *(pytest.param(mode, marks=SLOW) for mode in ("unchecked", "vmap"))]


@pytest.fixture(params=["two_hop", "one_hop"])
def hops(request):
  return request.param


def reference(hops, compressor, x, coded):
  """(mean, errors) by loops over devices and chunks, for compressors that draw nothing."""
  n, shape = x.shape[0], x.shape[1:]
  flat = np.asarray(x, np.float32).reshape(n, -1)
  inverse = np.float32(1 / n)
  if hops == "one_hop":
    sent = [coded(compressor, row) for row in flat]
    mean = sum(sent[1:], sent[0]) * inverse
    return mean.reshape(shape), (flat - np.stack(sent)).reshape(x.shape)
  chunk = -(-flat.shape[1] // n)
  padded = np.pad(flat, ((0, 0), (0, n * chunk - flat.shape[1]))).reshape(n, n, chunk)
  mean, error = [], np.zeros_like(padded)
  for owner in range(n):
    sent = [coded(compressor, padded[rank, owner]) for rank in range(n)]
    exact = sum(sent[1:], sent[0]) * inverse
    mean.append(coded(compressor, exact))
    for rank in range(n):
      error[rank, owner] = padded[rank, owner] - sent[rank]
    error[owner, owner] += n * (exact - mean[-1])
  cut = flat.shape[1]
  error = error.reshape(n, -1)[:, :cut].reshape(x.shape)
  return np.concatenate(mean)[:cut].reshape(shape), error


@pytest.mark.parametrize(
  ("compressor", "n", "shape"),
  [
    (int8(16), 4, (33, 5)),
    *(
      pytest.param(compressor, *s, marks=SLOW)
      for compressor in (int8(16), e3m0(16))
      for s in ((2, (7,)), (4, ()), (8, (33, 5)))
    ),
  ],
)
def test_equals_the_reference_bit_for_bit(
  hops, compressor, shape, n, on_devices, stacked, coded, bits_of
):
  x = stacked(n, shape)
  fn = on_devices(lambda v: WITH_ERROR[hops](v, AXIS, compressor), "unchecked", n)
  mean, error = fn(x)
  want = reference(hops, compressor, x, coded)
  np.testing.assert_array_equal(bits_of(mean), bits_of(np.stack([want[0]] * n)))
  np.testing.assert_array_equal(error, want[1])


@pytest.mark.parametrize(
  ("n", "compressors"),
  [
    (3, COMPRESSORS[:1]),
    (8, COMPRESSORS[1:3]),
    (3, COMPRESSORS[3:4]),
  ],
  ids=["3-int8", "8-more", "3-stochastic"],
)
@SLOW
def test_devices_and_modes_agree_bit_for_bit(hops, compressors, n, on_devices, stacked, bits_of):
  x = stacked(n, (33, 5))

  def run(mode, fn):
    return on_devices(lambda v: [fn(v, AXIS, c, key=KEY) for c in compressors], mode, n)(x)

  got = run("unchecked", WITH_ERROR[hops])
  for mean, _ in got:
    np.testing.assert_array_equal(bits_of(mean), bits_of(np.stack([mean[0]] * n)))
  for mode in ("checked", "vmap"):
    for (mean, error), (other_mean, other_error) in zip(got, run(mode, WITH_ERROR[hops])):
      np.testing.assert_array_equal(bits_of(other_mean), bits_of(mean))
      if n == 3:  # the mean is rounded with or without its subtraction, as documented
        np.testing.assert_allclose(other_error, error, atol=1e-6)
      else:
        np.testing.assert_array_equal(other_error, error)
  # The function without errors takes the same mean.
  for (mean, _), plain in zip(got, run("vmap", MEANS[hops])):
    np.testing.assert_array_equal(bits_of(plain), bits_of(mean))


@pytest.mark.parametrize(
  ("shape", "dtype"), [((3, 0), "float16"), ((), "bfloat16"), ((2, 3, 5), "bfloat16")], ids=str
)
def test_shape_and_dtype_stay(hops, shape, dtype, on_devices):
  x = jax.ShapeDtypeStruct((4, *shape), dtype)

  def local(v):
    return MEANS[hops](v, AXIS, int8()), WITH_ERROR[hops](v, AXIS, int8())

  got, pair = jax.eval_shape(on_devices(local, "checked", 4), x)
  assert (got.shape, got.dtype) == (x.shape, x.dtype)
  assert [(a.shape, a.dtype) for a in pair] == [(x.shape, jnp.float32)] * 2


@SLOW
def test_low_precision_is_averaged_in_float32(hops, on_devices, stacked):
  def local(v):
    return MEANS[hops](v, AXIS, int8()), MEANS[hops](v.astype(jnp.float32), AXIS, int8())

  narrow, wide = on_devices(local, "vmap", 4)(stacked(4, (2, 3, 5), dtype="bfloat16"))
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("mode", CHECKED_FIRST)
def test_no_elements(hops, mode, on_devices):
  got = on_devices(lambda v: MEANS[hops](v, AXIS, int8()), mode, 4)(jnp.zeros((4, 3, 0)))
  assert got.shape == (4, 3, 0)


def test_result_is_typed_as_equal(hops, on_devices):
  x = jax.ShapeDtypeStruct((4, 9), "float32")
  mean = on_devices(lambda v: MEANS[hops](v, AXIS, int4()), "checked", 4, equal=True)
  assert jax.eval_shape(mean, x).shape == (9,)
  error = on_devices(lambda v: WITH_ERROR[hops](v, AXIS, int4())[1], "checked", 4, equal=True)
  with pytest.raises(ValueError, match="out_specs"):  # the error is typed as differing
    jax.eval_shape(error, x)


@pytest.mark.parametrize(
  "mode", ["vmap", *(pytest.param(mode, marks=SLOW) for mode in ("checked", "unchecked"))]
)
def test_mean_of_equal_values_is_allowed(hops, mode, on_devices):
  """The operand may be typed as equal (shard_map), or carry no batch axis (vmap)."""
  constant = jnp.arange(-127.0, 1.0)

  def local(x):
    del x
    return MEANS[hops](constant, AXIS, int8())

  got = on_devices(local, mode, 4)(jnp.zeros((4, 1)))
  np.testing.assert_allclose(got, np.stack([constant] * 4), atol=0.5)


@SLOW
@pytest.mark.parametrize("n", [2, 4, 8])
def test_exact_on_the_grid(hops, n, on_devices):
  """Integers with a full-scale element in every block of every contribution and of the mean."""
  rng = np.random.default_rng(0)
  shared = rng.integers(-100, 101, (1, n, 2, 16))
  even = rng.integers(-1, 2, (n // 2, n, 2, 16)) * 8
  x = np.concatenate([shared + even, shared - even])  # the mean is `shared`
  x[..., 5] = 127
  x = x.reshape(n, -1).astype(np.float32)
  got = on_devices(lambda v: MEANS[hops](v, AXIS, int8(16)), "vmap", n)(x)
  np.testing.assert_array_equal(got, np.stack([x.mean(0)] * n))


@pytest.mark.parametrize(
  ("n", "size"), [(8, 100), *(pytest.param(*s, marks=SLOW) for s in ((3, 1), (3, 7), (8, 2)))]
)
@SLOW
def test_error_per_element_is_bounded(hops, size, n, on_devices, stacked):
  x = np.asarray(stacked(n, (size,))) * np.geomspace(1e-3, 1e3, size, dtype=np.float32)
  got = on_devices(lambda v: MEANS[hops](v, AXIS, int8(16)), "unchecked", n)(x)[0]
  # Half a step of the largest block for each rounding; the mean of steps bounds the first hop.
  step = np.abs(x).max(1) / 127 * (1 + 2**-15)
  bound = step.mean() / 2 + (hops == "two_hop") * step.max() / 2
  assert np.abs(np.asarray(got, np.float64) - x.astype(np.float64).mean(0)).max() <= bound


@pytest.mark.parametrize(
  ("n", "compressors"),
  [(3, (int4(16), identity())), pytest.param(8, COMPRESSORS, marks=SLOW)],
  ids=["3", "8"],
)
def test_errors_account_for_everything_lost(hops, compressors, n, on_devices, stacked):
  x = stacked(n, (33, 5))

  def local(v):
    return [WITH_ERROR[hops](v, AXIS, compressor, key=KEY) for compressor in compressors]

  exact = np.asarray(x, np.float64).mean(0)
  results = on_devices(local, "vmap", n)(x)
  for compressor, (mean, error) in zip(compressors, results, strict=True):
    mean, error = np.asarray(mean[0], np.float64), np.asarray(error, np.float64)
    np.testing.assert_allclose(mean + error.mean(0), exact, atol=1e-6)
    if compressor != identity():
      assert np.abs(mean - exact).max() > 1e-3  # there was something to account for


@SLOW
def test_errors_telescope_exactly_on_dyadic_data(hops, on_devices):
  """Small dyadic numbers: no float32 operation rounds, so the identity holds without tolerance."""
  x = np.random.default_rng(0).integers(-64, 65, (4, 130)).astype(np.float32)
  mean, error = on_devices(lambda v: WITH_ERROR[hops](v, AXIS, e3m0(16)), "vmap", 4)(x)
  np.testing.assert_array_equal(mean[0] + np.asarray(error).sum(0) / 4, x.mean(0))


@pytest.mark.parametrize(
  "compressor",
  [int4(16), e3m0(16), int4(16, "stochastic")],
  ids=str,
)
@SLOW
def test_error_feedback_over_rounds_loses_nothing(hops, compressor, on_devices, stacked):
  n, rounds = 4, 30
  g = jnp.moveaxis(stacked(n * rounds, (35,)).reshape(rounds, n, 35), 0, 1)

  def local(g):
    def body(error, step_and_g):
      step, g = step_and_g
      key = jax.random.fold_in(KEY, step)
      mean, error = WITH_ERROR[hops](g + error, AXIS, compressor, key=key)
      return error, mean

    return jax.lax.scan(body, jnp.zeros_like(g[0]), (jnp.arange(rounds), g))

  error, means = on_devices(local, "vmap", n)(g)
  got = np.asarray(means[0], np.float64).sum(0) + np.asarray(error, np.float64).mean(0)
  np.testing.assert_allclose(got, np.asarray(g, np.float64).sum((0, 1)) / n, atol=1e-5 * rounds)


@SLOW
def test_one_device_keeps_its_value(hops, mode, on_devices, stacked):
  x = stacked(1, (33, 5))
  mean, error = on_devices(lambda v: WITH_ERROR[hops](v, AXIS, int4()), mode, 1)(x)
  np.testing.assert_array_equal(mean, x)
  assert not np.any(error)


@SLOW
def test_bad_numbers_spoil_their_block_on_all_devices(hops, on_devices, stacked):
  x = np.array(stacked(4, (4 * 32,)))
  fn = on_devices(lambda v: MEANS[hops](v, AXIS, int8(16)), "vmap", 4)
  clean, block = np.asarray(fn(x)), np.arange(128) // 16 == 40 // 16
  for bad in (np.nan, np.inf):
    x[2, 40] = bad
    got = np.asarray(fn(x))
    assert np.all(np.isnan(got[:, block]))
    np.testing.assert_array_equal(got[:, ~block], clean[:, ~block])


@pytest.mark.parametrize("mode", CHECKED_FIRST)
def test_works_under_cond_and_scan(hops, mode, on_devices, stacked):
  """As a method with a period calls it: a branch that returns differing values."""
  x = stacked(4, (9,))

  def local(x):
    def body(x, step):
      def sync(x):
        mean = MEANS[hops](x, AXIS, int8())
        if mode == "checked":
          mean = jax.lax.pcast(mean, AXIS, to="varying")
        return mean

      return jax.lax.cond(step % 2 == 1, sync, lambda x: x * 2, x), None

    return jax.lax.scan(body, x, jnp.arange(2))[0], MEANS[hops](x * 2, AXIS, int8())

  got, want = on_devices(local, mode, 4)(x)
  np.testing.assert_array_equal(got, want)


@SLOW
def test_noise_differs_between_devices_and_hops(on_devices, coded):
  """Equal contributions: independent noise averages out over devices, shared noise would not."""
  n, size = 8, 4096
  row = np.random.default_rng(0).normal(size=size).astype(np.float32)
  x = np.stack([row] * n)
  compressor = int4(16, "stochastic")

  def error_power(hops):
    mean = on_devices(lambda v: MEANS[hops](v, AXIS, compressor, key=KEY), "unchecked", n)(x)[0]
    return ((np.asarray(mean, np.float64) - row) ** 2).sum()

  alone = ((coded(compressor, row, KEY).astype(np.float64) - row) ** 2).sum()
  one_hop, two_hop = error_power("one_hop"), error_power("two_hop")
  assert one_hop == pytest.approx(alone / n, rel=0.15)
  # The second hop rounds a mean that is off the grid, once.
  assert two_hop == pytest.approx(alone / n + alone, rel=0.15)


@SLOW
def test_two_hops_err_twice_as_much_as_one_on_independent_data(on_devices, stacked):
  n = 8
  x = stacked(n, (n * 2048,))
  exact = np.asarray(x, np.float64).mean(0)
  compressor = int4(128, "stochastic")
  power = {}
  for hops, mean in MEANS.items():
    fn = on_devices(lambda v, mean=mean: mean(v, AXIS, compressor, key=KEY), "unchecked", n)
    power[hops] = ((np.asarray(fn(x)[0], np.float64) - exact) ** 2).sum() / (exact**2).sum()
  assert power["one_hop"] == pytest.approx(2.8e-2, rel=0.15)
  assert power["two_hop"] == pytest.approx(2 * 2.8e-2, rel=0.15)


@SLOW
def test_stochastic_mean_is_unbiased(hops, on_devices, stacked):
  n, num_keys = 4, 2000
  x = stacked(n, (40,))
  compressor = int4(16, "stochastic")

  def local(v):
    keys = jax.random.split(KEY, num_keys)
    return jax.lax.map(lambda key: MEANS[hops](v, AXIS, compressor, key=key), keys)

  draws = np.asarray(on_devices(local, "vmap", n)(x)[0], np.float64)
  sigma = draws.std(0, ddof=1) / np.sqrt(num_keys)
  assert np.all(np.abs(draws.mean(0) - np.asarray(x, np.float64).mean(0)) <= 5 * sigma + 1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_rejects_bad_input(hops, n, on_devices):
  mean = MEANS[hops]
  run = on_devices(lambda v: mean(v, AXIS, int8()), "unchecked", n)
  with pytest.raises(ValueError, match="`x` must have a floating-point dtype, got int32"):
    run(jnp.zeros((n, 4), jnp.int32))
  run = on_devices(lambda v: mean(v, AXIS, int8(rounding="stochastic")), "unchecked", n)
  with pytest.raises(ValueError, match=r"`key` must be a jax\.random key"):
    run(jnp.zeros((n, 4)))


def test_rejects_an_unbound_axis(hops):
  for fn in (MEANS[hops], WITH_ERROR[hops]):
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      fn(jnp.zeros(4), AXIS, int8())
