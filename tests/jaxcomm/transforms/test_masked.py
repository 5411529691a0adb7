"""Methods on some of the parameters: `optax.masked` and `optax.partition`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import compressed_mean, diloco, int8, local_sgd

REPLICAS, STEPS = 4, 6
PARAMS = {"a": jnp.ones(3), "b": {"c": jnp.ones(2), "d": jnp.ones(2)}}
TARGETS = np.random.default_rng(2).normal(size=(REPLICAS, STEPS, 1)).astype(np.float32)


def loss_fn(params, target):
  return sum(jnp.sum((p - target) ** 2) for p in jax.tree.leaves(params))


def same_on_all(history, step):
  return bool((history[:, step] == history[:1, step]).all())


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_partition_of_two_periods(train, context):
  tx = optax.partition(
    {
      "often": local_sgd(optax.sgd(0.1), sync_period=2),
      "rarely": diloco(optax.sgd(0.1), sync_period=3),
    },
    {"a": "often", "b": "rarely"},
  )
  got = train(tx, loss_fn, PARAMS, TARGETS, context=context)
  for step in range(STEPS):
    assert same_on_all(got.params["a"], step) == (step % 2 == 1)
    assert same_on_all(got.params["b"]["c"], step) == (step % 3 == 2)

  alone = train(local_sgd(optax.sgd(0.1), sync_period=2), loss_fn, PARAMS, TARGETS)
  np.testing.assert_allclose(got.params["a"], alone.params["a"], atol=1e-6)
  outer = jaxcomm.outer_params(got.state.opt_state)
  assert jax.tree.structure(outer) == jax.tree.structure(PARAMS)
  jax.tree.map(lambda o, p: np.testing.assert_array_equal(o, p[0, -1]), outer, got.params)
  assert bool(jaxcomm.just_synced(got.state.opt_state))


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_masked_leaves_are_left_alone(train, context):
  """A mask may be a prefix of the tree. What it hides gets the plain updates."""
  tx = optax.chain(
    optax.masked(optax.sgd(0.1), {"a": False, "b": True}),
    optax.masked(local_sgd(optax.sgd(0.1), sync_period=2), {"a": True, "b": False}),
  )
  got = train(tx, loss_fn, PARAMS, TARGETS, context=context)
  alone = train(optax.sgd(0.1), loss_fn, PARAMS, TARGETS)
  np.testing.assert_array_equal(got.params["b"]["c"], alone.params["b"]["c"])
  assert [same_on_all(got.params["a"], s) for s in range(STEPS)] == [False, True] * 3
  outer = jaxcomm.outer_params(got.state.opt_state)
  assert outer["b"] == optax.MaskedNode()
  np.testing.assert_array_equal(outer["a"], got.params["a"][0, -1])


def test_a_compressed_mean_of_some_leaves(train):
  tx = optax.chain(
    optax.masked(compressed_mean("replica", int8(), error_feedback=True), {"a": True, "b": False}),
    optax.sgd(0.1),
  )
  got = train(tx, loss_fn, PARAMS, TARGETS, context="shard_map")
  assert got.layout.varying.params == {"a": False, "b": {"c": True, "d": True}}
  assert same_on_all(got.params["a"], -1)
  assert not same_on_all(got.params["b"]["d"], -1)
