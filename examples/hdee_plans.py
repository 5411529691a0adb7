"""What `train_hdee.py` trains: sizes, plans at equal compute, the step that all experts share."""

import dataclasses
import math
import pathlib
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxcomm
from jaxcomm.training import RunConfig, TrainStep
from models import hdee, llama

GROUPS = ("easy", "medium", "hard")
SIZES: dict[str, str] = dict(zip(GROUPS, "SML"))  # of the regime "sizes"
EVERY = "*"  # in place of a domain: all of them
Group = Literal["easy", "medium", "hard"]
Regime = Literal["homogeneous", "steps", "sizes", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(RunConfig):
  """Flags that decide which experts there are and what they cost."""

  free_on_resume = RunConfig.free_on_resume - {"steps"}  # the experts' lengths follow from it

  domains: list[str] = dataclasses.field(
    default_factory=lambda: ["sympy-tests", "sympy-modules", "sympy-docstrings", "scipy-docstrings"]
  )
  """an expert for each: names, files, folders, globs or hf: sets, as train_lm.py's --data"""
  groups: list[Group] = dataclasses.field(
    default_factory=lambda: ["easy", "medium", "medium", "hard"]
  )
  """difficulty of each of them"""
  regimes: list[Regime] = dataclasses.field(
    default_factory=lambda: ["homogeneous", "steps", "sizes", "dense"]
  )
  """homogeneous: experts of one size and length; steps: harder domains train longer; sizes: they
  have larger experts; dense: one model of all domains. All at equal compute"""
  preset: Literal["nano", "tiny", "small"] = "nano"
  """size of a medium expert"""
  vocab_size: int | None = None
  """of the tokenizer, trained on all domains; default the preset's"""
  batch_size: int = 16
  """sequences per step"""
  seq_len: int = 64
  """tokens per sequence"""
  replicas: int = 1
  """replicas that share each expert's batch; experts exchange nothing"""
  steps: int = 100
  """steps of an expert in the homogeneous regime; sets the compute of all"""
  seed_steps: int = 100
  """steps of the seed model of each size, on all domains"""
  step_ratios: list[float] = dataclasses.field(default_factory=lambda: [0.75, 1.0, 1.25])
  """steps of easy, medium and hard experts relative to each other, in the regime steps"""
  size_ratios: list[float] = dataclasses.field(default_factory=lambda: [0.8, 1.0, 1.2])
  """FLOPs per token of easy, medium and hard experts relative to the preset, in the regime sizes"""
  branch_from: Literal["seed", "group"] = "seed"
  """parent of an expert: the seed model, or the expert before it in its group, if any"""
  parents: str | None = None
  """run folder with the seed models; default: they are trained"""
  seed_lr: float = 8e-3
  """peak learning rate of seed models"""
  lr: float = 4e-3
  """peak learning rate of experts and of the dense model"""
  schedule: Literal["per_expert", "shared"] = "per_expert"
  """cosine to a tenth: over each expert's own steps, or one for all, longer than any"""

  def __post_init__(self):
    super().__post_init__()
    if not self.domains or len(self.groups) != len(self.domains):
      raise ValueError(
        f"`groups` must be given for each of {len(self.domains)} `domains`, at least one, got"
        f" {len(self.groups)}."
      )
    names = [domain_name(d) for d in self.domains]
    if len(set(names)) < len(names):
      raise ValueError(f"`domains` must have folder names that differ, got {names}.")
    if not self.regimes or len(set(self.regimes)) < len(self.regimes):
      raise ValueError(f"`regimes` must be different ones, at least one, got {self.regimes}.")
    for name in ("batch_size", "seq_len", "seed_steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    for name in ("step_ratios", "size_ratios"):
      ratios = getattr(self, name)
      if len(ratios) != len(GROUPS) or not all(0 < r < math.inf for r in ratios):
        raise ValueError(f"`{name}` must be a positive number for each of {GROUPS}, got {ratios}.")
    for name in ("seed_lr", "lr"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {getattr(self, name)}.")
    if self.stages * self.seq_shards * self.tensor != 1:
      got = f"{self.stages}, {self.seq_shards} and {self.tensor}"
      raise ValueError(f"`stages`, `seq_shards` and `tensor` must be 1 for experts, got {got}.")
    if self.batch_size % self.row_shards:
      raise ValueError(
        f"`batch_size` must be divisible by replicas * data_parallel * fsdp, got {self.batch_size}."
      )
    if self.parents is not None and not (pathlib.Path(self.parents) / "experts.json").exists():
      raise ValueError(f"`parents` must be a run folder of this script, got {self.parents!r}.")


def domain_name(source: str) -> str:
  """Of the domain `source`, fit for a folder.

  Example:
    >>> domain_name("texts/law *.txt")
    'law_.txt'
  """
  return re.sub(r"[^\w.-]+", "_", pathlib.Path(source).name or source)


def sizes(config: PlanConfig) -> dict[str, llama.LlamaConfig]:
  """The model of every size that a regime asks for."""
  medium = getattr(llama, config.preset)()
  if config.vocab_size is not None:
    medium = dataclasses.replace(medium, vocab_size=config.vocab_size)
  found = {"M": medium}
  if "sizes" in config.regimes:
    ratios = dict(zip(GROUPS, config.size_ratios))
    for group in sorted(set(config.groups)):
      found[SIZES[group]] = hdee.resize(medium, ratios[group], config.seq_len)
  return found


def flops_per_step(config: PlanConfig, model: llama.LlamaConfig) -> float:
  """Forward and backward, over all replicas."""
  return config.batch_size * config.seq_len * llama.flops_per_token(model, config.seq_len)


def seed_name(config: PlanConfig, size: str) -> str:
  """Of the model that experts of `size` branch from."""
  return f"seed-{size}-{config.seed_steps}"


def seeds(config: PlanConfig) -> list[hdee.Plan]:
  """The seed model of each size."""
  return [
    hdee.Plan(
      name=seed_name(config, size),
      domain=EVERY,
      group="medium",
      steps=config.seed_steps,
      flops_per_step=flops_per_step(config, model),
      parent="",
    )
    for size, model in sizes(config).items()
  ]


def plan(config: PlanConfig, regime: Regime) -> list[hdee.Plan]:
  """The experts of a regime; one that two regimes share has the same name in both."""
  models = sizes(config)
  cost = flops_per_step(config, models["M"])
  total = len(config.domains) * config.steps * cost
  if regime == "dense":
    steps = len(config.domains) * config.steps
    return [
      hdee.Plan(
        name=f"dense-M-{steps}",
        domain=EVERY,
        group="medium",
        steps=steps,
        flops_per_step=cost,
        parent=seed_name(config, "M"),
      )
    ]
  letters: dict[str, str] = SIZES if regime == "sizes" else dict.fromkeys(SIZES, "M")
  plans = hdee.equal_budget(
    dict(zip(map(domain_name, config.domains), config.groups)),
    total_flops=total,
    flops_per_step={g: flops_per_step(config, models[letters[g]]) for g in set(config.groups)},
    step_ratio=dict(zip(GROUPS, config.step_ratios)) if regime == "steps" else None,
  )
  latest: dict[str, str] = {}
  named = []
  for p in plans:
    size = letters[p.group]
    name = f"{p.domain}-{size}-{p.steps}"
    named.append(
      dataclasses.replace(p, name=name, parent=latest.get(p.group, seed_name(config, size)))
    )
    if config.branch_from == "group":
      latest[p.group] = name
  return named


def size_of(p: hdee.Plan) -> str:
  """S, M or L, as its name says."""
  return p.name.rsplit("-", 2)[1]


def schedule_length(config: PlanConfig, p: hdee.Plan) -> int:
  """Steps from the start of its warm-up to the end of its cosine."""
  if config.schedule == "per_expert":
    return p.steps
  experts = len(config.domains) if p.domain == EVERY else 1
  return round(1.2 * max(1.0, *config.step_ratios) * config.steps * experts)


class WarmupCosineState(NamedTuple):
  """count, warmup, length: int32[]; peak: float32[]. Equal on all replicas."""

  count: jax.Array
  warmup: jax.Array
  length: jax.Array
  peak: jax.Array


def scale_by_warmup_cosine() -> optax.GradientTransformation:
  """Linear warm-up, then a cosine to a tenth; both are part of the state.

  Experts of one size then share one compiled step, whatever their lengths. `start_at` sets them.
  """

  def init_fn(params):
    del params
    count, warmup, length = (jnp.zeros((), jnp.int32) for _ in range(3))
    return WarmupCosineState(count, warmup, length, peak=jnp.zeros(()))

  def update_fn(updates, state, params=None):
    del params
    warm = jnp.minimum(1.0, (state.count + 1) / jnp.maximum(state.warmup, 1))
    after = (state.count - state.warmup) / jnp.maximum(state.length - state.warmup, 1)
    cosine = 0.55 + 0.45 * jnp.cos(jnp.pi * jnp.clip(after, 0.0, 1.0))
    rate = state.peak * warm * cosine
    updates = jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates)
    return updates, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(init_fn, update_fn)


def optimizer() -> optax.GradientTransformation:
  """AdamW on the mean gradient of the replicas of one expert."""
  return optax.chain(
    jaxcomm.pmean_over("replica"),
    optax.clip_by_global_norm(1.0),
    optax.scale_by_adam(b2=0.95),
    optax.add_decayed_weights(0.1),
    scale_by_warmup_cosine(),
  )


def start_at(train_step: TrainStep, *, peak: float, warmup: int, length: int) -> TrainStep:
  """`train_step` whose runs start with this schedule."""

  def init(key: jax.Array) -> Any:
    state = train_step.init(key)
    values = {"peak": peak, "warmup": warmup, "length": length}
    placed = {}
    for name, value in values.items():
      old = optax.tree.get(state.opt_state, name)
      placed[name] = jax.device_put(jnp.asarray(value, old.dtype), old.sharding)
    return state.replace(opt_state=optax.tree.set(state.opt_state, **placed))

  return dataclasses.replace(train_step, init=init)
