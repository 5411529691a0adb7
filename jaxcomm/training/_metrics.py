"""What a step returns, as numbers on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.jit
def all_finite(params: Any) -> jax.Array:
  leaves = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.inexact)]
  return jnp.stack([jnp.isfinite(x).all() for x in leaves] or [jnp.array(True)]).all()


def on_host(metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
  """Per-replica metrics on every process; between processes one small all-gather."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(metrics, tiled=True)
  return {k: np.asarray(v) for k, v in metrics.items()}


def means(metrics: dict[str, jax.Array]) -> dict[str, float]:
  host = on_host({k: v for k, v in metrics.items() if k not in ("synced", "level")})
  return {k: float(v.astype(np.float64).mean()) for k, v in host.items()}
