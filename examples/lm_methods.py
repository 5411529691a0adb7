"""Flags of the methods of `train_lm.py`, and the optax transform that they ask for."""

import dataclasses
import math
from typing import Any, Literal

import jax
import optax
from lm_clock import CLOCKED, ClockConfig, build_clocked, check_clock, clock_shares
from lm_gossip import GOSSIP, GOSSIP_ROUNDS, GossipConfig, build_gossip, check_gossip
from lm_means import build_compressor, build_mean, check_compressor, check_overlap

import jaxcomm
from jaxcomm.transforms import zero_one_adam_levels

MEAN_ROUNDS = ("co2", "diloco", "eager_diloco", "local_sgd", "slowmo")
ROUNDS = (*MEAN_ROUNDS, *GOSSIP_ROUNDS)
Method = Literal[
  "ddp", "diloco", "streaming_diloco", "eager_diloco", "local_sgd", "slowmo", "co2",
  "async_outer", "decoupled_diloco", "none", "noloco", "sgp", "ad_psgd", "adagossip", "dfedsam",
  "powersgd", "demo", "ef21", "one_bit_adam", "zero_one_adam", "sign_majority",
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig(GossipConfig, ClockConfig):
  """Flags that choose what crosses the slow link, and when."""

  method: Method = "diloco"
  """ddp: mean gradient every step; diloco, eager_diloco, local_sgd, slowmo, co2: a mean every
  --sync-period; streaming_diloco: one of --fragments at a time; decoupled_diloco and async_outer:
  replicas of unlike speed that do not wait for each other, on a simulated clock; none: never;
  noloco, dfedsam: an average with neighbours every --sync-period; sgp, ad_psgd, adagossip: every
  step; the others compress what ddp sends"""
  compressor: Literal[
    "auto", "none", "int8", "int4", "fp8", "e3m0", "natural", "qsgd", "sign", "top_k", "rand_k"
  ] = "auto"
  """what a mean sends; auto: int4 for diloco and eager_diloco, e3m0 for streaming_diloco, top_k for
  ef21, float32 otherwise"""
  rounding: Literal["nearest", "stochastic"] = "nearest"
  """of int8, int4, fp8 and e3m0"""
  keep_ratio: float = 0.01
  """share of the values that top_k and rand_k send"""
  error_feedback: bool = False
  """carry what compression lost into the next mean"""
  sync_period: int = 20
  """steps between two exchanges of the same parameters, of the methods with rounds"""
  fragments: int = 4
  """of the parameters, of which streaming_diloco sends one every sync_period / fragments steps"""
  delay: int = 1
  """steps from sending a fragment to merging it, and by which updates of ad_psgd are late"""
  alpha: float = 0.5
  """share of a replica's own parameters in that merge"""
  fragment_pattern: Literal["strided", "sequential"] = "strided"
  """layers of a fragment: every n-th of n fragments, or neighbours"""
  lr: float = 4e-3
  """peak learning rate"""
  outer_lr: float = 0.7
  """of the outer step of diloco, streaming_diloco, eager_diloco, slowmo, co2 and noloco"""
  outer_momentum: float = 0.6
  """its momentum, Nesterov's but for slowmo, co2 and noloco"""
  warmup: int | None = None
  """steps of linear warm-up, before a cosine down to a tenth; default 50, or half of a short run"""
  schedule_steps: int | None = None
  """length of the learning-rate schedule; default --steps"""
  weight_decay: float = 0.1
  """decoupled, of AdamW"""
  rank: int = 4
  """of the two factors that powersgd sends"""
  exact_steps: int | None = None
  """steps with float32 means before powersgd sends factors or one_bit_adam signs, or before
  zero_one_adam freezes its variances; default a fifth of the schedule"""
  demo_topk: int = 32
  """coefficients that demo sends of each chunk of 64 x 64"""
  demo_decay: float = 0.999
  """decay of what demo has not sent"""

  def __post_init__(self):
    super().__post_init__()
    counts = ("sync_period", "fragments", "schedule_steps", "rank", "exact_steps", "demo_topk")
    for name in counts:
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 <= self.weight_decay < math.inf:
      raise ValueError(f"`weight_decay` must be finite and at least 0, got {self.weight_decay}.")
    for name in ("lr", "outer_lr"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
    if self.warmup is not None and not 0 <= self.warmup < self.schedule_length:
      raise ValueError(
        f"`warmup` must be in [0, {self.schedule_length}), the length of the schedule, got"
        f" {self.warmup}."
      )
    for name in ("outer_momentum", "demo_decay"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
    if not 0 < self.keep_ratio <= 1:
      raise ValueError(f"`keep_ratio` must be in (0, 1], got {self.keep_ratio}.")
    check_overlap(self)
    takes = ("ddp", "ef21", "streaming_diloco", *MEAN_ROUNDS, *CLOCKED)
    check_compressor(self, takes=self.method in takes)
    check_gossip(self)
    check_clock(self)
    if self.method in ("streaming_diloco", "decoupled_diloco"):
      self._check_fragments()

  def _check_fragments(self):
    if self.sync_period % self.fragments:
      raise ValueError(
        f"`sync_period` must be a multiple of `fragments`, {self.fragments}, got"
        f" {self.sync_period}."
      )
    if self.method == "decoupled_diloco":  # merges at once, and wholly
      return
    if not 0 <= self.delay < self.sync_period // self.fragments:
      raise ValueError(
        f"`delay` must be in [0, {self.sync_period // self.fragments}), below sync_period /"
        f" fragments, got {self.delay}."
      )
    if not 0 <= self.alpha <= 1:
      raise ValueError(f"`alpha` must be in [0, 1], got {self.alpha}.")

  @property
  def compressor_name(self) -> str:
    """`compressor`, with "auto" resolved."""
    if self.compressor != "auto":
      return self.compressor
    defaults = {
      "diloco": "int4", "eager_diloco": "int4", "streaming_diloco": "e3m0", "ef21": "top_k"
    }  # fmt: skip
    return defaults.get(self.method, "none")

  @property
  def schedule_length(self) -> int:
    """Steps of the learning-rate schedule."""
    return self.schedule_steps or self.steps

  @property
  def num_exact_steps(self) -> int:
    """`exact_steps`, or its default."""
    return self.exact_steps or max(1, self.schedule_length // 5)

  @property
  def exchange_shares(self) -> tuple[float, ...]:
    """Share of the steps at each level of exchange, see `jaxcomm.transforms.exchange_level`."""
    if self.method in ROUNDS:
      return 1 - 1 / self.sync_period, 1 / self.sync_period
    if self.method == "streaming_diloco":  # level i sends fragment i
      share = 1 / self.sync_period
      return (1 - self.fragments * share, *[share] * self.fragments)
    if self.method in CLOCKED:
      return clock_shares(self)
    exact = self.num_exact_steps
    if self.method in ("powersgd", "one_bit_adam"):
      return 1 - min(exact, self.steps) / self.steps, min(exact, self.steps) / self.steps
    if self.method == "zero_one_adam":
      levels = zero_one_adam_levels(self.steps, var_freeze_step=exact)
      return tuple(level / self.steps for level in levels)
    return (1.0,)


def build_transform(
  config: MethodConfig,
  specs: Any,
  mesh: jax.sharding.Mesh,
  stacked: Any,
  clip: optax.GradientTransformation | None = None,
  *,
  averaged: bool = False,
) -> optax.GradientTransformation:
  """The optimizer: the method around, before or in place of AdamW.

  Args:
    config: the flags.
    specs: a `PartitionSpec` per parameter over the inner mesh axes.
    mesh: of the training step.
    stacked: per parameter, how many of its leading dimensions count layers.
    clip: of gradients; default by their norm, to 1.
    averaged: the gradients are means over `replica` already (`averaging_loss`): ddp takes none.
  """
  steps, clip = config.schedule_length, clip or optax.clip_by_global_norm(1.0)
  warmup = min(50, steps // 2) if config.warmup is None else config.warmup
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.lr, warmup, steps, end_value=0.1 * config.lr
  )
  decay = config.weight_decay
  inner = optax.chain(clip, optax.adamw(schedule, b2=0.95, weight_decay=decay))
  nesterov = optax.sgd(config.outer_lr, momentum=config.outer_momentum, nesterov=True)
  # Frozen variances must not be those of the last 20 steps only: rare tokens have none there.
  adam: dict[str, Any] = {"b2": 0.999, "weight_decay": decay, "specs": specs}
  if config.method in GOSSIP:
    return build_gossip(config, inner)
  if config.method in CLOCKED:
    return build_clocked(config, inner, build_mean(config, specs), nesterov, stacked)
  match config.method:
    case "none":
      return inner
    case "ddp":
      return inner if averaged else optax.chain(build_mean(config, specs), inner)
    case "local_sgd":
      mean = build_mean(config, specs)
      return jaxcomm.local_sgd(inner, sync_period=config.sync_period, mean=mean)
    case "diloco":
      outer = optax.chain(build_mean(config, specs), nesterov)
      return jaxcomm.diloco(inner, outer, sync_period=config.sync_period)
    case "streaming_diloco":
      return jaxcomm.streaming_diloco(
        inner,
        optax.chain(build_mean(config, specs), nesterov),
        sync_period=config.sync_period,
        fragments=config.fragments,
        delay=config.delay,
        alpha=config.alpha,
        pattern=config.fragment_pattern,
        stacked=stacked,
      )
    case "eager_diloco":
      mean = build_mean(config, specs)
      return jaxcomm.eager_diloco(inner, nesterov, sync_period=config.sync_period, mean=mean)
    case "slowmo" | "co2":
      method = jaxcomm.slowmo if config.method == "slowmo" else jaxcomm.co2
      return method(
        inner,
        sync_period=config.sync_period,
        outer_lr=config.outer_lr,
        outer_momentum=config.outer_momentum,
        inner_lr=schedule,
        mean=build_mean(config, specs),
      )
    case "powersgd":
      mean = jaxcomm.powersgd_mean(
        "replica",
        config.rank,
        start_step=config.num_exact_steps,
        stacked=stacked,
        specs=specs,
        mesh=mesh,
        seed=config.seed,
      )
      return optax.chain(mean, inner)
    case "ef21":
      mean = jaxcomm.ef21("replica", build_compressor(config), specs=specs, seed=config.seed)
      return optax.chain(mean, inner)
    case "one_bit_adam":
      exact = config.num_exact_steps
      return optax.chain(
        clip, jaxcomm.one_bit_adam(schedule, "replica", warmup_steps=exact, **adam)
      )
    case "zero_one_adam":
      exact = config.num_exact_steps
      method = jaxcomm.zero_one_adam(schedule, "replica", var_freeze_step=exact, **adam)
      return optax.chain(clip, method)
    case "sign_majority":
      return optax.chain(
        clip,
        optax.ema(0.9, debias=False),
        jaxcomm.sign_majority("replica", specs=specs),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(schedule),
      )
    case "demo":
      return jaxcomm.demo(
        schedule,
        "replica",
        compression_decay=config.demo_decay,
        compression_topk=config.demo_topk,
        weight_decay=decay,
        specs=specs,
      )
