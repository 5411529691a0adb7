"""Communication-efficient optimizers as optax transforms, one method per file."""

from jaxcomm.transforms._local_updates import (
  LocalUpdatesState,
  apply_updates,
  just_synced,
  outer_params,
)
from jaxcomm.transforms.compressed_mean import CompressedMeanState, compressed_mean
from jaxcomm.transforms.diloco import diloco
from jaxcomm.transforms.fedzip import FedZipState, fedzip
from jaxcomm.transforms.local_sgd import local_sgd
from jaxcomm.transforms.pmean_over import pmean_over

__all__ = [
  "CompressedMeanState",
  "FedZipState",
  "LocalUpdatesState",
  "apply_updates",
  "compressed_mean",
  "diloco",
  "fedzip",
  "just_synced",
  "local_sgd",
  "outer_params",
  "pmean_over",
]
