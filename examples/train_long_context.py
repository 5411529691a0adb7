"""Train on long sequences, each cut over several devices, and see how far back the model looks.

    python examples/train_long_context.py --out runs/long
    python examples/train_long_context.py --out runs/long --resume               # after any stop
    python examples/train_long_context.py --out runs/far --seq-len 32768 --replicas 1 \\
        --seq-shards 8 --batch-size 1 --steps 5
    python examples/train_long_context.py --seq-len 32768 --replicas 1 --seq-shards 8 \\
        --batch-size 1 --dry-run                                                 # memory and bytes

Attention crosses the devices of `--seq-shards` by ring attention, Ulysses or an all-gather of keys
and values (`--context`); replicas exchange by any `--method` of `train_lm.py`. The text is packed
without borders; each row begins with a topic, which is asked for 16 tokens to a whole sequence
later. The loss is that of the text plus that of the answers, which is also logged, printed and
drawn by distance (`distance.png`). Only attention across devices brings it below chance, 2.08 nats.

The default (0.13M parameters, 1,024 tokens, 2 replicas of 4 virtual CPU devices, 200 steps) takes
about a minute on two cores: answers below 0.01 nats at every distance, text from 6.2 to about 4.7.
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from lm_data import evaluation_rows
from lm_gossip import num_gradients, training_loss
from lm_methods import MethodConfig, build_transform
from recall_task import NUM_IDS, Recall, by_distance, plot

from jaxcomm import data
from jaxcomm.training import (
  Task,
  TrainStep,
  launch,
  make_train_step,
  read_metrics,
  run,
  start_devices,
)
from models import llama
from parallel import ContextParallel, context_permutation, make_mesh, mesh_specs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MethodConfig):
  """Flags of `train_long_context.py`."""

  free_on_resume: ClassVar[frozenset[str]] = MethodConfig.free_on_resume | {
    "block_size", "context", "layout"
  }  # fmt: skip

  steps: int = 200
  replicas: int = 2
  seq_shards: int = 4
  preset: Literal["nano", "tiny", "mini", "small", "llama3_2_1b", "llama3_8b"] = "nano"
  """size of the model"""
  seq_len: int = 1024
  """tokens per sequence"""
  batch_size: int = 4
  """sequences per step, over all replicas"""
  context: Literal["ring", "ulysses", "all_gather"] = "ring"
  """how attention crosses the devices of --seq-shards"""
  layout: Literal["zigzag", "striped", "contiguous"] = "zigzag"
  """which tokens a device has; contiguous leaves a causal ring waiting for its last device"""
  block_size: int = 512
  """most tokens of queries and of keys in a tile of attention"""
  remat: Literal["none", "full", "dots"] = "none"
  """what the backward pass computes again to save memory"""
  data: list[str] = dataclasses.field(default_factory=lambda: ["sympy"])
  """as of train_lm.py"""
  text_field: str = "text"
  """key or column of the text in .jsonl, .parquet and hf: data"""
  eval_batches: int = 4
  """batches per evaluation"""

  def __post_init__(self):
    super().__post_init__()
    for name in ("seq_len", "batch_size", "block_size", "eval_batches"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if self.batch_size % self.row_shards:
      raise ValueError(
        "`batch_size` must be divisible by replicas * data_parallel * fsdp ="
        f" {self.row_shards}, got {self.batch_size}."
      )
    if self.stages > 1:
      raise ValueError(f"`stages` must be 1: layers are not cut here, got {self.stages}.")
    if self.overlap and self.method == "ddp":
      raise ValueError("`overlap` of method 'ddp' is of train_lm.py.")
    context_permutation(self.seq_len, self.seq_shards, self.layout)  # refuses other lengths


def build_model(config: Config) -> llama.LlamaConfig:
  """The preset, for sequences of this length."""
  model = getattr(llama, config.preset)()
  longest = max(model.max_seq_len, config.seq_len)
  return dataclasses.replace(model, max_seq_len=longest, remat=config.remat)


def build_data(config: Config, corpus: data.TextCorpus, recall: Recall, train_step: TrainStep):
  """This process's training rows, and the evaluation batches, in the order of the layout."""
  order, _ = context_permutation(config.seq_len, config.seq_shards, config.layout)

  def hide(row, rng):
    return {name: x[order] for name, x in recall.hide(row, rng).items()}

  train, validation = (
    data.load_text(corpus, split=split, seq_len=config.seq_len).random_map(hide, seed=config.seed)
    for split in ("train", "validation")
  )
  rows: dict[str, Any] = train_step.local_rows(config.batch_size)
  batches = data.batches(train, batch_size=config.batch_size, seed=config.seed, **rows)
  size = evaluation_rows(len(validation), config.batch_size, config.row_shards, config.seq_len)
  count = min(config.eval_batches, len(validation) // size)
  return batches, data.eval_batches(validation, size, count, **train_step.local_rows(size))


def build_step(
  config: Config, model: llama.LlamaConfig, recall: Recall, devices: list[Any]
) -> TrainStep:
  """The training step: manual over replicas, attention over `seq`, the rest the compiler's."""
  axes = llama.specs(model)
  mesh = make_mesh(
    replica=len(devices) // config.devices_per_replica,
    data=config.data_parallel,
    fsdp=config.fsdp,
    seq=config.seq_shards,
    tensor=config.tensor,
    devices=devices,
  )
  context = None
  if config.seq_shards > 1:
    context = ContextParallel(
      method=config.context, layout=config.layout, block_size=config.block_size
    )

  def init(key):
    return llama.init(key, model)

  def loss(params, batch):
    logits_BSV, _ = llama.apply(params, batch["tokens"], model, context=context)
    loss_BS = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, batch["targets"])
    mask_BS = batch["text_mask"]
    text = (loss_BS * mask_BS).sum() / jnp.maximum(mask_BS.sum(), 1)
    aux = {"text": text, **recall.losses(loss_BS, batch["distance"])}
    return text + aux["recall"], aux

  specs = mesh_specs(axes, jax.eval_shape(init, jax.random.key(0)), mesh)
  stacked = jax.tree.map(lambda names: int("layers" in names), axes)
  return make_train_step(
    training_loss(config, loss),
    init,
    build_transform(config, specs, mesh, stacked),
    mesh,
    param_specs=specs,
    num_replicas=config.replicas,
    eval_loss_fn=loss,
  )


def report(out: pathlib.Path, recall: Recall, title: str) -> None:
  """Prints and draws the loss of the answers by distance, over quarters of the run."""
  means = by_distance(read_metrics(out), recall, parts=4)
  print("loss of the answers by distance, last quarter of the run (chance 2.08):")
  for distance, loss in zip(recall.distances, means[-1]):
    print(f"  from {distance:>7,} tokens  {loss:.3f}")
  plot(out / "distance.png", means, recall, title)


def main(config: Config) -> None:
  """Builds mesh, model, data and method, and runs them."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  if config.warmup is None:
    config = dataclasses.replace(config, warmup=min(10, config.schedule_length // 2))
  devices = start_devices(config)
  model = build_model(config)
  first_id = min(model.vocab_size, 8192) - NUM_IDS
  recall = Recall(seq_len=config.seq_len, first_id=first_id)
  corpus = data.prepare_text(config.data, vocab_size=first_id, text_field=config.text_field)
  train_step = build_step(config, model, recall, devices)
  batches, evaluation = build_data(config, corpus, recall, train_step)
  rows = (config.batch_size, config.seq_len)
  dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "distance": jnp.int32}
  dtypes["text_mask"] = jnp.float32
  task = Task(
    train_step=train_step,
    batches=batches,
    eval_batches=lambda: evaluation,
    batch_shapes={k: jax.ShapeDtypeStruct(rows, v) for k, v in dtypes.items()},
    tokens_per_step=math.prod(rows),
    flops_per_step=num_gradients(config)
    * math.prod(rows)
    * llama.flops_per_token(model, config.seq_len),
    exchange_shares=config.exchange_shares,
    data=data.provenance([corpus]),
    title=f"train_long_context: {config.seq_len} tokens on {config.seq_shards} devices by"
    f" {config.context}, {config.method}",
  )
  result = run(config, task)
  done = result is not None and not result.terminated
  if done and config.out is not None and jax.process_index() == 0:
    report(pathlib.Path(config.out), recall, task.title)


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
