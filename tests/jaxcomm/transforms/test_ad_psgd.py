"""AD-PSGD in lock step against its loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import ad_psgd
from jaxcomm.collectives import random_matching

N, STEPS, SIZE, RATE = 4, 7, 5, 0.3
CURVATURE = np.linspace(0.2, 1.0, SIZE)


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def paper_ad_psgd(start, targets, delay):
  """AD-PSGD, https://arxiv.org/abs/1710.06952, all replicas equally late: float64[R, T, d]."""
  pairs = random_matching(bipartite=True)
  x = np.tile(start.astype(np.float64), (N, 1))
  history, late = np.zeros(targets.shape), [np.zeros_like(x)] * delay
  for t in range(STEPS):
    late.append(CURVATURE * (x - targets[:, t]))
    partner = list(pairs.phases(N)[int(pairs.phase(t, N))][0])
    assert all((i + j) % 2 for i, j in enumerate(partner))  # an active one and a passive one
    x = (x + x[partner]) / 2 - RATE * late.pop(0)
    history[:, t] = x
  return history


@pytest.mark.parametrize(
  ("context", "delay"),
  [("vmap", 2), pytest.param("shard_map", 0, marks=pytest.mark.slow)],
)
def test_follows_the_papers_loop(train, context, delay):
  rng = np.random.default_rng(0)
  targets = rng.normal(size=(N, STEPS, SIZE)).astype(np.float32)
  params = {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}
  got = train(ad_psgd(optax.sgd(RATE), delay=delay), loss_fn, params, targets, context=context)
  want = paper_ad_psgd(np.asarray(params["w"]), targets, delay)
  np.testing.assert_allclose(got.params["w"], want, atol=2e-6)
  assert jax.tree.leaves(got.layout.varying.opt_state.pending) == [True] * delay


def test_rejects_bad_arguments():
  for bad in (-1, 0.5):
    with pytest.raises(ValueError, match=f"`delay` must be an integer >= 0, got {bad}"):
      ad_psgd(optax.sgd(0.1), delay=bad)
  tx, p = ad_psgd(optax.sgd(0.1)), jnp.zeros((3, 2))
  with pytest.raises(ValueError, match="`bipartite` needs an even number of replicas, got 3"):
    jax.eval_shape(jax.vmap(lambda p: tx.update(p, tx.init(p), p), axis_name="replica"), p)
