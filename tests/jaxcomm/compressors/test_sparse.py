"""Top-k, Rand-k and Bernoulli: supports, indices, constants and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import Bernoulli, bernoulli, rand_k, top_k

KEYS = jax.random.split(jax.random.key(1), 2000)


def square(x):
  return np.square(np.asarray(x, np.float64)).sum(-1)


@pytest.mark.parametrize("index", ["packed", "plain"])
def test_top_k_keeps_the_largest(index, both, normal):
  x = normal((7, 11))
  payload, got = both(top_k(9, index=index), x)
  order = np.argsort(-np.abs(x.reshape(-1)))
  want = np.zeros(77, np.float32)
  want[order[:9]] = x.reshape(-1)[order[:9]]
  np.testing.assert_array_equal(got, want.reshape(7, 11))
  assert payload["indices"].dtype == (np.uint8 if index == "packed" else np.int32)


def test_top_k_error_bound_and_equality(roundtrip, normal):
  compressor = top_k(5)
  assert compressor.alpha_at(40) == 1 / 8
  for power in (0, 1, 4):  # equal magnitudes, Gaussian, peaked
    x = np.sign(normal(40)) * np.abs(normal(40)) ** power
    ratio = square(roundtrip(compressor, x) - x) / square(x)
    assert ratio <= 7 / 8
    assert (ratio == 7 / 8) == (power == 0)


def test_all_values_kept_is_the_identity(roundtrip, normal):
  x = normal(40)
  for compressor in (top_k(40), rand_k(40), rand_k(ratio=1.0), bernoulli(1.0)):
    np.testing.assert_array_equal(roundtrip(compressor, x), x)
    assert (compressor.omega_at(40) or 0.0) == 0
    assert compressor.alpha_at(40) == 1


def test_top_k_of_bad_numbers_sends_them(roundtrip, normal):
  x = normal(40)
  x[[3, 7]] = [np.nan, -np.inf]
  got = roundtrip(top_k(3), x)
  assert np.isnan(got[3])
  assert got[7] == -np.inf
  assert np.count_nonzero(got) == 3


def test_rand_k_support_is_a_uniform_choice_without_replacement():
  supports = np.asarray(jax.jit(jax.vmap(lambda key: rand_k(4).support(key, 10)))(KEYS))
  assert all(len(set(row)) == 4 for row in supports)
  counts = np.bincount(supports.reshape(-1), minlength=10)
  sigma = np.sqrt(2000 * 0.4 * 0.6)
  assert np.all(np.abs(counts - 800) < 5 * sigma)
  pairs = np.zeros((10, 10))
  for row in supports:
    pairs[np.ix_(row, row)] += 1
  expected = 2000 * 4 * 3 / (10 * 9)
  off = pairs[~np.eye(10, dtype=bool)]
  assert np.all(np.abs(off - expected) < 5 * np.sqrt(expected))


def test_shared_support_sends_values_only_and_sums_of_values_decode(normal):
  compressor, key = rand_k(ratio=0.25, shared_support=True), KEYS[0]
  x = normal((4, 40))

  @jax.jit
  def run(key, x):
    support = compressor.support(key, 40)
    summed = compressor.expand(compressor.values(x.sum(0), support), support, 40)
    each = [compressor.decompress(compressor.compress(key, row), (40,), key=key) for row in x]
    one = jax.tree.leaves(compressor.compress(key, x[0]))
    return summed, jnp.stack(each), one, jnp.zeros(40).at[support].set(1.0)

  summed, each, one, mask = run(key, x)
  assert [a.shape for a in one] == [(10,)]
  np.testing.assert_array_equal(summed, np.asarray(mask) * x.sum(0) * 4)
  support = np.any(np.asarray(each) != 0, axis=0)
  assert support.sum() == 10
  np.testing.assert_array_equal(each, np.where(support, x * 4, 0))


def test_a_shared_support_gains_nothing_from_the_mean(normal):
  x = normal((2, 40))
  shared, own = rand_k(ratio=0.25, shared_support=True), rand_k(ratio=0.25)
  assert (own.omega_of_mean(2), shared.omega_of_mean(2)) == (3 / 2, 3)
  assert float(shared.variance_of_mean(x)) == pytest.approx(3 * square(x.mean(0)), rel=1e-5)
  assert float(own.variance_of_mean(x)) == pytest.approx(3 * square(x).sum() / 4, rel=1e-5)

  @jax.jit
  @jax.vmap
  def draw(key):
    rows = [own.compress(k, row) for k, row in zip(jax.random.split(key), x)]
    independent = sum(own.decompress(payload, (40,)) for payload in rows) / 2
    alike = shared.values(jnp.asarray(x.mean(0)), support := shared.support(key, 40))
    return independent, shared.expand(alike, support, 40)

  for compressor, draws in zip((own, shared), draw(KEYS)):
    got = square(np.asarray(draws) - x.mean(0)).mean()
    assert got == pytest.approx(float(compressor.variance_of_mean(x)), rel=0.05)


def test_constants_with_k_depend_on_the_size():
  assert rand_k(4).omega is None
  assert rand_k(4).unbiased
  assert rand_k(4).omega_at(16) == 3
  assert rand_k(4, scaled=False).alpha is None
  assert rand_k(4, scaled=False).alpha_at(16) == 1 / 4
  assert rand_k(ratio=0.25).omega == 3
  assert rand_k(ratio=0.25).q == 4
  assert top_k(ratio=0.25).delta == 4
  assert top_k(4).alpha is None
  assert top_k(ratio=0.07).num_kept(100) == 7  # not 8, though 0.07 * 100 > 7 in binary
  assert all(top_k(ratio=0.1).alpha_at(d) >= 0.1 for d in range(1, 200))


def test_bfloat16_values_cost_what_the_constants_say(relative_variance):
  worst = np.full(8, 1 + 2.0**-8, np.float32)  # a tie right above a power of two
  compressor = top_k(8, value_dtype="bfloat16")
  want = 1 - compressor.alpha_at(8)
  assert relative_variance(compressor, worst) == pytest.approx(want, rel=1e-3)
  worst = np.full(8, 2 * (1 + 2.0**-7) / (2 + 2.0**-7), np.float32)
  compressor = rand_k(8, value_dtype="bfloat16")
  want = compressor.omega_at(8)
  assert relative_variance(compressor, worst) == pytest.approx(want, rel=1e-3)


@dataclasses.dataclass(frozen=True)
class Tight(Bernoulli):
  """No room for more than three values."""

  def capacity(self, size):
    return min(size, 3)


def test_bernoulli_stays_unbiased_when_not_all_values_fit(normal):
  x = normal(12, 2)
  compressor = Tight(0.5)

  def draw(key):
    payload = compressor.compress(key, x)
    return compressor.decompress(payload, (12,)), payload["count"][0]

  draws, counts = jax.jit(jax.vmap(draw))(jax.random.split(KEYS[0], 20000))
  draws, counts = np.asarray(draws, np.float64), np.asarray(counts)
  assert (counts > 3).mean() > 0.5
  assert np.all((draws != 0).sum(1) == np.minimum(counts, 3))
  assert np.all(np.abs(draws.mean(0) - x) <= 5 * draws.std(0) / np.sqrt(20000))


def test_bernoulli_hardly_ever_overflows_and_omega_counts_it_in():
  for p in (0.001, 0.01, 0.3, 0.9):
    for size in (1, 3, 30, 1000, 100_000):
      capacity = bernoulli(p).capacity(size)
      kept = np.random.default_rng(0).binomial(size - 1, p, 100_000) + 1
      excess = np.maximum(kept / capacity, 1).mean()
      assert excess - 1 < 1e-6
      assert 1 / p - 1 <= excess / p - 1 <= bernoulli(p).omega
      assert capacity <= size


@pytest.mark.parametrize("make", [top_k, rand_k])
def test_rejects_bad_fields(make):
  name = {"top_k": "TopK", "rand_k": "RandK"}[make.__name__]
  for fields in ({}, {"k": 3, "ratio": 0.5}):
    with pytest.raises(ValueError, match=f"{name}: give `k` or `ratio`, got k="):
      make(**fields)
  for k in (0, -1):
    with pytest.raises(ValueError, match=f"{name}: k={k} must be at least 1"):
      make(k)
  for k in (2.0, True, "2"):
    with pytest.raises(ValueError, match=f"{name}: `k` must be an integer, got"):
      make(k)
  for ratio in (0, 1.5, -0.1, float("nan")):
    with pytest.raises(ValueError, match=rf"{name}: `ratio` must be in \(0, 1\], got"):
      make(ratio=ratio)
  with pytest.raises(ValueError, match=rf"{name}: k=9 must be in 1\.\.d=8\."):
    make(9).compress(KEYS[0], jnp.zeros(8))
  with pytest.raises(ValueError, match="`index` must be 'packed' or 'plain', got 'int64'"):
    make(1, index="int64")
  with pytest.raises(ValueError, match="`value_dtype` must be 'float32' or 'bfloat16', got"):
    make(1, value_dtype="float16")
  with pytest.raises(ValueError, match=r"`x` must have at most 2\*\*31 elements for int32 indices"):
    make(1).payload_bytes((2**31 + 1,))


def test_bernoulli_rejects_bad_fields():
  for p in (0, -0.5, 1.01, float("nan")):
    with pytest.raises(ValueError, match=r"`p` must be in \(0, 1\], got"):
      bernoulli(p)
  with pytest.raises(ValueError, match="`index` must be 'packed' or 'plain', got 'bits'"):
    bernoulli(0.5, index="bits")
