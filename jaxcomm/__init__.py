"""Communication-efficient training for JAX: optax transforms, compressed collectives, a meter."""

from jaxcomm.collectives import quantized_pmean
from jaxcomm.compressors import e3m0, int4, int8
from jaxcomm.transforms import (
  apply_updates,
  co2,
  compressed_mean,
  demo,
  diloco,
  eager_diloco,
  ef21,
  error_feedback,
  just_synced,
  local_sgd,
  one_bit_adam,
  outer_params,
  pmean_over,
  powersgd_mean,
  sign_majority,
  slowmo,
  streaming_diloco,
  zero_one_adam,
)

__all__ = [
  "apply_updates",
  "co2",
  "compressed_mean",
  "demo",
  "diloco",
  "e3m0",
  "eager_diloco",
  "ef21",
  "error_feedback",
  "int4",
  "int8",
  "just_synced",
  "local_sgd",
  "one_bit_adam",
  "outer_params",
  "pmean_over",
  "powersgd_mean",
  "quantized_pmean",
  "sign_majority",
  "slowmo",
  "streaming_diloco",
  "zero_one_adam",
]
