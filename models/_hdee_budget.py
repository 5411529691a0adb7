"""Equal compute for experts of unequal size or length. Import the names from `models.hdee`."""

import dataclasses
import math
from collections.abc import Mapping

from models import llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """One expert to train.

  Raises:
    ValueError: a number is not positive.
  """

  name: str  # unique, names its folder
  domain: str
  group: str  # of difficulty, decides size and steps
  steps: int
  flops_per_step: float  # forward and backward, over all replicas
  parent: str = "seed"  # of whose parameters it branches

  def __post_init__(self):
    for name in ("steps", "flops_per_step"):
      if not getattr(self, name) > 0:
        raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

  @property
  def flops(self) -> float:
    """Of its training, without its parent's."""
    return self.steps * self.flops_per_step


def equal_budget(
  groups: Mapping[str, str],
  *,
  total_flops: float,
  flops_per_step: Mapping[str, float],
  step_ratio: Mapping[str, float] | None = None,
) -> list[Plan]:
  r"""Steps for an expert per domain that together cost `total_flops`.

  With :math:`g` the group of domain :math:`d`, :math:`r_g` its ratio, :math:`f_g` the FLOPs of a
  step: :math:`n_d = r_g F / \sum_{d'} r_{g'} f_{g'}`, rounded. HDEE (arXiv 2502.19385) §3.2: with
  equal sizes and ratios, its homogeneous experts; with other ratios, M_Ho-I_He; with other sizes,
  M_He-I_Ho.

  Args:
    groups: the group of each domain, such as "easy".
    total_flops: to spend on all experts, without what their parents cost.
    flops_per_step: of a model of each group, `tokens * llama.flops_per_token(...)`.
    step_ratio: steps of each group relative to the others'; default 1.

  Returns:
    A `Plan` per domain, named after it, in the order of `groups`.

  Raises:
    ValueError: there is no domain, a group lacks its size or ratio, a number is not positive, or
      rounding to whole steps misses the budget by more than 1 %.

  Example:
    >>> plans = equal_budget(
    ...   {"tests": "easy", "prose": "hard"},
    ...   total_flops=8e9,
    ...   flops_per_step={"easy": 1e7, "hard": 1e7},
    ...   step_ratio={"easy": 3, "hard": 5},
    ... )
    >>> [(p.name, p.steps) for p in plans]
    [('tests', 300), ('prose', 500)]
  """
  if not groups:
    raise ValueError("`groups` must name at least one domain, got none.")
  ratio = dict.fromkeys(groups.values(), 1.0) if step_ratio is None else step_ratio
  for name, values in (("flops_per_step", flops_per_step), ("step_ratio", ratio)):
    for group in groups.values():
      if not 0 < values.get(group, 0) < math.inf:
        raise ValueError(
          f"`{name}` must be positive for the group {group!r}, got {values.get(group)}."
        )
  unit = total_flops / sum(ratio[g] * flops_per_step[g] for g in groups.values())
  plans = [
    Plan(
      name=domain,
      domain=domain,
      group=group,
      steps=max(1, round(unit * ratio[group])),
      flops_per_step=flops_per_step[group],
    )
    for domain, group in groups.items()
  ]
  spent = sum(p.flops for p in plans)
  if abs(spent / total_flops - 1) > 0.01:
    raise ValueError(
      f"`total_flops` must be met within 1 % by whole steps, got {total_flops:.4g}, of which"
      f" {[p.steps for p in plans]} steps make {spent:.4g}: give more."
    )
  return plans


def resize(cfg: llama.LlamaConfig, ratio: float, seq_len: int) -> llama.LlamaConfig:
  """`cfg` with another feed-forward width, such that a step costs `ratio` times as much.

  HDEE's sizes differ in nothing else: 2304, 3072 and 3840 at width 768. Exact within half a column
  of the layers.

  Args:
    cfg: the size to change.
    ratio: of the FLOPs per token.
    seq_len: tokens per sequence, for the cost of attention.

  Raises:
    ValueError: what is not feed-forward alone costs more.

  Example:
    >>> small = resize(llama.nano(), 0.8, 64)
    >>> small.intermediate_size, llama.nano().intermediate_size
    (119, 192)
  """
  whole = llama.flops_per_token(cfg, seq_len)
  column = 6.0 * cfg.num_layers * (3 * cfg.hidden_size + 2 * cfg.mlp_bias)
  width = round(cfg.intermediate_size + (ratio - 1) * whole / column)
  if not ratio > 0 or width < 1:
    least = 1 - (cfg.intermediate_size - 1) * column / whole
    raise ValueError(f"`ratio` must be at least {least:.3f} for this model, got {ratio}.")
  return dataclasses.replace(cfg, intermediate_size=width)
