"""1-bit Adam: Adam at first, signs that lose nothing afterwards."""

import jax
import numpy as np
import optax
import pytest

from jaxcomm import one_bit_adam, pmean_over

STEPS, RATE = 7, 0.1
B2 = 0.9  # 1 - 0.999^t would lose four digits of float32
GRADS = 1 + np.random.default_rng(8).normal(size=(4, STEPS, 21)).astype(np.float32)
GRADS[..., 5] = 0  # an element that never has a gradient


def adam(grads, freeze):
  """Steps [T, d] of Adam on mean gradients [T, d], in float64; variances end at `freeze`."""
  m = v = np.zeros(grads.shape[1])
  steps = []
  for t, g in enumerate(grads.astype(np.float64), 1):
    m = 0.9 * m + 0.1 * g
    if t <= freeze:
      v = B2 * v + (1 - B2) * g**2
    v_hat = v / (1 - B2 ** min(t, freeze))
    steps.append(-RATE * m / (1 - 0.9**t) / (np.sqrt(v_hat) + 1e-8))
  return np.stack(steps)


@pytest.mark.slow
def test_the_warm_up_is_adam(roll_out):
  tx = one_bit_adam(RATE, "replica", warmup_steps=STEPS, weight_decay=0.1)
  want = optax.chain(pmean_over("replica"), optax.adamw(RATE, weight_decay=0.1))
  got, state = roll_out(tx, GRADS)
  want, want_state = roll_out(want, GRADS)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(state[0].nu, want_state[1][0].nu)
  np.testing.assert_array_equal(state[0].mean_state.residual, 0)


def test_afterwards_variances_stay_and_momentum_is_exact_in_sum(roll_out):
  warm_up = 2
  tx = one_bit_adam(RATE, "replica", warmup_steps=warm_up, b2=B2)
  got, state = roll_out(tx, GRADS)
  np.testing.assert_array_equal(got, np.broadcast_to(got[:1], got.shape))
  mean = GRADS.astype(np.float64).mean(0)
  np.testing.assert_allclose(got[0, :warm_up], adam(mean, STEPS)[:warm_up], rtol=1e-5)
  np.testing.assert_array_equal(got[..., 5], 0)

  v = (1 - B2) * (B2 * mean[0] ** 2 + mean[1] ** 2)
  np.testing.assert_allclose(state[0].nu[0], v, rtol=1e-5)
  # Momentum is read back from the steps; what it lacks is in the residuals.
  correction = 1 - 0.9 ** np.arange(1, STEPS + 1)[:, None]
  denominator = np.sqrt(v / (1 - B2**warm_up)) + 1e-8
  momentum = got[0].astype(np.float64) / -RATE * denominator * correction
  owed = np.zeros(21)
  for t in range(warm_up, STEPS):
    owed += 0.9 * momentum[t - 1] + 0.1 * mean[t] - momentum[t]
  seen = np.arange(21) != 5
  residual = state[0].mean_state.residual.mean(0)
  np.testing.assert_allclose(residual[seen], owed[seen], atol=1e-5)
  assert np.abs(owed[seen]).max() > 0.05


@pytest.mark.slow
def test_an_exact_mean_gives_adam_with_frozen_variances(roll_out):
  tx = one_bit_adam(RATE, "replica", warmup_steps=3, b2=B2, mean=pmean_over("replica"))
  got, _ = roll_out(tx, GRADS)
  np.testing.assert_allclose(got[0], adam(GRADS.mean(0), 3), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"warmup_steps": 0}, r"`warmup_steps` must be an integer >= 1, got 0"),
    ({"b1": 1.0}, r"`b1` must be in \[0, 1\), got 1.0"),
    ({"b2": -0.1}, r"`b2` must be in \[0, 1\), got -0.1"),
    ({"eps": -1e-8}, r"`eps` must be at least 0, got -1e-08"),
    ({"weight_decay": -1}, r"`weight_decay` must be at least 0, got -1"),
    ({"mean": 3}, r"`mean` must be an optax transform, got 3"),
    ({"mean": pmean_over("replica"), "specs": jax.P()}, r"`specs` has no effect beside `mean`"),
  ],
)
def test_rejects_bad_options(kwargs, message):
  with pytest.raises(ValueError, match=message):
    one_bit_adam(RATE, "replica", **{"warmup_steps": 1, **kwargs})
