import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import rope

INV = rope.frequencies(16, 10_000.0)


@jax.jit
def turn(x_SC, positions_S):
  cos, sin = rope.angles(positions_S[None], INV)
  return rope.rotate(x_SC[None, :, None], cos, sin)[0, :, 0]


def normal(seed, shape=(5, 16)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_position_zero_is_the_identity():
  np.testing.assert_array_equal(turn(normal(0), jnp.zeros(5, int)), normal(0))


def test_norms_are_kept():
  got = turn(normal(1), jnp.array([0, 1, 17, 300, 5000]))
  np.testing.assert_allclose(np.linalg.norm(got, axis=-1), np.linalg.norm(normal(1), axis=-1), 1e-5)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(m=st.integers(0, 200), n=st.integers(0, 200), shift=st.integers(1, 200))
def test_products_depend_on_the_distance_only(m, n, shift):
  q_C, k_C = normal(2, 16), normal(3, 16)
  turned = turn(np.stack([q_C, k_C, q_C, k_C]), jnp.array([m, n, m + shift, n + shift]))
  np.testing.assert_allclose(turned[0] @ turned[1], turned[2] @ turned[3], rtol=0, atol=2e-3)


def test_layout_is_split_half():
  x_C = np.zeros((1, 16), np.float32)
  x_C[0, 2] = 1
  got = turn(x_C, jnp.array([3]))[0]
  want = np.zeros(16)
  want[2], want[10] = np.cos(3 * INV[2]), np.sin(3 * INV[2])
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_keeps_dtype_and_turns_in_float32():
  x = jnp.asarray(normal(4), jnp.bfloat16)
  positions = jnp.full(5, 1001)
  got = turn(x, positions)
  assert got.dtype == jnp.bfloat16
  want = turn(x.astype(jnp.float32), positions)
  np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_scaling_by_one_is_the_identity():
  scaling = rope.Llama3RopeScaling(factor=1.0)
  np.testing.assert_allclose(rope.frequencies(128, 5e5, scaling), rope.frequencies(128, 5e5), 1e-15)


def test_scaling_keeps_high_and_divides_low_frequencies():
  scaling = rope.Llama3RopeScaling(factor=8.0)
  plain, scaled = rope.frequencies(128, 5e5), rope.frequencies(128, 5e5, scaling)
  wavelength = 2 * np.pi / plain
  high, low = wavelength < 8192 / 4, wavelength > 8192
  assert high.any()
  assert low.any()
  assert (~high & ~low).any()
  np.testing.assert_array_equal(scaled[high], plain[high])
  np.testing.assert_allclose(scaled[low], plain[low] / 8, rtol=1e-12)
  middle = scaled[~high & ~low] / plain[~high & ~low]
  assert np.all((middle > 1 / 8) & (middle < 1) & (np.diff(middle, prepend=1) < 0))


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"factor": 0.0}, "`factor` must be positive, got 0.0"),
    ({"factor": 8.0, "original_max_position": -1}, "`original_max_position` must be positive"),
    ({"factor": 8.0, "low_freq_factor": 4.0}, "`low_freq_factor` must be below"),
  ],
)
def test_rejects_bad_scaling(kwargs, message):
  with pytest.raises(ValueError, match=message):
    rope.Llama3RopeScaling(**kwargs)
