"""What DiLoCo adds to the time of a step that does not exchange.

    python scripts/bench_step_overhead.py              # a virtual CPU device per replica
    python scripts/bench_step_overhead.py --stacked    # all replicas on one device

Two training steps of the same model are compiled, one with AdamW alone and one with AdamW inside
DiLoCo (4-bit outer mean). Blocks of steps of the two alternate, the order changing from pair to
pair, so that drift of the machine cancels; the overhead is the median over pairs of blocks. The
round is one step longer than the timed steps: it is ended afterwards, to see that a whole round
and the next one run the same compiled program. Expected: at most 5 % on an idle machine.
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

import jaxcomm
from jaxcomm.training import TrainStep, make_train_step
from models import llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  preset: Literal["nano", "tiny", "small"] = "tiny"  # size of the model
  replicas: int = 4
  stacked: bool = False  # all replicas on one device
  batch_size: int = 16  # sequences per step, over all replicas
  seq_len: int = 64  # tokens per sequence
  pairs: int = 20  # of blocks
  block: int = 10  # steps
  seed: int = 0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, int) and not isinstance(value, bool) and value < (field.name != "seed"):
        raise ValueError(f"`{field.name}` is too small, got {value}.")
    if self.batch_size % self.replicas:
      raise ValueError(f"`batch_size` must be a multiple of `replicas`, got {self.batch_size}.")


class Run:
  """A training step and its state, advanced in timed blocks."""

  def __init__(self, train_step: TrainStep, batch: Any, seed: int):
    self.train_step = train_step
    self._batch = jax.device_put(batch, train_step.batch_sharding)
    self._state = train_step.init(jax.random.key(seed))
    self._metrics = {}

  def seconds(self, steps: int) -> float:
    """Wall-clock seconds per step, mean over `steps` of them."""
    start = time.perf_counter()
    for _ in range(steps):
      self._state, self._metrics = self.train_step.step(self._state, self._batch)
    jax.block_until_ready(self._state)
    return (time.perf_counter() - start) / steps

  @property
  def synced(self) -> bool:
    """Whether the last step ended a round."""
    return bool(self._metrics["synced"])

  @property
  def programs(self) -> int:
    """How many programs were compiled for the step."""
    return self.train_step.step._cache_size()


def build_run(cfg: Config, sync_period: int | None) -> Run:
  """AdamW alone (`sync_period` None), or inside DiLoCo."""
  model = getattr(llama, cfg.preset)()
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1))
  if sync_period is not None:
    mean = jaxcomm.compressed_mean("replica", jaxcomm.int4(), seed=cfg.seed)
    outer = optax.chain(mean, optax.sgd(0.7, momentum=0.6, nesterov=True))
    tx = jaxcomm.diloco(tx, outer, sync_period=sync_period)
  devices = jax.devices()[: 1 if cfg.stacked else cfg.replicas]
  mesh = jax.make_mesh(
    (len(devices),), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
  )
  train_step = make_train_step(
    lambda params, batch: llama.loss(params, batch, model),
    lambda key: llama.init(key, model),
    tx,
    mesh,
    num_replicas=cfg.replicas,
  )
  return Run(train_step, random_batch(cfg, model.vocab_size), cfg.seed)


def random_batch(cfg: Config, vocab_size: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(cfg.seed)
  ids = rng.integers(0, vocab_size, (cfg.batch_size, cfg.seq_len + 1), np.int32)
  shape = (cfg.batch_size, cfg.seq_len)
  positions = np.broadcast_to(np.arange(cfg.seq_len, dtype=np.int32), shape)
  return {
    "tokens": ids[:, :-1],
    "targets": ids[:, 1:],
    "segment_ids": np.ones(shape, np.int32),
    "positions": positions,
    "loss_mask": np.ones(shape, np.float32),
  }


def time_pairs(cfg: Config, alone: Run, diloco: Run) -> list[tuple[float, float]]:
  """Seconds per step of (AdamW alone, DiLoCo), a pair of neighbouring blocks each."""
  pairs = []
  for i in range(cfg.pairs):
    first, second = (alone, diloco) if i % 2 == 0 else (diloco, alone)
    times = {first: first.seconds(cfg.block), second: second.seconds(cfg.block)}
    pairs.append((times[alone], times[diloco]))
  return pairs


def main(cfg: Config) -> None:
  if jax.default_backend() == "cpu" and jax.device_count() < cfg.replicas and not cfg.stacked:
    raise ValueError(f"`replicas` {cfg.replicas} need as many devices, got {jax.device_count()}.")
  warm_up = 3
  timed = cfg.pairs * cfg.block
  alone, diloco = build_run(cfg, None), build_run(cfg, warm_up + timed + 1)
  print(describe(cfg), flush=True)
  for run in (alone, diloco):
    run.seconds(warm_up)
  pairs = time_pairs(cfg, alone, diloco)
  assert not diloco.synced
  milliseconds = [1000 * statistics.median(times) for times in zip(*pairs)]
  ratios = sorted(with_rounds / without for without, with_rounds in pairs)
  quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
  print(f"AdamW alone:          {milliseconds[0]:8.3f} ms per step (median of {cfg.pairs} blocks)")
  print(f"DiLoCo, no exchange:  {milliseconds[1]:8.3f} ms per step")
  print(
    f"ratio: {quartiles[1]:.4f} (median of {cfg.pairs} pairs; quartiles {quartiles[0]:.4f},"
    f" {quartiles[2]:.4f})"
  )
  exchange = 1000 * diloco.seconds(1)
  assert diloco.synced
  diloco.seconds(2)
  print(f"the step that ends the round: {exchange:.3f} ms")
  print(f"programs compiled over a round and the next: {diloco.programs}")
  if diloco.programs != 1:
    raise SystemExit("error: the step was compiled again within a round.")


def describe(cfg: Config) -> str:
  versions = {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "optax", "numpy")}
  shown = ", ".join(f"{name} {version}" for name, version in versions.items())
  device = jax.devices()[0]
  kind = "replicas stacked on one device" if cfg.stacked else "one device per replica"
  return (
    f"{cfg}\n{cfg.replicas} x {kind}: {device.device_kind}, {platform.machine()}\n"
    f"python {platform.python_version()}, {shown}"
  )


if __name__ == "__main__":
  config = tyro.cli(Config, description=__doc__)
  jax.config.update("jax_num_cpu_devices", config.replicas)
  main(config)
