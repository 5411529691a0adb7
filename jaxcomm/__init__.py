"""Communication-efficient training for JAX: optax transforms, compressed collectives, a meter."""

from jaxcomm.transforms import (
  apply_updates,
  compressed_mean,
  diloco,
  just_synced,
  local_sgd,
  outer_params,
  pmean_over,
)

__all__ = [
  "apply_updates",
  "compressed_mean",
  "diloco",
  "just_synced",
  "local_sgd",
  "outer_params",
  "pmean_over",
]
