"""Communication-efficient optimizers as optax transforms, one method per file."""

from jaxcomm.transforms._clock import (
  Arrival,
  ArrivalSchedule,
  QuorumSchedule,
  simulate_arrivals,
  simulate_async,
  simulate_quorum,
)
from jaxcomm.transforms._fragments import FragmentsState, fragment_labels
from jaxcomm.transforms._local_updates import (
  LocalUpdatesState,
  apply_updates,
  exchange_level,
  just_synced,
  outer_params,
)
from jaxcomm.transforms._masha import MashaState, draw_refresh, masha_bytes
from jaxcomm.transforms._slow_momentum import SlowMomentumState
from jaxcomm.transforms.ad_psgd import ADPSGDState, ad_psgd
from jaxcomm.transforms.adagossip import AdaGossipState, adagossip
from jaxcomm.transforms.async_local_sgd import AsyncLocalSgdState, async_local_sgd
from jaxcomm.transforms.async_outer import (
  DelayedNesterovState,
  async_outer,
  delayed_nesterov,
)
from jaxcomm.transforms.co2 import co2, co2_outer, staleness_gap, suggest_sync_period
from jaxcomm.transforms.compressed_mean import CompressedMeanState, compressed_mean
from jaxcomm.transforms.decoupled_diloco import decoupled_diloco
from jaxcomm.transforms.delayed import DelayedState, delayed
from jaxcomm.transforms.demo import DemoState, demo, demo_bytes
from jaxcomm.transforms.dfedsam import dfedsam
from jaxcomm.transforms.diloco import diloco
from jaxcomm.transforms.eager_diloco import EagerMeanState, eager_diloco
from jaxcomm.transforms.ef21 import EF21State, ef21
from jaxcomm.transforms.error_feedback import error_feedback
from jaxcomm.transforms.extragradient import (
  ExtragradientState,
  ExtragradientTransformation,
  extragradient,
)
from jaxcomm.transforms.fedzip import FedZipState, fedzip
from jaxcomm.transforms.healthy_mean import HealthyMeanState, healthy_mean
from jaxcomm.transforms.host_mean import HostMean, ProcessMean
from jaxcomm.transforms.host_round import HostRound
from jaxcomm.transforms.local_sgd import local_sgd
from jaxcomm.transforms.masha1 import masha1
from jaxcomm.transforms.masha2 import masha2
from jaxcomm.transforms.masha_step import masha_step
from jaxcomm.transforms.noloco import noloco, noloco_stability_bound
from jaxcomm.transforms.one_bit_adam import OneBitAdamState, one_bit_adam
from jaxcomm.transforms.overlapped_round import overlapped_round
from jaxcomm.transforms.pmean_over import pmean_over
from jaxcomm.transforms.powersgd_mean import PowerSGDState, powersgd_bytes, powersgd_mean
from jaxcomm.transforms.saddle import check_monotone, gap_bilinear, saddle_operator
from jaxcomm.transforms.sam_loss import sam_loss
from jaxcomm.transforms.sgp import SGPState, sgp
from jaxcomm.transforms.sharded_outer import ShardedOuterState, sharded_outer
from jaxcomm.transforms.sign_majority import (
  SignMajorityState,
  sign_majority,
  sign_majority_bytes,
)
from jaxcomm.transforms.slowmo import slowmo
from jaxcomm.transforms.streaming_diloco import streaming_diloco
from jaxcomm.transforms.zero_one_adam import (
  ZeroOneAdamState,
  zero_one_adam,
  zero_one_adam_levels,
)

__all__ = [
  "ADPSGDState",
  "AdaGossipState",
  "Arrival",
  "ArrivalSchedule",
  "AsyncLocalSgdState",
  "CompressedMeanState",
  "DelayedNesterovState",
  "DelayedState",
  "DemoState",
  "EF21State",
  "EagerMeanState",
  "ExtragradientState",
  "ExtragradientTransformation",
  "FedZipState",
  "FragmentsState",
  "HealthyMeanState",
  "HostMean",
  "HostRound",
  "LocalUpdatesState",
  "MashaState",
  "OneBitAdamState",
  "PowerSGDState",
  "ProcessMean",
  "QuorumSchedule",
  "SGPState",
  "ShardedOuterState",
  "SignMajorityState",
  "SlowMomentumState",
  "ZeroOneAdamState",
  "ad_psgd",
  "adagossip",
  "apply_updates",
  "async_local_sgd",
  "async_outer",
  "check_monotone",
  "co2",
  "co2_outer",
  "compressed_mean",
  "decoupled_diloco",
  "delayed",
  "delayed_nesterov",
  "demo",
  "demo_bytes",
  "dfedsam",
  "diloco",
  "draw_refresh",
  "eager_diloco",
  "ef21",
  "error_feedback",
  "exchange_level",
  "extragradient",
  "fedzip",
  "fragment_labels",
  "gap_bilinear",
  "healthy_mean",
  "just_synced",
  "local_sgd",
  "masha1",
  "masha2",
  "masha_bytes",
  "masha_step",
  "noloco",
  "noloco_stability_bound",
  "one_bit_adam",
  "outer_params",
  "overlapped_round",
  "pmean_over",
  "powersgd_bytes",
  "powersgd_mean",
  "saddle_operator",
  "sam_loss",
  "sgp",
  "sharded_outer",
  "sign_majority",
  "sign_majority_bytes",
  "simulate_arrivals",
  "simulate_async",
  "simulate_quorum",
  "slowmo",
  "staleness_gap",
  "streaming_diloco",
  "suggest_sync_period",
  "zero_one_adam",
  "zero_one_adam_levels",
]
