"""DFedSAM against its loop in float64, its degenerate cases, and the sharpness-aware gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import dfedsam, local_sgd, sam_loss
from jaxcomm.collectives import complete, exponential, one_peer_exponential, ring

STEPS, SIZE, RATE, RHO = 6, 5, 0.3, 0.2
CURVATURE = np.linspace(0.2, 1.0, SIZE)


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def make_problem(num_replicas, seed=0):
  rng = np.random.default_rng(seed)
  targets = rng.normal(size=(num_replicas, STEPS, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


def paper_dfedsam(start, targets, topology, *, sync_period, gossip_steps):
  """DFedSAM-MGS, https://arxiv.org/abs/2302.04083: float64[R, T, d] of all replicas."""
  x = np.tile(start.astype(np.float64), (len(targets), 1))
  history, gossip = np.zeros(targets.shape), 0
  for t in range(STEPS):
    gradient = CURVATURE * (x - targets[:, t])
    ascent = RHO * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    x = x - RATE * CURVATURE * (x + ascent - targets[:, t])
    if (t + 1) % sync_period == 0:
      for _ in range(gossip_steps):
        x = topology.matrix(len(x), gossip) @ x
        gossip += 1
    history[:, t] = x
  return history


@pytest.mark.parametrize(
  ("context", "num_replicas", "topology", "gossip_steps"),
  [
    ("vmap", 4, one_peer_exponential(), 3),  # a round and a half per turn
    ("shard_map", 4, ring(), 2),
    pytest.param("vmap", 5, exponential(), 1, marks=pytest.mark.slow),
  ],
)
def test_follows_the_papers_loop(train, context, num_replicas, topology, gossip_steps):
  params, targets = make_problem(num_replicas)
  settings = {"sync_period": 2, "gossip_steps": gossip_steps}
  tx = dfedsam(optax.sgd(RATE), topology, **settings)
  got = train(tx, sam_loss(loss_fn, RHO), params, targets, context=context)
  want = paper_dfedsam(np.asarray(params["w"]), targets, topology, **settings)
  np.testing.assert_allclose(got.params["w"], want, atol=2e-6)
  before = np.concatenate([np.tile(params["w"], (num_replicas, 1, 1)), want[:, :-1]], 1)
  losses = 0.5 * (CURVATURE * (before - targets) ** 2).sum(-1)  # at x, not at the worst point
  np.testing.assert_allclose(got.loss, losses, rtol=1e-5)
  assert got.layout.varying.params == {"w": True}
  assert not jax.tree.leaves(got.state.opt_state.anchor)  # no second copy of the parameters
  assert bool(jaxcomm.just_synced(got.state.opt_state))


def test_gossip_with_everybody_is_local_sgd(train):
  params, targets = make_problem(4)
  inner = optax.adam(RATE)
  ours = train(dfedsam(inner, complete(), sync_period=2), loss_fn, params, targets)
  theirs = train(local_sgd(inner, sync_period=2), loss_fn, params, targets)
  np.testing.assert_allclose(ours.params["w"], theirs.params["w"], atol=1e-6)


def test_rejects_bad_arguments():
  for name, bad in (("sync_period", 0), ("gossip_steps", 0), ("gossip_steps", 1.5)):
    settings = {"sync_period": 2, name: bad}
    with pytest.raises(ValueError, match=f"`{name}` must be an integer >= 1.*got {bad}"):
      dfedsam(optax.sgd(0.1), ring(), **settings)
  with pytest.raises(ValueError, match="`topology` must be a topology such as"):
    dfedsam(optax.sgd(0.1), 4, sync_period=2)


# Of the sharpness-aware loss alone:


def pair_loss(params, curvature):
  x = jnp.concatenate([params["a"], params["b"]])
  return 0.5 * x @ (curvature @ x), {"first": x[0]}


def test_sam_on_a_quadratic_is_exact():
  """∇ = A (x + ρ Ax / |Ax|), one norm for all leaves; the value and aux are those at x."""
  rng = np.random.default_rng(0)
  root = rng.normal(size=(5, 5))
  curvature, x = (root @ root.T).astype(np.float32), rng.normal(size=5).astype(np.float32)
  grad_fn = jax.jit(jax.value_and_grad(sam_loss(pair_loss, 0.3, has_aux=True), has_aux=True))

  def sam(x):
    (value, aux), grads = grad_fn({"a": jnp.asarray(x[:2]), "b": jnp.asarray(x[2:])}, curvature)
    assert float(aux["first"]) == x[0]
    return float(value), np.concatenate([grads["a"], grads["b"]])

  value, grad = sam(x)
  plain = curvature.astype(np.float64) @ x
  worst = curvature.astype(np.float64) @ (x + 0.3 * plain / np.linalg.norm(plain))
  np.testing.assert_allclose(grad, worst, rtol=1e-4)
  np.testing.assert_allclose(value, 0.5 * x @ plain, rtol=1e-5)
  assert np.abs(worst - plain).max() > 0.1
  value, grad = sam(np.zeros(5, np.float32))  # no direction: no ascent
  assert value == 0
  np.testing.assert_array_equal(grad, 0)
  assert sam_loss(pair_loss, 0) is pair_loss


def test_the_norm_of_sam_spans_the_shards_of_a_replica():
  mesh = jax.make_mesh((2,), ("tensor",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  x = jnp.asarray([1.0, -2.0, 3.0, 0.5])

  def loss(x):
    return jnp.sum(x**4)

  def grads(norm_axes):
    fun = jax.grad(sam_loss(loss, 0.5, norm_axes=norm_axes))
    return jax.shard_map(fun, mesh=mesh, in_specs=jax.P("tensor"), out_specs=jax.P("tensor"))

  def all_of(x):
    return jax.grad(sam_loss(loss, 0.5))(x), grads(["tensor"])(x), grads([])(x)

  whole, sharded, wrong = jax.jit(all_of)(x)
  np.testing.assert_allclose(sharded, whole, rtol=1e-5)
  assert np.abs(wrong - whole).max() > 0.1


@pytest.mark.parametrize("bad", [-0.1, float("nan"), True])
def test_rejects_a_bad_radius(bad):
  with pytest.raises(ValueError, match="`rho` must be a number >= 0, got"):
    sam_loss(loss_fn, bad)
