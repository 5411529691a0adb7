"""Train a language model over slow links, and see what crossed them.

    python examples/train_lm.py --out runs/diloco                  # DiLoCo, 4-bit outer mean
    python examples/train_lm.py --out runs/ddp --method ddp        # the baseline
    python examples/train_lm.py --out runs/diloco --resume         # after any kind of stop
    python examples/train_lm.py --preset llama3_8b --dry-run       # compile only

The default (1.0M parameters, 4 replicas on virtual CPU devices, 20 steps between two exchanges)
takes about a minute on two cores: evaluation loss from 7.6 to about 5, about 1/150 of the bytes of
data parallelism.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from lm_clock import CLOCKED
from lm_data import evaluation_rows
from lm_gossip import num_gradients, training_loss
from lm_means import averaging_loss
from lm_methods import ROUNDS, build_transform
from lm_partition import PartitionConfig, make_partitioned_step

from jaxcomm import data
from jaxcomm.training import Task, TrainStep, launch, make_train_step, run, start_devices
from models import llama, llama_pipeline
from parallel import (
  DEFAULT_RULES,
  ContextParallel,
  PipelineParallel,
  RandomRoute,
  context_permutation,
  make_mesh,
  mesh_specs,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(PartitionConfig):
  """Flags of `train_lm.py`."""

  free_on_resume: ClassVar[frozenset[str]] = PartitionConfig.free_on_resume | {
    "context", "layout", "microbatches", "route", "schedule", "sequence_parallel"
  }  # fmt: skip

  model: Literal["llama"] = "llama"
  """architecture"""
  preset: Literal[
    "nano", "tiny", "mini", "small", "llama3_2_1b", "llama3_2_3b", "llama3_8b", "llama3_70b",
    "llama3_405b",
  ] = "tiny"  # fmt: skip
  """size of the model"""
  batch_size: int = 16
  """sequences per step, over all replicas"""
  seq_len: int = 64
  """tokens per sequence"""
  data: list[str] = dataclasses.field(default_factory=lambda: ["sympy"])
  """sympy, english-docs; files, folders, globs of text, .jsonl, .parquet; hf:NAME[@REVISION]"""
  data_weights: list[float] = dataclasses.field(default_factory=list)
  """a mixture of the --data sources in these shares; none: they are one corpus"""
  text_field: str = "text"
  """key or column of the text in .jsonl, .parquet and hf: data"""
  tokenizer: str | None = None
  """a Hugging Face tokenizer.json; default: one trained on the data"""
  attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
  """kernel; auto: cuDNN on NVIDIA GPUs in bfloat16 and with --no-separate-documents, splash on TPUs
  with heads and rows of a multiple of 128, else XLA"""
  separate_documents: bool = True
  """tokens see only their own document; off: all earlier tokens of their row"""
  remat: Literal["none", "full", "dots"] = "none"
  """what the backward pass computes again to save memory; where --partition shards weights none is
  like full"""
  sequence_parallel: bool = False
  """with --tensor: those devices also share the tokens between two blocks of a layer"""
  microbatches: int | None = None
  """with --stages: parts of a device's rows that follow each other; default twice the stages"""
  schedule: Literal["gpipe", "1f1b"] | None = None
  """with --stages: order of the passes; default 1f1b: its memory does not grow with microbatches"""
  route: bool = False
  """with --stages: in training each microbatch goes on in a random replica's next stage"""
  context: Literal["ring", "ulysses", "all_gather"] = "ring"
  """with --seq-shards: how attention crosses those devices"""
  layout: Literal["zigzag", "striped", "contiguous"] = "zigzag"
  """with --seq-shards: which tokens a device has; in contiguous parts the last one has most work"""
  dtype: Literal["float32", "bfloat16"] | None = None
  """of the computation; default the preset's (parameters are float32)"""
  vocab_size: int | None = None
  """of tokenizer and model; default the preset's, at most 8192 for the tokenizer"""
  eval_batches: int | None = None
  """batches per evaluation; default 8, or all of a small validation split"""

  def __post_init__(self):
    super().__post_init__()
    for name in ("batch_size", "seq_len", "eval_batches"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    weights = self.data_weights
    if weights and (len(weights) != len(self.data) or not all(0 < w < math.inf for w in weights)):
      raise ValueError(
        f"`data_weights` must be a positive number for each of the {len(self.data)} sources in"
        f" `data`, got {weights}."
      )
    for name in ("microbatches", "schedule"):
      if getattr(self, name) is not None and self.stages == 1:
        raise ValueError(f"`{name}` has no effect without `stages`, got {getattr(self, name)}.")
    if self.microbatches is not None and self.microbatches < 1:
      raise ValueError(f"`microbatches` must be at least 1, got {self.microbatches}.")
    if self.route and (self.stages == 1 or self.replicas == 1):
      raise ValueError(
        f"`route` needs several `stages` and `replicas`, got {self.stages} and {self.replicas}."
      )
    if self.batch_size % self.row_parts:
      per_stage = " * microbatches" if self.stages > 1 else ""
      raise ValueError(
        f"`batch_size` must be divisible by replicas * data_parallel * fsdp{per_stage} ="
        f" {self.row_parts}, got {self.batch_size}."
      )
    if self.overlap and self.method == "ddp" and self.remat != "none":
      raise ValueError(f"`remat` must be 'none' with `overlap` of ddp, got {self.remat!r}.")
    if self.sequence_parallel and self.tensor == 1:
      raise ValueError("`sequence_parallel` has no effect without `tensor`, got tensor 1.")
    if self.seq_shards > 1:
      context_permutation(self.seq_len, self.seq_shards, self.layout)  # refuses other lengths

  @property
  def num_microbatches(self) -> int:
    """Of a pipeline, or 1."""
    return self.microbatches or (2 * self.stages if self.stages > 1 else 1)

  @property
  def row_parts(self) -> int:
    """Parts into which the rows of a batch are cut, in space and in time."""
    return self.row_shards * self.num_microbatches


def load_corpora(config: Config, model: llama.LlamaConfig) -> list[data.TextCorpus]:
  """The tokens, all of which the model knows: one corpus, or the parts of a mixture."""
  options: dict[str, Any] = {
    "vocab_size": model.vocab_size if config.tokenizer else min(model.vocab_size, 8192),
    "tokenizer": config.tokenizer,
    "text_field": config.text_field,
  }
  if config.data_weights:
    corpora = data.prepare_mixture(config.data, **options)
  else:
    corpora = [data.prepare_text(config.data, **options)]
  for corpus in corpora:
    for split in ("train", "validation"):
      data.check_token_ids(corpus.tokens(split), model.vocab_size)
  return corpora


def build_data(config: Config, corpora: list[data.TextCorpus], train_step: TrainStep):
  """This process's training rows, and the evaluation batches."""
  train, validation = (
    [_cut(data.load_text(c, split=split, seq_len=config.seq_len), config) for c in corpora]
    for split in ("train", "validation")
  )
  weights = config.data_weights or [1.0]
  rows: dict[str, Any] = train_step.local_rows(config.batch_size)
  batches = data.batches(
    train, weights=weights, batch_size=config.batch_size, seed=config.seed, **rows
  )
  validation = data.mix(validation, weights)
  size = evaluation_rows(len(validation), config.batch_size, config.row_parts, config.seq_len)
  count = min(8, len(validation) // size) if config.eval_batches is None else config.eval_batches
  evaluation = data.eval_batches(validation, size, count, **train_step.local_rows(size))
  return batches, evaluation


def _cut(dataset: Any, config: Config) -> Any:
  """Rows in the order in which `config.seq_shards` devices hold their tokens."""
  if config.seq_shards == 1:
    return dataset
  order, _ = context_permutation(config.seq_len, config.seq_shards, config.layout)
  return dataset.map(lambda row: {name: x[order] for name, x in row.items()})


def build_loss(config: Config, model: llama.LlamaConfig, route: RandomRoute | None = None):
  """Loss of a batch, of which segments and positions tell the documents apart.

  A `route` draws by the step, for training; evaluation goes straight.
  """
  dropped = () if config.separate_documents else ("segment_ids", "positions")
  context = None
  if config.seq_shards > 1:
    context = ContextParallel(method=config.context, layout=config.layout)
  pipeline = None
  if config.stages > 1:
    pipeline = PipelineParallel(
      num_microbatches=config.num_microbatches, schedule=config.schedule or "1f1b", route=route
    )

  def loss(params, batch, step=0, *, partition=None):
    kept = {k: v for k, v in batch.items() if k not in dropped}
    if pipeline is None:
      return llama.loss(params, kept, model, partition=partition, context=context)
    return llama_pipeline.loss(params, kept, model, pipeline=pipeline, context=context, step=step)

  return loss


def build_step(config: Config, model: llama.LlamaConfig, devices: list[Any]) -> TrainStep:
  """The training step: sharded by the compiler, or by `--partition`."""
  axes = llama.specs(model)
  stacked = jax.tree.map(lambda names: int("layers" in names), axes)

  def init(key):
    return llama.init(key, model)

  if config.partition != "none":
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return make_partitioned_step(
      config,
      build_loss(config, dataclasses.replace(model, remat="none")),
      init,
      lambda specs, mesh, clip: build_transform(config, specs, mesh, stacked, clip),
      devices,
      dtype=model.dtype,
      stacked=jax.tree.map(bool, stacked),
      policy=dots if config.remat == "dots" else None,
    )
  one_process = len({device.process_index for device in devices}) == 1
  mesh = make_mesh(
    replica=len(devices) // config.devices_per_replica,
    data=config.data_parallel,
    fsdp=config.fsdp,
    stage=config.stages,
    seq=config.seq_shards,
    tensor=config.tensor,
    devices=devices,
    # Of several processes each needs neighbouring rows.
    by_topology=one_process and config.tensor * config.seq_shards > 1,
  )
  rules = {**DEFAULT_RULES, "layers": "stage"}
  specs = mesh_specs(axes, jax.eval_shape(init, jax.random.key(0)), mesh, rules)
  loss = routed = build_loss(config, model)
  if config.route:
    routed = build_loss(config, model, RandomRoute(seed=config.seed))
  within = config.overlap and config.method == "ddp"
  return make_train_step(
    averaging_loss(config, loss, model) if within else training_loss(config, routed),
    init,
    build_transform(config, specs, mesh, stacked, averaged=within),
    mesh,
    param_specs=specs,
    num_replicas=config.replicas,
    eval_loss_fn=loss,
    mean_in_loss=within,
    step_in_loss=config.route,
  )


def with_flags(config: Config, model: llama.LlamaConfig) -> llama.LlamaConfig:
  """`model` as the flags change it."""
  names = ("vocab_size", "dtype", "attention", "remat", "sequence_parallel")
  changes = {k: v for k in names if (v := getattr(config, k)) is not None}
  return dataclasses.replace(model, **changes)


def build_task(
  config: Config,
  model: llama.LlamaConfig,
  corpora: list[data.TextCorpus],
  train_step: TrainStep,
  title: str,
) -> Task:
  """What `run` trains; to `title` it adds the method."""
  batches, evaluation = build_data(config, corpora, train_step)
  has_rounds = config.method in (*ROUNDS, *CLOCKED, "streaming_diloco")
  rows = (config.batch_size, config.seq_len)
  dtypes = {k: jnp.int32 for k in ("tokens", "targets", "segment_ids", "positions")}
  dtypes["loss_mask"] = jnp.float32
  flops = math.prod(rows) * llama.flops_per_token(model, config.seq_len)
  return Task(
    train_step=train_step,
    batches=batches,
    eval_batches=lambda: evaluation,
    batch_shapes={k: jax.ShapeDtypeStruct(rows, v) for k, v in dtypes.items()},
    tokens_per_step=math.prod(rows),
    flops_per_step=num_gradients(config) * flops,
    exchange_shares=config.exchange_shares,
    data=data.provenance(corpora),
    title=f"{title}, {config.method}"
    + (f" every {config.sync_period} steps" if has_rounds else ""),
  )


def main(config: Config) -> None:
  """Builds mesh, model, data and method, and runs them."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  devices = start_devices(config)
  model = with_flags(config, getattr(llama, config.preset)())
  corpora = load_corpora(config, model)
  train_step = build_step(config, model, devices)
  title = f"train_lm: {config.preset} {config.model}"
  run(config, build_task(config, model, corpora, train_step, title))


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
