"""Partition plans on the language model: memory, bytes, and losses when messages are rounded.

    python scripts/bench_zero.py            # `tiny`, untied, on eight virtual devices: runs nothing
    python scripts/bench_zero.py --losses   # `nano`, three seeds of 200 steps, 2 min

Memory is what the compiler says of the step (`memory_analysis`), bytes are read from the compiled
program (`collective_bytes`), each beside its formula (`memory_per_device`, `traffic_per_step`).
Expected: arguments equal the optimizer's share, bytes equal the formula less what the backward
pass does not need again (the embedding); losses with 8-bit weights and 4-bit
gradients within 1 % of those of exact messages.
"""

import dataclasses
import functools
import math
import statistics
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxcomm import data
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import Loop, LoopConfig
from models import llama
from parallel import (
  PartitionPlan,
  ZeroStep,
  clip_by_global_norm,
  make_zero_step,
  memory_per_device,
  partitioned,
  traffic_per_step,
)

AXES = ("gcd", "gpu", "node")  # the fastest link first
TOPO = PartitionPlan.topo(AXES)
PLANS = {
  "plain": PartitionPlan(),
  "zero(1)": PartitionPlan.zero(1, AXES),
  "zero(2)": PartitionPlan.zero(2, AXES),
  "zero(3)": PartitionPlan.zero(3, AXES),
  "zeropp, exact": PartitionPlan.zeropp(AXES, AXES[:2], weight_bits=None, grad_bits=None),
  "zeropp": PartitionPlan.zeropp(AXES, AXES[:2]),
  "topo": TOPO,
  "topo, 8-bit weights, 4-bit gradients": PartitionPlan.topo(AXES, weight_bits=8, grad_bits=4),
}
ROUNDED = ("zeropp", "topo, 8-bit weights, 4-bit gradients")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  losses: bool = False  # train, in place of the tables
  dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the tables' computation, and on the wire
  batch_size: int = 16  # sequences per step
  seq_len: int = 32  # tokens per sequence
  steps: int = 200  # of training
  lr: float = 6.4e-3  # that data parallelism with this model and batch was tuned to
  seeds: int = 3

  def __post_init__(self):
    if self.batch_size < 1 or self.batch_size % 8:
      raise ValueError(f"`batch_size` must be divisible by 8 devices, got {self.batch_size}.")
    for name in ("seq_len", "steps", "seeds"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def build(model: llama.LlamaConfig, plan: PartitionPlan, tx: Any, dtype: str) -> ZeroStep:
  """The step of `plan` on 2 nodes of 2 GPUs of 2 dies."""
  auto = (jax.sharding.AxisType.Auto,) * 4
  mesh = jax.make_mesh((1, 2, 2, 2), ("replica", *AXES[::-1]), auto)
  model = dataclasses.replace(model, dtype=dtype, remat="none")
  wrap = functools.partial(partitioned, plan=plan)
  return make_zero_step(
    lambda shards, batch: llama.loss(shards, batch, model, partition=wrap),
    lambda key: llama.init(key, model),
    tx,
    mesh,
    plan,
    dtype=dtype,
    stacked=stacked(model),
  )


def stacked(model: llama.LlamaConfig) -> Any:
  """Which leaves have an axis of layers."""
  return jax.tree.map(lambda names: "layers" in names, llama.specs(model))


def tables(cfg: Config) -> None:
  """Memory and bytes of every plan, beside the formulas."""
  model = dataclasses.replace(llama.tiny(), tie_embeddings=False)  # each of two uses would gather
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), model))
  size = jnp.dtype(cfg.dtype).itemsize
  sizes: dict[str, Any] = {"weight_bytes": size, "grad_bytes": size, "stacked": stacked(model)}
  rows = (cfg.batch_size, cfg.seq_len)
  batch = {k: jax.ShapeDtypeStruct(rows, jnp.int32) for k in ("tokens", "targets", "segment_ids")}
  memory, traffic = [], []
  for name, plan in PLANS.items():
    step = build(model, plan, optax.adamw(1e-3), cfg.dtype)
    compiled = step.compile(batch)
    mesh = step.layout.mesh
    memory.append(_memory_row(name, compiled, memory_per_device(plan, shapes, mesh.shape, **sizes)))
    sent = _by_level(collective_bytes(compiled, mesh))
    traffic.append((name, plan, sent, traffic_per_step(plan, shapes, mesh.shape, **sizes)))
    print(*memory[-1], sent, sep=" | ", file=sys.stderr, flush=True)  # while the others compile
  count = sum(x.size for x in jax.tree.leaves(shapes))
  print(f"`tiny`, {count:,} parameters, {cfg.dtype}, batch of {rows[0]} x {rows[1]} tokens\n")
  _print_table(
    "plan", "arguments", "optimizer", "temporary", "weights", "secondary", "gradients", rows=memory
  )
  _print_traffic(traffic, shapes, stacked(model))


def _memory_row(name: str, compiled: Any, parts: dict[str, float]) -> list[str]:
  found = compiled.memory_analysis()
  kept = [parts[k] for k in ("weights", "secondary", "gradients")]
  numbers = [found.argument_size_in_bytes, parts["optimizer"], found.temp_size_in_bytes, *kept]
  return [name, *(f"{n:,.0f}" for n in numbers)]


def _by_level(report: Any) -> dict[str, float]:
  """Bytes per level, without those of scalars."""
  sent: dict[str, float] = {}
  for op in report.ops:
    if math.prod(op.shape) > 8:
      sent[op.axis] = sent.get(op.axis, 0.0) + op.bytes
  return sent


def _print_traffic(traffic: list, shapes: Any, flags: Any) -> None:
  levels = (*AXES, ",".join(AXES[::-1]))
  flat = next(want for name, _, _, want in traffic if name == "zero(3)")[levels[-1]]
  rows = []
  for name, plan, sent, want in traffic:
    pairs = [(sent.get(k, 0), want.get(k, 0)) for k in levels]
    cells = [
      f"{found:,.0f} / {formula:,.0f}" if found or formula else "" for found, formula in pairs
    ]
    slow = sum(n for level, n in want.items() if "node" in level)
    found = sum(n for level, n in sent.items() if "node" in level)
    share = f"{found / flat:.3f} / {slow / flat:.3f}"
    rows.append([name, *cells, share, f"{_rounded_share(plan, shapes, flags):.1%}"])
  _print_table("plan", *AXES, "all three in one", "across nodes, of zero(3)", "rounded", rows=rows)


def _rounded_share(plan: PartitionPlan, shapes: Any, flags: Any) -> float:
  """Share of the parameters in leaves that the plan quantizes."""
  counts = [0, 0]
  for x, layers in zip(jax.tree.leaves(shapes), jax.tree.leaves(flags)):
    size = math.prod(x.shape[1:] if layers else x.shape)
    counts[plan.bits_of_weights(size) is not None] += x.size
  return counts[1] / sum(counts)


def _print_table(*names: str, rows: list[list[str]]) -> None:
  print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
  for row in rows:
    print(f"| {' | '.join(row)} |")
  print()


class _Curve:
  """Stands in for the loop's progress display: keeps the evaluation losses after the start."""

  def __init__(self):
    self.losses: list[float] = []

  def advance(self, step: int) -> None:
    """Nothing to show."""

  def report(self, row: dict) -> None:
    """Keeps the rows of evaluations."""
    if row["step"] and "eval_loss" in row:
      self.losses.append(row["eval_loss"])


def compare_losses(cfg: Config) -> None:
  """Evaluation losses along training, of rounded messages against exact ones."""
  corpus = data.prepare_text("sympy", vocab_size=512)
  train, held = (
    data.load_text(corpus, split=s, seq_len=cfg.seq_len) for s in ("train", "validation")
  )
  evaluation = list(data.eval_batches(held, 64, 8))
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, cfg.lr, min(50, cfg.steps // 2), cfg.steps, end_value=0.1 * cfg.lr
  )
  tx = optax.chain(clip_by_global_norm(1.0, AXES), optax.adamw(schedule, b2=0.95, weight_decay=0.1))
  config = LoopConfig(steps=cfg.steps, log_every=0, save_every=0, eval_every=max(1, cfg.steps // 5))
  curves: dict[str, list[list[float]]] = {}
  for name in ("topo", *ROUNDED):
    step = build(llama.nano(), PLANS[name], tx, "float32")
    for seed in range(cfg.seeds):
      batches, curve = data.batches(train, batch_size=cfg.batch_size, seed=seed), _Curve()
      loop = Loop(config, step, batches, eval_batches=lambda: evaluation, progress=curve)  # pyright: ignore[reportArgumentType]
      loop.run(step.init(jax.random.key(seed)))
      curves.setdefault(name, []).append(curve.losses)
      print(f"{name}, seed {seed}:", *(f"{x:.4f}" for x in curve.losses), flush=True)
  _print_losses(cfg, curves)


def _print_losses(cfg: Config, curves: dict[str, list[list[float]]]) -> None:
  print(f"\n`nano`, {cfg.steps} steps of {cfg.batch_size} x {cfg.seq_len} tokens, lr {cfg.lr}\n")
  exact = np.asarray(curves["topo"])
  rows = []
  for name, runs in curves.items():
    last = [run[-1] for run in runs]
    gaps = np.asarray(runs).mean(0) / exact.mean(0) - 1  # of the mean over seeds, along the curve
    worst = max(gaps, key=abs)
    per_seed = ", ".join(f"{x:.4f}" for x in last)
    rows.append(
      [name, f"{statistics.mean(last):.4f}", per_seed, f"{gaps[-1]:+.2%}", f"{worst:+.2%}"]
    )
  _print_table("plan", "loss", "per seed", "to exact", "worst of the curve", rows=rows)


if __name__ == "__main__":
  config = tyro.cli(Config, description=__doc__)
  jax.config.update("jax_num_cpu_devices", 8)
  (compare_losses if config.losses else tables)(config)
