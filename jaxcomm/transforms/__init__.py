"""Communication-efficient optimizers as optax transforms, one method per file."""

from jaxcomm.transforms._local_updates import (
  LocalUpdatesState,
  apply_updates,
  just_synced,
  outer_params,
)
from jaxcomm.transforms.compressed_mean import CompressedMeanState, compressed_mean
from jaxcomm.transforms.demo import DemoState, demo, demo_bytes
from jaxcomm.transforms.diloco import diloco
from jaxcomm.transforms.ef21 import EF21State, ef21
from jaxcomm.transforms.error_feedback import error_feedback
from jaxcomm.transforms.fedzip import FedZipState, fedzip
from jaxcomm.transforms.local_sgd import local_sgd
from jaxcomm.transforms.one_bit_adam import OneBitAdamState, one_bit_adam
from jaxcomm.transforms.pmean_over import pmean_over
from jaxcomm.transforms.powersgd_mean import PowerSGDState, powersgd_bytes, powersgd_mean
from jaxcomm.transforms.sign_majority import (
  SignMajorityState,
  sign_majority,
  sign_majority_bytes,
)
from jaxcomm.transforms.zero_one_adam import ZeroOneAdamState, zero_one_adam

__all__ = [
  "CompressedMeanState",
  "DemoState",
  "EF21State",
  "FedZipState",
  "LocalUpdatesState",
  "OneBitAdamState",
  "PowerSGDState",
  "SignMajorityState",
  "ZeroOneAdamState",
  "apply_updates",
  "compressed_mean",
  "demo",
  "demo_bytes",
  "diloco",
  "ef21",
  "error_feedback",
  "fedzip",
  "just_synced",
  "local_sgd",
  "one_bit_adam",
  "outer_params",
  "pmean_over",
  "powersgd_bytes",
  "powersgd_mean",
  "sign_majority",
  "sign_majority_bytes",
  "zero_one_adam",
]
