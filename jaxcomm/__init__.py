"""Communication-efficient training for JAX: optax transforms, compressed collectives, a meter."""

from jaxcomm.collectives import quantized_pmean
from jaxcomm.compressors import e3m0, int4, int8
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
  "e3m0",
  "int4",
  "int8",
  "just_synced",
  "local_sgd",
  "outer_params",
  "pmean_over",
  "quantized_pmean",
]
