"""AdaGossip against its loop in float64."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import adagossip
from jaxcomm.collectives import ring

N, STEPS, SIZE, RATE = 5, 7, 4, 0.3
SETTINGS = {"consensus_lr": 0.05, "b2": 0.9, "eps": 1e-3}


def loss_fn(params, target):
  return 0.5 * jnp.sum((params["w"] - target) ** 2)


def paper_adagossip(start, targets, *, consensus_lr, b2, eps):
  """AdaGossip, https://arxiv.org/abs/2404.05919, with uncompressed messages: float64[R, T, d]."""
  x = np.tile(start.astype(np.float64), (N, 1))
  v, history = np.zeros_like(x), np.zeros(targets.shape)
  for t in range(STEPS):
    x = x - RATE * (x - targets[:, t])
    error = ring().matrix(N) @ x - x
    v = b2 * v + (1 - b2) * error**2
    x = x + consensus_lr * error / (np.sqrt(v) + eps)
    history[:, t] = x
  return history


@pytest.mark.parametrize("context", ["vmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_follows_the_papers_loop(train, context):
  rng = np.random.default_rng(0)
  targets = rng.normal(size=(N, STEPS, SIZE)).astype(np.float32)
  params = {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}
  tx = adagossip(optax.sgd(RATE), ring(), **SETTINGS)
  got = train(tx, loss_fn, params, targets, context=context)
  want = paper_adagossip(np.asarray(params["w"]), targets, **SETTINGS)
  np.testing.assert_allclose(got.params["w"], want, atol=5e-6)
  assert got.layout.varying.opt_state.nu == {"w": True}


def test_rejects_bad_arguments():
  for name, bad in (("consensus_lr", 0.0), ("eps", 0.0), ("b2", 1.0)):
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got {bad}"):
      adagossip(optax.sgd(0.1), ring(), **{"consensus_lr": 0.1, name: bad})
