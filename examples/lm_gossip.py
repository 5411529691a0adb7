"""Flags of the methods of `train_lm.py` that average with neighbours, and their transforms."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import optax

import jaxcomm
from jaxcomm import collectives
from jaxcomm.training import RunConfig

if TYPE_CHECKING:
  from lm_methods import MethodConfig

GOSSIP = ("ad_psgd", "adagossip", "dfedsam", "noloco", "sgp")
GOSSIP_ROUNDS = ("dfedsam", "noloco")  # the others exchange in every step
# flag -> the methods that heed it
_HEEDED_BY = {
  "topology": ("ad_psgd", "adagossip", "dfedsam", "sgp"),
  "gossip_steps": ("dfedsam",),
  "sam_rho": ("dfedsam",),
  "consensus_lr": ("adagossip", "noloco"),
  "allow_idle": ("noloco",),
  "overlap": ("ddp", "sgp"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GossipConfig(RunConfig):
  """Flags of the methods in which no replica ever holds the mean of all."""

  # Replicas may become odd in number when one is lost.
  free_on_resume: ClassVar[frozenset[str]] = RunConfig.free_on_resume | {"allow_idle"}

  topology: Literal[
    "auto", "ring", "torus", "exponential", "one_peer_exponential", "complete", "random_matching"
  ] = "auto"
  """who averages with whom; auto: one_peer_exponential for sgp, random_matching for ad_psgd, ring
  for adagossip, exponential for dfedsam"""
  gossip_steps: int = 1
  """averages in a row at the end of a round of dfedsam; more than one is DFedSAM-MGS"""
  sam_rho: float = 0.05
  """radius in which dfedsam looks for the worst gradient, at the cost of a second one; 0: none"""
  consensus_lr: float | None = None
  """pull towards the neighbours, of noloco (default --outer-lr) and adagossip (default 1e-3)"""
  allow_idle: bool = False
  """noloco with an odd number of replicas: one, drawn anew in each round, steps alone"""
  overlap: bool = False
  """sgp: messages arrive one step later, and may travel while the gradient is computed; ddp: each
  layer's gradient is averaged within the backward pass, which goes on meanwhile"""


def check_gossip(config: "MethodConfig") -> None:
  """Raises ValueError where a flag of `GossipConfig` is outside its range, or has no effect."""
  if config.gossip_steps < 1:
    raise ValueError(f"`gossip_steps` must be at least 1, got {config.gossip_steps}.")
  if not 0 <= config.sam_rho < math.inf:
    raise ValueError(f"`sam_rho` must be finite and at least 0, got {config.sam_rho}.")
  if config.consensus_lr is not None and not 0 < config.consensus_lr < math.inf:
    raise ValueError(f"`consensus_lr` must be positive and finite, got {config.consensus_lr}.")
  for name, methods in _HEEDED_BY.items():
    value = getattr(config, name)
    if value != getattr(GossipConfig, name) and config.method not in methods:
      raise ValueError(f"`{name}` has no effect with method {config.method!r}, got {value!r}.")
  if config.method == "ad_psgd" and config.delay < 0:
    raise ValueError(f"`delay` must be at least 0 with method 'ad_psgd', got {config.delay}.")
  if config.topology == "torus":
    collectives.torus().phases(config.replicas)


def build_topology(config: "MethodConfig") -> collectives.Topology:
  """Who averages with whom."""
  defaults = {"ad_psgd": "random_matching", "adagossip": "ring", "sgp": "one_peer_exponential"}
  name = config.topology
  if name == "auto":
    name = defaults.get(config.method, "exponential")
  if name == "random_matching":  # the pairs of AD-PSGD are of an active and a passive replica
    bipartite = config.method == "ad_psgd" and config.replicas % 2 == 0
    return collectives.random_matching(config.seed, bipartite=bipartite)
  return getattr(collectives, name)()


def build_gossip(
  config: "MethodConfig", inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """The method of `GOSSIP` that the flags name, around the optimizer of each replica."""
  if config.method == "noloco":
    return jaxcomm.noloco(
      inner,
      sync_period=config.sync_period,
      outer_lr=config.outer_lr,
      outer_momentum=config.outer_momentum,
      consensus_lr=config.consensus_lr,
      seed=config.seed,
      allow_idle=config.allow_idle,
    )
  topology = build_topology(config)
  match config.method:
    case "sgp":
      return jaxcomm.sgp(inner, topology, overlap=config.overlap)
    case "ad_psgd":
      return jaxcomm.ad_psgd(inner, topology, delay=config.delay)
    case "adagossip":
      return jaxcomm.adagossip(inner, topology, consensus_lr=config.consensus_lr or 1e-3)
  return jaxcomm.dfedsam(
    inner, topology, sync_period=config.sync_period, gossip_steps=config.gossip_steps
  )


def num_gradients(config: "MethodConfig") -> int:
  """Gradients per step of a replica: a sharpness-aware one costs two."""
  return 2 if config.method == "dfedsam" and config.sam_rho else 1


def training_loss(config: "MethodConfig", loss: Callable[..., Any]) -> Callable[..., Any]:
  """`loss`, or for dfedsam one with its value and the sharpness-aware gradient."""
  if config.method != "dfedsam":
    return loss
  return jaxcomm.sam_loss(loss, config.sam_rho, has_aux=True)
