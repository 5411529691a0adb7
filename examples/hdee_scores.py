"""Perplexities of the ensembles of `train_hdee.py`."""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from hdee_plans import PlanConfig, domain_name, seeds, size_of, sizes

from jaxcomm import data
from models import hdee, llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(PlanConfig):
  """Flags that decide what is scored, and how."""

  free_on_resume = PlanConfig.free_on_resume | {
    "eval_sequences", "prior_sequences", "regimes", "top_k", "unseen"
  }  # fmt: skip

  unseen: list[str] = dataclasses.field(default_factory=list)
  """domains without an expert, only scored"""
  eval_sequences: int = 128
  """sequences of each domain's test split to score"""
  prior_sequences: int = 100
  """sequences of its validation split from which its prior is estimated"""
  top_k: int | None = None
  """experts to mix at each token; default all"""

  def __post_init__(self):
    super().__post_init__()
    for name in ("eval_sequences", "prior_sequences"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    if self.top_k is not None and not 1 <= self.top_k <= len(self.domains):
      raise ValueError(
        f"`top_k` must be in [1, {len(self.domains)}], the number of experts, got {self.top_k}."
      )
    if repeated := set(map(domain_name, self.unseen)) & set(map(domain_name, self.domains)):
      raise ValueError(f"`unseen` must be other domains than `domains`, got {sorted(repeated)}.")


class Scorer:
  """Perplexities of a regime on every domain."""

  def __init__(
    self, config: ScoreConfig, params: dict[str, Any], corpora: dict[str, data.TextCorpus]
  ):
    self._config, self._params, self._models = config, params, sizes(config)
    tokenizer = next(iter(corpora.values())).tokenizer_path.read_bytes()
    self._tokenizer = hashlib.sha256(tokenizer).hexdigest()
    self._test = {d: self._rows(c, "test", config.eval_sequences) for d, c in corpora.items()}
    self._prior = {
      d: self._rows(c, "validation", config.prior_sequences) for d, c in corpora.items()
    }

  def score(self, plans: list[hdee.Plan]) -> dict[str, dict[str, float]]:
    """Perplexity by rule and domain."""
    experts = [self._expert(p) for p in plans]
    alone = {e.domain: self._perplexities(hdee.EnsembleLM([e])) for e in experts}
    if len(experts) == 1:
      return {"alone": alone[experts[0].domain]}
    posterior = hdee.EnsembleLM(experts, top_k=self._config.top_k)
    return {
      "posterior": self._perplexities(posterior),
      "posterior, own prior": self._perplexities(posterior, self._prior),
      "average": self._perplexities(hdee.EnsembleLM(experts, mixing="average")),
      "geometric": self._perplexities(hdee.EnsembleLM(experts, mixing="geometric")),
      "own expert": {d: alone[d][d] for d in alone},
      "best expert": {d: min(a[d] for a in alone.values()) for d in self._test},
    }

  def validation(self, plans: list[hdee.Plan]) -> dict[str, float]:
    """Perplexity by domain on the validation splits, to choose flags by."""
    ensemble = hdee.EnsembleLM([self._expert(p) for p in plans])
    return {d: ensemble.perplexity(rows)["perplexity"] for d, rows in self._prior.items()}

  def _perplexities(self, ensemble: hdee.EnsembleLM, prior: Any = None) -> dict[str, float]:
    prior = prior or {}
    return {
      d: ensemble.perplexity(rows, prior.get(d))["perplexity"] for d, rows in self._test.items()
    }

  def _expert(self, p: hdee.Plan) -> hdee.ExpertSpec:
    return hdee.llama_expert(
      p.name,
      p.domain,
      self._params[p.name],
      self._models[size_of(p)],
      seq_len=self._config.seq_len,
      parent=p.parent,
      tokenizer=self._tokenizer,
    )

  def _rows(self, corpus: data.TextCorpus, split: str, count: int) -> list[dict[str, np.ndarray]]:
    rows = data.load_text(corpus, split=split, seq_len=self._config.seq_len)
    size = min(self._config.batch_size, len(rows), count)
    return list(data.eval_batches(rows, size, min(count, len(rows)) // size))


def summarise(config: PlanConfig, plans: dict[str, list[hdee.Plan]]) -> dict[str, Any]:
  """What `summary.json` of the whole run holds."""
  first = sizes(config)
  return {
    "title": f"train_hdee: {len(config.domains)} domains, {config.preset}",
    "params": {size: llama.num_params(m) for size, m in first.items()},
    "steps": config.steps,
    "seed_flops": {p.name: p.flops for p in seeds(config)},
    "training_flops": {r: sum(p.flops for p in ps) for r, ps in plans.items()},
    "scoring_flops_per_token": {
      r: sum(p.flops_per_step for p in ps) / (3 * config.batch_size * config.seq_len)
      for r, ps in plans.items()
    },
  }
