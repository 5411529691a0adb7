"""Train an expert per text domain without communication, and mix them by the domain's posterior.

    python examples/train_hdee.py --out runs/hdee                # four domains, four regimes
    python examples/train_hdee.py --out runs/hdee --resume       # after any kind of stop
    python examples/train_hdee.py --dry-run                      # plans, FLOPs, memory
    python examples/train_hdee.py --out runs/mine --domains law.txt code.txt --groups easy hard

HDEE (arXiv 2502.19385). A seed model of each size sees all domains; then each domain gets an expert
that branches from it. The regimes spend the same compute: experts of one size and length, longer
experts for harder domains, larger experts for harder domains, and one dense model that goes on
training on everything. Each expert is a run of its own in a folder of --out; experts that two
regimes share are trained once.

Prints the perplexity of every regime on the test split of every domain, also of --unseen ones.
Priors are estimated on validation splits. The default (0.13M parameters, downloads nothing) takes
about two minutes on two cores.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from hdee_plans import (
  EVERY,
  domain_name,
  optimizer,
  plan,
  schedule_length,
  seeds,
  size_of,
  sizes,
  start_at,
)
from hdee_report import plot_results, print_plans, print_results, write_plans
from hdee_scores import ScoreConfig, Scorer, summarise

from jaxcomm import data
from jaxcomm.training import (
  Checkpoints,
  RunFolder,
  Task,
  TrainStep,
  launch,
  make_train_step,
  run,
  start_devices,
)
from models import hdee, llama
from parallel import make_mesh, mesh_specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(ScoreConfig):
  """Flags of `train_hdee.py`."""


class StoppedError(Exception):
  """SIGTERM ended a run; `run` has said so."""


class Trainer:
  """Trains models one after the other and keeps their parameters by name."""

  def __init__(self, config: Config, corpora: dict[str, data.TextCorpus], devices: list[Any]):
    self.config, self.corpora, self._devices = config, corpora, devices
    self.models = sizes(config)
    self.params: dict[str, Any] = {}
    self._steps: dict[str, TrainStep] = {}

  def train(self, p: hdee.Plan) -> None:
    """Trains `p` from its parent, or reads what an earlier start has trained."""
    config, size = self.config, size_of(p)
    train_step = self.step(size)
    own = dataclasses.replace(config, steps=p.steps, resume=False)
    if config.out is not None:
      path = pathlib.Path(config.out) / p.name
      resume = config.resume and (path / "config.json").exists()
      own = dataclasses.replace(own, out=str(path), resume=resume)
      if resume and (path / "summary.json").exists():
        self.params[p.name] = restore(path, train_step)
        print(f"{p.name}: trained before.", flush=True)
        return
    if p.parent and not config.dry_run:
      train_step = hdee.branch(train_step, self.params[p.parent])
    is_seed = not p.parent
    length = p.steps if is_seed else schedule_length(config, p)
    peak = config.seed_lr if is_seed else config.lr
    train_step = start_at(train_step, peak=peak, warmup=min(50, length // 10), length=length)
    result = run(own, self._task(p, train_step))
    if result is None:  # a dry run
      return
    if result.terminated:
      raise StoppedError
    self.params[p.name] = result.state.params

  def step(self, size: str) -> TrainStep:
    """Of the models of `size`, made once."""
    if size not in self._steps:
      self._steps[size] = build_step(self.config, self.models[size], self._devices)
    return self._steps[size]

  def _task(self, p: hdee.Plan, train_step: TrainStep) -> Task:
    config = self.config
    corpora = [c for d, c in self.corpora.items() if p.domain in (d, EVERY)]
    train = [data.load_text(c, split="train", seq_len=config.seq_len) for c in corpora]
    weights = [1.0] * len(train)
    batches = data.batches(
      train,
      weights=weights,
      batch_size=config.batch_size,
      seed=config.seed,
    )
    validation = [data.load_text(c, split="validation", seq_len=config.seq_len) for c in corpora]
    rows = data.mix(validation, weights)
    count = max(1, min(4, len(rows) // config.batch_size))
    evaluation = data.eval_batches(rows, config.batch_size, count)
    shape = (config.batch_size, config.seq_len)
    dtypes = {k: jnp.int32 for k in ("tokens", "targets", "segment_ids", "positions")}
    dtypes["loss_mask"] = jnp.float32
    return Task(
      train_step=train_step,
      batches=batches,
      eval_batches=lambda: evaluation,
      batch_shapes={k: jax.ShapeDtypeStruct(shape, v) for k, v in dtypes.items()},
      tokens_per_step=math.prod(shape),
      flops_per_step=p.flops_per_step,
      exchange_shares=(1.0,),
      data=data.provenance(corpora),
      title=f"train_hdee: {p.name}" + (f" from {p.parent}" if p.parent else ""),
    )


def build_step(config: Config, model: llama.LlamaConfig, devices: list[Any]) -> TrainStep:
  """The step of all experts of one size."""
  inner = config.data_parallel * config.fsdp
  mesh = make_mesh(
    replica=len(devices) // inner, data=config.data_parallel, fsdp=config.fsdp, devices=devices
  )

  def init(key):
    return llama.init(key, model)

  return make_train_step(
    lambda params, batch: llama.loss(params, batch, model),
    init,
    optimizer(),
    mesh,
    param_specs=mesh_specs(llama.specs(model), jax.eval_shape(init, jax.random.key(0)), mesh),
    num_replicas=config.replicas,
  )


def restore(out: str | pathlib.Path, train_step: TrainStep) -> Any:
  """Parameters of the newest checkpoint of the run in `out`."""
  with Checkpoints(pathlib.Path(out) / "checkpoints", train_step.logical_layout) as checkpoints:
    return checkpoints.restore().state.params


def take_parents(config: Config, trainer: Trainer) -> None:
  """Reads the seed models from `config.parents`.

  Raises:
    ValueError: one of them is missing or saw other data.
  """
  assert config.parents is not None
  want = data.provenance(list(trainer.corpora.values()))
  for p in seeds(config):
    path = pathlib.Path(config.parents) / p.name
    if not (path / "summary.json").exists():
      raise ValueError(f"`parents` must hold the seed model {p.name}, got no run in {path}.")
    got = json.loads((path / "summary.json").read_text())["data"]
    if got != want:
      raise ValueError(f"`parents` must be trained on the same tokens, got {got}, here {want}.")
    trainer.params[p.name] = restore(path, trainer.step(size_of(p)))


def load_corpora(config: Config) -> tuple[dict[str, data.TextCorpus], dict[str, data.TextCorpus]]:
  """Tokens of the domains, and of the unseen ones with the same tokenizer."""
  vocab_size = sizes(config)["M"].vocab_size
  seen = data.prepare_mixture(config.domains, vocab_size=min(vocab_size, 8192))
  tokenizer = seen[0].tokenizer_path
  unseen = [data.prepare_text(d, tokenizer=tokenizer) for d in config.unseen]
  names = map(domain_name, config.domains), map(domain_name, config.unseen)
  return dict(zip(names[0], seen)), dict(zip(names[1], unseen))


def main(config: Config) -> None:
  """Trains what the regimes need, each model once, and scores them."""
  devices = start_devices(config)
  if jax.process_count() > 1:
    raise ValueError(
      f"`num_processes` must be 1: start a script per expert instead, got {jax.process_count()}."
    )
  seen, unseen = load_corpora(config)
  plans: dict[str, list[hdee.Plan]] = {r: plan(config, r) for r in config.regimes}
  models = seeds(config) if config.parents is None else []
  todo = list({p.name: p for p in [*models, *(p for ps in plans.values() for p in ps)]}.values())
  folder = None
  if config.out is not None and not config.dry_run:
    may_change = config.free_on_resume
    folder = RunFolder(
      config.out, dataclasses.asdict(config), resume=config.resume, may_change=may_change
    )
    write_plans(folder.path / "experts.json", todo, plans)
  print_plans(plans, seeds(config))
  trainer = Trainer(config, seen, devices)
  if config.parents is not None:
    take_parents(config, trainer)
  if config.dry_run:
    todo = list({size_of(p): p for p in todo}.values())  # one of each size says it all
  try:
    for p in todo:
      trainer.train(p)
  except StoppedError:
    return
  if config.dry_run:
    return
  scorer = Scorer(config, trainer.params, seen | unseen)
  results = {r: scorer.score(ps) for r, ps in plans.items()}
  print_results(results)
  if folder is not None:
    validation = {r: scorer.validation(ps) for r, ps in plans.items()}
    folder.summarise(
      summarise(config, plans) | {"perplexity": results, "validation_perplexity": validation}
    )
    plot_results(folder.path / "report.png", results)


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
