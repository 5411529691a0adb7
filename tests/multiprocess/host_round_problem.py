"""What the hosts of `host_round_worker.py` train, and the test beside it in one process."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm.transforms import HostMean, HostRound, co2_outer

HOSTS, ROUNDS, PERIOD, SIZE = 2, 4, 3, 50
OPTIONS = {"sync_period": PERIOD, "outer_momentum": 0.6}
INNER = optax.adam(0.1)
_RNG = np.random.default_rng(8)
BATCHES = _RNG.normal(size=(HOSTS, ROUNDS, PERIOD, SIZE)).astype(np.float32)
PARAMS = _RNG.normal(size=SIZE).astype(np.float32)


def loss_fn(params, target):
  return jnp.sum(jnp.sin(params - target) ** 2)


def run_host(index: int, mean: Callable[[Any], Any]) -> np.ndarray:
  """Parameters of host `index` after each round, float32[ROUNDS, SIZE]."""
  outer = co2_outer(**OPTIONS, mean=optax.identity())
  run_round = HostRound(
    jax.value_and_grad(loss_fn), INNER, outer, HostMean(mean), sync_period=PERIOD
  )
  params, state, history = jnp.asarray(PARAMS), run_round.init(PARAMS), []
  for batches in BATCHES[index]:
    params, state, _ = run_round(params, state, batches, timeout=120)
    history.append(np.asarray(params))
  return np.stack(history)
