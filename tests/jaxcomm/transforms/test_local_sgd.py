"""Local SGD against synchronous SGD, its inner optimizer, and the average of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import compressed_mean, e3m0, local_sgd, pmean_over

REPLICAS, STEPS, SIZE = 4, 8, 5
CURVATURE = np.linspace(0.2, 1.0, SIZE).astype(np.float32)
CONTEXTS = ("vmap", "shard_map")


def loss_fn(params, target):
  return 0.5 * jnp.sum(CURVATURE * (params["w"] - target) ** 2)


def make_problem(num_replicas=REPLICAS):
  rng = np.random.default_rng(1)
  targets = rng.normal(size=(num_replicas, STEPS, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


@pytest.mark.parametrize("context", CONTEXTS)
def test_one_replica_is_the_inner_optimizer(train, context):
  params, targets = make_problem(num_replicas=1)
  inner = optax.adam(0.3)
  got = train(local_sgd(inner, sync_period=3), loss_fn, params, targets, context=context)
  want = train(inner, loss_fn, params, targets)
  np.testing.assert_allclose(got.params["w"], want.params["w"], atol=1e-6)


@pytest.mark.parametrize("context", CONTEXTS)
def test_period_one_with_sgd_is_synchronous_sgd(train, context):
  params, targets = make_problem()
  local = train(local_sgd(optax.sgd(0.3), sync_period=1), loss_fn, params, targets, context=context)
  synchronous = optax.chain(pmean_over("replica"), optax.sgd(0.3))
  want = train(synchronous, loss_fn, params, targets, context=context)
  np.testing.assert_allclose(local.params["w"], want.params["w"], atol=1e-6)


def test_period_one_with_adam_is_not_synchronous_adam(train):
  """Each replica's Adam sees only its own gradient: the average of its steps is another step."""
  params, targets = make_problem()
  local = train(local_sgd(optax.adam(0.3), sync_period=1), loss_fn, params, targets)
  synchronous = optax.chain(pmean_over("replica"), optax.adam(0.3))
  want = train(synchronous, loss_fn, params, targets)
  assert np.abs(local.params["w"] - want.params["w"]).max() > 0.05


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_round_ends_at_the_average(train, context):
  """Literally: train alone for H steps, average, repeat."""
  params, targets = make_problem()
  got = train(local_sgd(optax.sgd(0.3), sync_period=4), loss_fn, params, targets, context=context)
  theta = np.tile(np.asarray(params["w"], np.float64), (REPLICAS, 1))
  for step in range(STEPS):
    theta = theta - 0.3 * CURVATURE * (theta - targets[:, step])
    if step in (3, 7):
      theta = np.broadcast_to(theta.mean(0), theta.shape)
    np.testing.assert_allclose(got.params["w"][:, step], theta, atol=1e-6)


@pytest.mark.parametrize("context", CONTEXTS)
def test_any_mean_will_do(train, context):
  params, targets = make_problem()
  mean = compressed_mean("replica", e3m0(8), algorithm="all_gather")
  tx = local_sgd(optax.sgd(0.3), sync_period=4, mean=mean)
  got = train(tx, loss_fn, params, targets, context=context).params["w"]
  for step in (3, 7):
    np.testing.assert_array_equal(got[:, step], np.broadcast_to(got[0, step], got[:, step].shape))

  # Nearest E3M0 is off by at most a third of each replica's own move, or 2^-7 of its largest.
  start = np.asarray(params["w"])
  alone = train(optax.sgd(0.3), loss_fn, params, targets[:, :4]).params["w"][:, -1]
  moves = alone - start
  bound = np.maximum(np.abs(moves) / 3, 2.0**-7 * np.abs(moves).max(1, keepdims=True)).mean(0)
  error = np.abs(got[0, 3] - alone.mean(0))
  assert (error <= bound + 1e-6).all()
  assert error.max() > 1e-3  # it was compressed


def test_the_state_says_when_a_round_ended():
  tx = optax.chain(optax.clip(1.0), local_sgd(optax.sgd(0.3), sync_period=3))

  @jax.jit
  def roll_out(params):
    def step(carry, _):
      params, state = carry
      updates, state = tx.update(params, state, params)
      params = jaxcomm.apply_updates(params, updates, state)
      return (params, state), (jaxcomm.just_synced(state), jaxcomm.outer_params(state))

    return jax.lax.scan(step, (params, tx.init(params)), length=7)[1]

  start = jnp.stack([jnp.ones(2), jnp.full(2, 3.0)])
  synced, outer = jax.vmap(roll_out, axis_name="replica", out_axes=0)(start)
  assert synced[0].tolist() == [False, False, True, False, False, True, False]
  changed = (np.diff(np.asarray(outer), axis=1) != 0).any(-1)
  assert changed.tolist() == [[False, True, False, False, True, False]] * 2
  assert jaxcomm.just_synced(optax.adam(0.1).init(start)) is None
  assert jaxcomm.outer_params(optax.adam(0.1).init(start)) is None
