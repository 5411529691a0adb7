"""Outer optimizers whose state is cut into parts give what whole ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import _axes, co2, diloco, pmean_over
from jaxcomm.inspect import collective_bytes
from jaxcomm.transforms import sharded_outer, suggest_sync_period

REPLICAS, STEPS = 4, 6
RNG = np.random.default_rng(5)
PARAMS = {
  "even": jnp.asarray(RNG.normal(size=(2, 8)), jnp.float32),
  "odd": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32),
  "few": jnp.asarray(RNG.normal(size=3), jnp.float32),
  "scalar": jnp.float32(0.5),
}
TARGETS = RNG.normal(size=(REPLICAS, STEPS, 1)).astype(np.float32)
PARTS = {"even": (2, 2), "odd": (2, 3), "few": (1,), "scalar": (1,)}


def loss_fn(params, target):
  return sum(jnp.sum((p - target[0]) ** 2) for p in jax.tree.leaves(params))


def assert_same(train, sharded, whole, context):
  sharded = train(sharded, loss_fn, PARAMS, TARGETS, context=context)
  whole = train(whole, loss_fn, PARAMS, TARGETS, context=context)
  for name in PARAMS:
    np.testing.assert_allclose(sharded.params[name], whole.params[name], atol=1e-6, err_msg=name)
  return sharded, whole


@pytest.mark.slow
@pytest.mark.parametrize("context", ["vmap", "shard_map"])
def test_co2_with_sharded_momentum_is_co2(train, context):
  options = {"sync_period": 2, "outer_momentum": 0.6, "clip_threshold": 0.3}
  sharded, whole = assert_same(
    train,
    co2(optax.sgd(0.1), **options, outer_shards=REPLICAS),
    co2(optax.sgd(0.1), **options),
    context,
  )
  parts = optax.tree.get(sharded.state.opt_state, "momentum")
  momentum = optax.tree.get(whole.state.opt_state, "momentum")
  for name, shape in PARTS.items():
    assert parts[name].shape == (REPLICAS, *shape)
    assert momentum[name].shape == PARAMS[name].shape
  np.testing.assert_allclose(np.concatenate(list(parts["odd"]))[:5], momentum["odd"], atol=1e-6)
  gaps = [float(optax.tree.get(run.state.opt_state, "gap")) for run in (sharded, whole)]
  assert gaps[0] == pytest.approx(gaps[1], rel=1e-5)
  assert gaps[0] > 1.05


@pytest.mark.slow
def test_diloco_with_a_sharded_nesterov_step_is_diloco(train):
  nesterov = optax.sgd(0.7, momentum=0.9, nesterov=True)
  outer = sharded_outer(nesterov, "replica", REPLICAS, skip_nonfinite=True)
  whole = optax.chain(pmean_over("replica"), nesterov)
  assert_same(
    train,
    diloco(optax.sgd(0.1), outer, sync_period=2),
    diloco(optax.sgd(0.1), whole, sync_period=2),
    "vmap",
  )


@pytest.mark.slow
def test_sends_a_reduce_scatter_and_an_all_gather():
  tx = sharded_outer(optax.sgd(1.0, momentum=0.5), "replica", REPLICAS)
  params = {"w": jnp.ones((24, 20)), "b": jnp.ones(33)}
  mesh = jax.make_mesh((REPLICAS,), ("replica",), devices=jax.devices()[:REPLICAS])

  def local(grads):
    state = _axes.vary(tx.init(grads), "replica")
    return tx.update(_axes.vary(grads, "replica"), state, grads)[0]

  fun = jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())
  report = collective_bytes(jax.jit(fun).lower(params).compile(), mesh)
  assert {op.kind for op in report.ops} == {"reduce-scatter", "all-gather"}
  assert report.total == 2 * (REPLICAS - 1) / REPLICAS * 4 * (24 * 20 + 36)


def test_rejects_bad_shards():
  sgd = optax.sgd(1.0)
  for bad in (0, 1.5, True):
    with pytest.raises(ValueError, match="`num_shards` must be an integer >= 1, got"):
      sharded_outer(sgd, "replica", bad)
  with pytest.raises(ValueError, match="`outer` must be an optax transform"):
    sharded_outer(1.0, "replica", 2)
  with pytest.raises(ValueError, match="`specs` must leave a dimension unsharded, got"):
    sharded_outer(sgd, "replica", 2, specs=jax.P("fsdp")).init(jnp.ones(4))
  tx = sharded_outer(sgd, "replica", 2)
  with pytest.raises(ValueError, match="`num_shards` must be the size of axis `replica`, 4, got 2"):
    jax.vmap(lambda g: tx.update(g, tx.init(g), g), axis_name="replica")(jnp.ones((4, 3)))


@pytest.mark.parametrize(
  ("step", "mean", "period"), [(1.0, 12.0, 12), (0.5, 0.6, 2), (3.0, 1.0, 1)]
)
def test_suggests_the_least_period_that_hides_the_mean(step, mean, period):
  assert suggest_sync_period(step, mean) == period


def test_rejects_times_that_are_none():
  with pytest.raises(ValueError, match="`step_seconds` must be a number > 0, got 0"):
    suggest_sync_period(0, 1.0)
  with pytest.raises(ValueError, match="`mean_seconds` must be a number > 0, got -1"):
    suggest_sync_period(1.0, -1)
