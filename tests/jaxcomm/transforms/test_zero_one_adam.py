"""0/1 Adam: its intervals, and what happens at each."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import pmean_over, zero_one_adam

REPLICAS, STEPS, RATE, DECAY = 2, 26, 0.1, 0.1
B2 = 0.9  # 1 - 0.999^t would lose four digits of float32
INTERVALS = {
  "var_freeze_step": 9,
  "var_update_scaler": 2,
  "local_step_scaler": 5,
  "local_step_clipper": 4,
}
GRADS = 1 + np.random.default_rng(9).normal(size=(REPLICAS, STEPS, 12)).astype(np.float32)
START = np.linspace(-1, 1, 12).astype(np.float32)
# Variance updates: interval 1 at 1, 2, then 2 at 4, 6, then 4 at 8. Exchanges after the freeze:
# interval 1 at 10..14, then 2 at 16, 18, then 4 (in force from 20 on) at 20, 24.
EXACT = (1, 2, 4, 6, 8)
EXCHANGES = (10, 11, 12, 13, 14, 16, 18, 20, 24)


def linear(params, grad):
  return jnp.sum(params * grad)


def reference():
  """Parameters [R, T, d] with exact means, in float64; steps counted from 1."""
  outer, momentum = START.astype(np.float64), np.zeros((REPLICAS, 12))
  params, v, num_v, rates = np.stack([outer] * REPLICAS), np.zeros(12), 0, 0.0
  history = []
  for t in range(1, STEPS + 1):
    grads = GRADS[:, t - 1].astype(np.float64)
    if t <= INTERVALS["var_freeze_step"]:
      grads = np.broadcast_to(grads.mean(0), grads.shape)
      if t in EXACT:
        v, num_v = B2 * v + (1 - B2) * grads[0] ** 2, num_v + 1
    momentum = 0.9 * momentum + 0.1 * grads
    d = np.sqrt(v / (1 - B2**num_v)) + 1e-8
    params = params - RATE * (momentum / (1 - 0.9**t) / d + DECAY * params)
    rates += RATE
    if t <= INTERVALS["var_freeze_step"]:
      outer, rates = params[0], 0.0
    elif t in EXCHANGES:
      moved = ((outer - params) * d).mean(0)
      outer = outer - moved / d
      params = np.stack([outer] * REPLICAS)
      momentum = np.stack([moved / rates * (1 - 0.9**t)] * REPLICAS)
      rates = 0.0
    history.append(params)
  return np.stack(history, 1)


def test_follows_its_update_rule(train):
  tx = zero_one_adam(
    RATE, "replica", b2=B2, weight_decay=DECAY, mean=pmean_over("replica"), **INTERVALS
  )  # fmt: skip
  got = train(tx, linear, jnp.asarray(START), GRADS)
  np.testing.assert_allclose(got.params, reference(), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["vmap", "shard_map"])
def test_replicas_agree_after_every_exchange_and_only_then(train, context):
  tx = zero_one_adam(RATE, "replica", b2=B2, **INTERVALS)
  got = train(tx, linear, jnp.asarray(START), GRADS, context=context)
  agree = (got.params == got.params[:1]).all((0, 2))
  steps = np.arange(1, STEPS + 1)
  together = (steps <= INTERVALS["var_freeze_step"]) | np.isin(steps, EXCHANGES)
  np.testing.assert_array_equal(agree, together)
  state = got.state.opt_state
  np.testing.assert_array_equal(state.anchor, np.broadcast_to(state.anchor[:1], state.anchor.shape))
  assert not state.synced
  assert int(state.outer_state.num_nu) == len(EXACT)
  # Signs: the parameters are not those of exact means, but not far.
  off = np.abs(got.params - reference())[:, : INTERVALS["var_freeze_step"]].max()
  assert 1e-3 < off < 1


@pytest.mark.slow
def test_exact_means_all_along_are_adam(train):
  tx = zero_one_adam(RATE, "replica", var_freeze_step=100, var_update_scaler=100)
  got = train(tx, linear, jnp.asarray(START), GRADS[:, :6])
  adam = optax.chain(pmean_over("replica"), optax.adam(RATE))
  want = train(adam, linear, jnp.asarray(START), GRADS[:, :6])
  np.testing.assert_allclose(got.params, want.params, atol=1e-6)


@pytest.mark.parametrize("name", INTERVALS)
def test_rejects_bad_intervals(name):
  with pytest.raises(ValueError, match=rf"`{name}` must be an integer >= 1, got 0"):
    zero_one_adam(RATE, "replica", **{**INTERVALS, name: 0})


def test_needs_params():
  tx = zero_one_adam(RATE, "replica", var_freeze_step=1)
  with pytest.raises(ValueError, match="`params` must be given"):
    tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
