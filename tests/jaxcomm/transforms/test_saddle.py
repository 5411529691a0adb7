"""Saddle operators, the check of their sign, and the duality gap."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import rand_k
from jaxcomm.transforms import (
  check_monotone,
  extragradient,
  gap_bilinear,
  masha1,
  masha_step,
  saddle_operator,
)

D, RADIUS = 6, 2.0


@pytest.fixture(scope="module")
def game():
  rng = np.random.default_rng(0)
  return tuple(rng.normal(size=s).astype(np.float32) for s in ((D, D), (D,), (D,)))


def payoff(x, y, game):
  a, b, c = game
  return y @ (a @ x) + b @ x - c @ y


def test_signs(game):
  x, y = np.ones(D, np.float32), np.arange(D, dtype=np.float32)
  got = jax.jit(saddle_operator(payoff))((x, y), game)
  a, b, c = game
  np.testing.assert_allclose(got[0], a.T @ y + b, rtol=1e-5)
  np.testing.assert_allclose(got[1], c - a @ x, rtol=1e-5)
  swapped = saddle_operator(lambda y, x, game: payoff(x, y, game), (1,), (0,))
  for one, other in zip(jax.jit(swapped)((y, x), game), got[::-1]):
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("numbers", [((0,), (0,)), ((0,), (2,)), ((0, 1), ())])
def test_bad_numbers(numbers):
  with pytest.raises(ValueError, match="`argnums_min` and `argnums_max` must share out"):
    saddle_operator(payoff, *numbers)


@pytest.mark.slow
def test_a_missing_sign_is_noticed(game):
  z, key = (jnp.zeros(D), jnp.zeros(D)), jax.random.key(0)
  right = saddle_operator(payoff)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert check_monotone(lambda z: right(z, game), z, key) == pytest.approx(0, abs=1e-4)
  wrong = jax.grad(lambda z: payoff(*z, game))
  with pytest.warns(UserWarning, match=r"not monotone.*saddle_operator"):
    check_monotone(wrong, z, key)


def test_gap_is_what_the_best_answers_gain(game):
  rng = np.random.default_rng(1)
  x, y = (v / np.linalg.norm(v) for v in rng.normal(size=(2, D)))
  gap = float(gap_bilinear(*game, (x, y), RADIUS))
  a, b, c = game
  best_y, best_x = a @ x - c, -(a.T @ y + b)
  best_y, best_x = (RADIUS * v / np.linalg.norm(v) for v in (best_y, best_x))
  assert gap == pytest.approx(payoff(x, best_y, game) - payoff(best_x, y, game), rel=1e-5)
  others = rng.normal(size=(200, 2, D))
  others *= RADIUS / np.linalg.norm(others, axis=-1, keepdims=True)
  assert gap > max(payoff(x, v, game) - payoff(u, y, game) for u, v in others)


@pytest.mark.slow
def test_the_gap_of_averages_closes_without_strong_monotonicity(game):
  """mu = 0 on balls: a projection, and the average of the half steps."""
  workers = 4
  rng = np.random.default_rng(2)
  noise = [0.5 * rng.normal(size=(workers, *g.shape)) for g in game]
  data = tuple(np.float32(g[None] + n - n.mean(0, keepdims=True)) for g, n in zip(game, noise))
  operator = saddle_operator(payoff)

  def project(z, gamma):
    del gamma
    return jax.tree.map(lambda v: v * jnp.minimum(1, RADIUS / jnp.linalg.norm(v)), z)

  def average(tx, steps):
    step = masha_step(operator, tx)

    def of_worker(worker):
      z = (jnp.ones(D), jnp.ones(D))

      def advance(carry, _):
        z, state, _ = step(*carry, worker)
        return (z, state), z

      carry = z, tx.init(z, operator(z, worker))
      path = jax.lax.scan(advance, carry, length=steps)[1]
      return jax.tree.map(lambda v: v.mean(0), path), jax.tree.map(lambda v: v[:20].mean(0), path)

    late, early = jax.jit(jax.vmap(of_worker, axis_name="data"))(data)
    return [
      float(gap_bilinear(*game, jax.tree.map(lambda v: v[0], z), RADIUS)) for z in (late, early)
    ]

  for tx in (extragradient(0.05, prox=project), masha1(0.05, rand_k(k=3), prox=project)):
    late, early = average(tx, 2000)
    assert late < 0.05 * early
    assert late > -1e-3
