"""The algebra: constants of composed compressors, and the claims it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import (
  _hadamard,
  bernoulli,
  blockwise,
  chain_compressors,
  contractive,
  fp8,
  hadamard,
  identity,
  induced,
  int4,
  int8,
  natural,
  qsgd,
  rand_k,
  scaled_sign,
  top_k,
)


def square(x):
  return np.square(np.asarray(x, np.float64)).sum(-1)


def test_chains_of_unbiased_compressors_multiply():
  outer, inner = natural(), rand_k(ratio=0.25)
  chain = chain_compressors(outer, inner)
  assert chain.unbiased
  assert chain.omega == (1 + 1 / 8) * (1 + 3) - 1
  assert chain_compressors(identity(), inner).omega == 3
  assert chain_compressors(chain, natural()).q == pytest.approx(1.125 * 1.125 * 4)


def test_quantized_top_k_has_the_product_of_the_constants():
  sparse = top_k(ratio=0.25)
  assert chain_compressors(natural(), sparse).alpha == 0.25 * (1 - 1 / 8)
  coarse = qsgd(1, 1024)
  assert coarse.omega > 1
  assert chain_compressors(coarse, sparse).alpha is None
  assert chain_compressors(contractive(coarse), sparse).alpha == 0.25 / coarse.q
  assert chain_compressors(int8(), sparse).alpha == 0.25 * int8().alpha
  # `outer` sees k values: with k given, its constant is that at size k.
  assert chain_compressors(scaled_sign(), top_k(5)).alpha_at(40) == pytest.approx(5 / 40 / 5)
  unscaled = rand_k(ratio=0.5, scaled=False)
  assert chain_compressors(natural(), unscaled).alpha == 0.5 * (1 - 1 / 8)


def test_no_constant_is_claimed_where_none_holds(roundtrip):
  for chain in (
    chain_compressors(top_k(ratio=0.25), natural()),
    chain_compressors(top_k(ratio=0.25), rand_k(ratio=0.25)),
    chain_compressors(int8(), int4()),
    chain_compressors(natural(), scaled_sign()),
    chain_compressors(scaled_sign(), fp8(rounding="stochastic")),
  ):
    assert chain.omega is None
    assert chain.alpha is None
    assert chain.omega_at(64) is None
    assert chain.alpha_at(64) is None
    assert not chain.unbiased
  # And indeed: what Top-k keeps of 16 times one of 16 equal values errs by more than the input.
  x = jnp.ones(16)
  chain = chain_compressors(top_k(1), rand_k(1))
  got = roundtrip(chain, x)
  assert square(got - x) > square(x)


def test_contractive_divides_by_one_plus_omega():
  assert contractive(natural()).alpha == 1 / 1.125
  assert contractive(rand_k(4)).alpha is None
  assert contractive(rand_k(4)).alpha_at(16) == 1 / 4
  for compressor in (top_k(2), int8(), contractive(natural())):
    with pytest.raises(
      ValueError, match=r"`compressor` must be unbiased, U\(omega\), got the biased"
    ):
      contractive(compressor)


def test_induced_is_unbiased_and_better_than_its_part():
  compressor = induced(top_k(ratio=0.25), rand_k(ratio=0.5))
  assert compressor.unbiased
  assert compressor.omega == 1 * (1 - 0.25)
  assert induced(scaled_sign("rms"), natural()).omega is None
  with pytest.raises(ValueError, match=r"`unbiased` must be unbiased, U\(omega\), got the biased"):
    induced(natural(), top_k(2))


def test_blockwise_takes_the_worst_block():
  assert blockwise(scaled_sign(), 16).alpha == 1 / 16
  assert blockwise(scaled_sign(), 16).alpha_at(9) == 1 / 9
  assert blockwise(rand_k(4), 16).omega == 3
  assert blockwise(top_k(ratio=0.25), 16).alpha == 0.25
  assert blockwise(top_k(ratio=0.25), 16).alpha_at(18) == 4 / 16  # 1 of the last 2 is more
  assert blockwise(natural(), 16).omega == 1 / 8


def test_blockwise_keeps_scales_apart(roundtrip, normal):
  x = np.concatenate([normal(16) * 1e6, normal(16), normal(5) * 1e-6])
  parts = [x[:16], x[16:32], x[32:]]
  want = np.concatenate([roundtrip(scaled_sign(), part) for part in parts])
  np.testing.assert_array_equal(roundtrip(blockwise(scaled_sign(), 16), x), want)


def test_hadamard_spreads_an_outlier(roundtrip, normal):
  x = normal(256)
  x[40] = 100
  plain = square(roundtrip(int4(256), x) - x)
  rotated = square(roundtrip(hadamard(int4(256), 256), x) - x)
  assert rotated < plain / 4  # a step of 100 / 7 against one of about (100 / 16 + 3) / 7
  exact = hadamard(identity(), 8)
  np.testing.assert_allclose(roundtrip(exact, x), x, rtol=1e-5, atol=1e-5)
  assert hadamard(natural()).omega == natural().omega
  with pytest.raises(ValueError, match="`size` of the Hadamard transform must be"):
    hadamard(int8(), 12)


def test_hadamard_is_its_own_inverse_and_scales_every_norm(normal):
  x = normal(96)
  transform = jax.jit(_hadamard._transform, static_argnums=1)
  rotated = transform(x, 32)
  np.testing.assert_allclose(transform(rotated, 32) / 32, x, rtol=1e-5, atol=1e-6)
  got, want = np.linalg.norm(rotated), np.sqrt(32) * np.linalg.norm(x)
  assert got == pytest.approx(want, rel=1e-5)


def test_means_of_independent_compressions():
  compressor = natural()
  assert compressor.omega_of_mean(8) == 1 / 64
  x = jnp.asarray([[4 / 3, 1.0], [1.0, 4 / 3]])
  assert float(compressor.variance_of_mean(x)) == pytest.approx(2 * (4 / 3) ** 2 / 8 / 4)
  for biased in (top_k(2), int8(), scaled_sign()):
    with pytest.raises(ValueError, match="`omega_of_mean` needs an unbiased compressor"):
      biased.omega_of_mean(4)
    with pytest.raises(ValueError, match="`variance_of_mean` needs independent unbiased errors"):
      biased.variance_of_mean(x)
  shared = chain_compressors(natural(), rand_k(1, shared_support=True))
  with pytest.raises(ValueError, match="`variance_of_mean` needs independent unbiased errors"):
    shared.variance_of_mean(x)


def test_variance_without_a_closed_form_is_refused():
  for compressor in (
    chain_compressors(natural(), rand_k(1)),
    chain_compressors(int8(), natural()),
    induced(rand_k(1, scaled=False), natural()),
    hadamard(bernoulli(0.5), 32),
  ):
    with pytest.raises(ValueError, match="`variance` has no closed form for"):
      compressor.variance(jnp.ones(8))


def test_chain_after_narrow_values_is_refused():
  with pytest.raises(ValueError, match="`inner` must keep float32 values"):
    chain_compressors(int8(), top_k(2, value_dtype="bfloat16"))
