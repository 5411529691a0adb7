"""Flags of the methods of `train_lm.py` that run on a simulated clock, and their transforms."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from jaxcomm.training import RunConfig
from jaxcomm.transforms import (
  ArrivalSchedule,
  QuorumSchedule,
  async_local_sgd,
  decoupled_diloco,
  delayed_nesterov,
  simulate_async,
  simulate_quorum,
)

if TYPE_CHECKING:
  from lm_methods import MethodConfig

CLOCKED = ("async_outer", "decoupled_diloco")
# flag -> the methods that heed it
_HEEDED_BY = {
  "step_seconds": CLOCKED,
  "quorum": ("decoupled_diloco",),
  "grace_seconds": ("decoupled_diloco",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClockConfig(RunConfig):
  """Flags of the methods whose replicas have speeds of their own; a step is a tick of the clock."""

  step_seconds: list[float] | None = None
  """seconds per step of each replica of async_outer and decoupled_diloco; default all the same"""
  quorum: int | None = None
  """replicas that a merge of decoupled_diloco needs; default more than half"""
  grace_seconds: float = 0.0
  """how long that merge then waits for the others"""


def check_clock(config: "MethodConfig") -> None:
  """Raises ValueError where a flag of `ClockConfig` is outside its range, or has no effect."""
  for name, methods in _HEEDED_BY.items():
    value = getattr(config, name)
    if value != getattr(ClockConfig, name) and config.method not in methods:
      raise ValueError(f"`{name}` has no effect with method {config.method!r}, got {value!r}.")
  seconds = config.step_seconds
  if seconds is not None and len(seconds) != config.replicas:
    raise ValueError(
      f"`step_seconds` must be given for each of {config.replicas} `replicas`, got {seconds}."
    )
  if seconds is not None and not all(0 < s < math.inf for s in seconds):
    raise ValueError(f"`step_seconds` must be positive and finite, got {seconds}.")
  if config.quorum is not None and not 1 <= config.quorum <= config.replicas:
    raise ValueError(
      f"`quorum` must be in [1, {config.replicas}], of the `replicas`, got {config.quorum}."
    )
  if not 0 <= config.grace_seconds < math.inf:
    raise ValueError(f"`grace_seconds` must be finite and at least 0, got {config.grace_seconds}.")


def quorum_schedule(config: "MethodConfig") -> QuorumSchedule:
  """Who works and what is merged in each step of decoupled_diloco."""
  return simulate_quorum(
    config.step_seconds or [1.0] * config.replicas,
    num_ticks=config.steps,
    sync_period=config.sync_period,
    num_fragments=config.fragments,
    quorum=config.quorum or config.replicas // 2 + 1,
    grace_seconds=config.grace_seconds,
  )


def arrival_schedule(config: "MethodConfig") -> ArrivalSchedule:
  """Who works and who arrives in each step of async_outer."""
  return simulate_async(
    config.step_seconds or [1.0] * config.replicas,
    num_ticks=config.steps,
    sync_period=config.sync_period,
  )


def clock_shares(config: "MethodConfig") -> tuple[float, ...]:
  """Share of the steps that send nothing, and that send each fragment or a pseudo-gradient."""
  if config.method == "decoupled_diloco":
    levels, num_levels = quorum_schedule(config).fragment, config.fragments + 1
  else:
    levels, num_levels = arrival_schedule(config).arrival > 0, 2
  counts = np.bincount(levels.astype(int), minlength=num_levels)
  return tuple((counts / config.steps).tolist())


def build_clocked(
  config: "MethodConfig",
  inner: optax.GradientTransformation,
  mean: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  stacked: Any,
) -> optax.GradientTransformation:
  """The method of `CLOCKED` that the flags name, around the optimizer of each replica."""
  if config.method == "decoupled_diloco":
    return decoupled_diloco(
      inner,
      optax.chain(mean, outer),
      schedule=quorum_schedule(config),
      fragments=config.fragments,
      pattern=config.fragment_pattern,
      stacked=stacked,
    )
  server = delayed_nesterov(config.outer_lr, config.outer_momentum, num_workers=config.replicas)
  return async_local_sgd(inner, server, schedule=arrival_schedule(config), mean=mean)
