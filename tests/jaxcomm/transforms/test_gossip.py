"""What all methods share that average with neighbours: the dead, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import ad_psgd, adagossip, dfedsam, noloco, sgp
from jaxcomm.collectives import exponential, random_matching, ring

MASKED = {
  "noloco": noloco(optax.sgd(0.1), sync_period=1),
  "dfedsam": dfedsam(optax.sgd(0.1), ring(), sync_period=1, gossip_steps=3),
  "sgp": sgp(optax.sgd(0.1), exponential()),
  "sgp_overlap": sgp(optax.sgd(0.1), exponential(), overlap=True),
  "ad_psgd": ad_psgd(optax.sgd(0.1)),
  "adagossip": adagossip(optax.sgd(0.1), ring(), consensus_lr=0.01),
}


def test_the_dead_reach_nobody():
  """Replica 2 is dead and holds NaN; nobody waits for it, and the others still meet."""

  def two_steps(start, alive):
    def train(tx):
      p, state = start, tx.init(start)
      for _ in range(2):
        updates, state = tx.update(p, state, p, alive=alive)
        p = optax.apply_updates(p, updates)
      return p

    return {name: train(tx) for name, tx in MASKED.items()}

  fun = jax.jit(jax.vmap(two_steps, in_axes=(0, None), axis_name="replica"))
  start = np.asarray([[1.0, -3.0], [2.0, 0.5], [np.nan, np.nan], [4.0, 1.5]], np.float32)
  got = jax.tree.map(np.asarray, fun(start, np.asarray([True, True, False, True])))
  rest = [0, 1, 3]
  for name, p in got.items():
    assert np.isnan(p[2]).all(), name
    assert np.isfinite(p[rest]).all(), name
    alone = start[rest] * np.float32(0.9) ** 2  # had nobody met
    assert np.abs(p[rest] - alone).max() > 0.01, name


def traced(tx, size=4, dtype=jnp.float32, give_params=True, **extra):
  def update(p):
    return tx.update(p, tx.init(p), p if give_params else None, **extra)

  jax.eval_shape(jax.vmap(update, axis_name="replica"), jnp.zeros((size, 3), dtype))


def test_rejects_bad_input():
  alive = jnp.ones(4, bool)
  for tx in MASKED.values():
    with pytest.raises(ValueError, match=r"`alive` must be bool\[4\].*got bool\(3,\)"):
      traced(tx, alive=alive[:3])
    with pytest.raises(ValueError, match="`params` must be given to update"):
      traced(tx, give_params=False)
    with pytest.raises(ValueError, match="`params` must be floating-point arrays, got int32"):
      traced(tx, dtype=jnp.int32)
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
  for tx in (
    dfedsam(optax.sgd(0.1), exponential(), sync_period=1),
    ad_psgd(optax.sgd(0.1), exponential()),
    adagossip(optax.sgd(0.1), exponential(), consensus_lr=0.1),
  ):
    with pytest.raises(ValueError, match="`alive` needs a symmetric `topology`, got Exponential"):
      traced(tx, alive=alive)
  traced(sgp(optax.sgd(0.1), random_matching()), size=5, alive=jnp.ones(5, bool))
