"""EF14 and EF21: what is owed, what is known, and in which unit."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import compressed_mean, e3m0, ef21, error_feedback, int4
from jaxcomm.compressors import identity, scaled_sign

STEPS = 8
GRADS = np.random.default_rng(4).normal(size=(4, STEPS, 33)).astype(np.float32)
MEAN = GRADS.astype(np.float64).mean(0)
RATES = np.asarray([0.0, 0.5, 1.0, 1.0, 0.25, 0.0, 0.5, 0.5], np.float32)


def schedule(count):
  return jnp.asarray(RATES)[count]


@pytest.mark.slow
def test_it_is_the_compressed_mean_with_feedback(roll_out):
  txs = error_feedback("replica", e3m0(8)), compressed_mean("replica", e3m0(8), error_feedback=True)
  one, other = (roll_out(tx, GRADS) for tx in txs)
  jax.tree.map(np.testing.assert_array_equal, one, other)
  assert np.abs(one[1].residual).max() > 0.01


def test_decay_forgets(roll_out):
  tx = error_feedback("replica", e3m0(8), decay=0.5, algorithm="all_gather")
  means, state = roll_out(tx, GRADS)
  owed = np.zeros(33)
  for mean, gradient in zip(means[0], MEAN):
    owed = 0.5 * owed + gradient - mean
  np.testing.assert_allclose(state.residual.mean(0), owed, atol=5e-6)


@pytest.mark.parametrize(
  "algorithm", [pytest.param("two_hop", marks=pytest.mark.slow), "all_gather"]
)
def test_in_units_of_the_step_no_step_is_lost(roll_out, algorithm):
  """sum_t rate_t mean_t + mean residual = sum_t rate_t mean gradient, also where the rate is 0."""
  options = {"ef_scale": "step", "learning_rate": schedule, "algorithm": algorithm}
  means, state = roll_out(error_feedback("replica", e3m0(8), **options), GRADS)
  got = (RATES[:, None] * means[0]).sum(0) + state.residual.mean(0)
  np.testing.assert_allclose(got, (RATES[:, None] * MEAN).sum(0), atol=5e-6)
  # The definition of "grad" counts other things.
  means, state = roll_out(error_feedback("replica", e3m0(8), algorithm=algorithm), GRADS)
  got = (RATES[:, None] * means[0]).sum(0) + state.residual.mean(0)
  assert np.abs(got - (RATES[:, None] * MEAN).sum(0)).max() > 0.01


@pytest.mark.slow
def test_a_constant_rate_changes_nothing(roll_out):
  step = error_feedback("replica", e3m0(8), ef_scale="step", learning_rate=0.5)
  want, _ = roll_out(error_feedback("replica", e3m0(8)), GRADS)
  got, _ = roll_out(step, GRADS)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("feedback", [True, False])
def test_feedback_repairs_sign_descent(feedback):
  """f(x) = |x_0 + x_1| / 2 + |x_0 - x_1|: signs alone never leave the line x_0 + x_1 = 2."""
  tx = compressed_mean(
    "replica", scaled_sign(), algorithm="all_gather", error_feedback=feedback
  )  # fmt: skip

  def descend(x):
    def step(carry, _):
      x, state = carry
      along, across = jnp.sign(x[0] + x[1]) / 2, jnp.sign(x[0] - x[1])
      updates, state = tx.update(jnp.stack([along + across, along - across]), state)
      return (x - 2.0**-7 * updates, state), None

    return jax.lax.scan(step, (x, tx.init(x)), length=1000)[0][0]

  start = jnp.asarray([[1.25 + 2**-8, 0.75 - 2**-8]] * 2)  # two replicas that agree
  x = jax.jit(jax.vmap(descend, axis_name="replica"))(start)[0]
  if feedback:
    assert jnp.abs(x).max() < 0.1
  else:
    assert x.sum() == 2.0


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"decay": 0.0}, r"`decay` must be in \(0, 1\], got 0.0"),
    ({"ef_scale": "update"}, r"`ef_scale` must be 'grad' or 'step', got 'update'"),
    ({"ef_scale": "step"}, r"`learning_rate` must be given for .*`learning_rate=None`"),
    ({"learning_rate": 0.1}, r"`learning_rate` must be given for .*`ef_scale='grad'`"),
    ({"ef_scale": "step", "learning_rate": -1}, r"`learning_rate` must be positive .*got -1"),
    ({"algorithm": "ring"}, r"`algorithm` must be one of .*got 'ring'"),
  ],
)
def test_rejects_bad_options(kwargs, message):
  with pytest.raises(ValueError, match=message):
    error_feedback("replica", int4(), **kwargs)


def test_warns_of_compressors_that_are_not_contractive():
  with pytest.warns(UserWarning, match=r"`compressor` should be contractive.*omega"):
    error_feedback("replica", int4(1024, rounding="stochastic"))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    error_feedback("replica", int4(64, rounding="stochastic"))


def test_ef21_with_identity_is_the_plain_mean(roll_out):
  means, _ = roll_out(ef21("replica", identity()), GRADS)
  np.testing.assert_allclose(means[0], MEAN, atol=1e-6)


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_ef21_knows_the_mean_of_what_it_was_told(roll_out, context):
  """h = mean h_i at all times, equal bits everywhere; fixed gradients are reached."""
  fixed = np.repeat(GRADS[:, :1], 24, 1)
  tx = ef21("replica", e3m0(8))
  means, state = roll_out(tx, fixed, context=context, differs=("own",))
  np.testing.assert_array_equal(means, np.broadcast_to(means[:1], means.shape))
  np.testing.assert_array_equal(means[:, -1], state.mean)
  np.testing.assert_allclose(state.mean[0], state.own.mean(0), atol=1e-6)
  np.testing.assert_allclose(state.own, fixed[:, 0], atol=1e-6)
  assert np.abs(means[0, 0] - MEAN[0]).max() > 0.01
  assert np.abs(state.own[0] - state.own[1]).max() > 0.1


@pytest.mark.slow
def test_ef21_converges_where_a_compressed_mean_stops(roll_out):
  """Gradient descent on a sum of quadratics whose gradients do not vanish one by one."""
  tx = optax.chain(ef21("replica", e3m0(64)), optax.sgd(0.3))
  targets = 10 * GRADS[:, 0]

  def end(tx):
    def replica(target):
      def step(carry, _):
        x, state = carry
        updates, state = tx.update(x - target, state, x)
        return (x + updates, state), None

      x = jnp.zeros(33)
      return jax.lax.scan(step, (x, tx.init(x)), length=100)[0][0]

    return jax.jit(jax.vmap(replica, axis_name="replica"))(targets)[0]

  best = targets.astype(np.float64).mean(0)
  plain = optax.chain(compressed_mean("replica", e3m0(64)), optax.sgd(0.3))
  assert np.abs(end(tx) - best).max() < 1e-4
  assert np.abs(end(plain) - best).max() > 0.1
