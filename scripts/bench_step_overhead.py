"""What a method with rounds adds to the time of a step that does not exchange.

    python scripts/bench_step_overhead.py              # a virtual CPU device per replica
    python scripts/bench_step_overhead.py --stacked    # all replicas on one device
    python scripts/bench_step_overhead.py --methods diloco --pairs 20

Training steps of the same model are compiled with AdamW alone and with AdamW inside each method.
Blocks of steps of the two alternate, the order changing from pair to pair, so that drift of the
machine cancels; the overhead is the median over pairs of blocks. The round is one step longer than
the timed steps: it is ended afterwards, to see that a whole round and the next one run the same
compiled program. Expected: at most 5 % on an idle machine.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
import statistics
import sys
import time
from typing import Any, Literal

import jax
import numpy as np
import tyro

from jaxcomm.training import TrainStep, make_train_step
from models import llama

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from lm_methods import Method, MethodConfig, build_transform

WARM_UP = 3  # steps
ROUNDS: list[Method] = [
  "local_sgd", "diloco", "eager_diloco", "streaming_diloco", "slowmo", "co2", "noloco", "dfedsam"
]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  preset: Literal["nano", "tiny", "small"] = "tiny"  # size of the model
  methods: list[Method] = dataclasses.field(default_factory=lambda: ROUNDS)
  replicas: int = 4
  stacked: bool = False  # all replicas on one device
  batch_size: int = 16  # sequences per step, over all replicas
  seq_len: int = 64  # tokens per sequence
  pairs: int = 10  # of blocks
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


def build_run(cfg: Config, method: Method, sync_period: int) -> Run:
  """AdamW alone (`method` "none"), or inside a method whose first exchange is at `sync_period`."""
  model = getattr(llama, cfg.preset)()
  fragments = 2 if method == "streaming_diloco" else 1
  flags = MethodConfig(
    method=method,
    replicas=cfg.replicas,
    steps=10 * sync_period,
    sync_period=fragments * sync_period,
    fragments=fragments,
    seed=cfg.seed,
  )
  devices = jax.devices()[: 1 if cfg.stacked else cfg.replicas]
  mesh = jax.make_mesh(
    (len(devices),), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
  )
  axes = llama.specs(model)
  specs = jax.tree.map(lambda _: jax.P(), axes)
  stacked = jax.tree.map(lambda names: int("layers" in names), axes)
  train_step = make_train_step(
    lambda params, batch: llama.loss(params, batch, model),
    lambda key: llama.init(key, model),
    build_transform(flags, specs, mesh, stacked),
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


def time_pairs(cfg: Config, alone: Run, inside: Run) -> list[tuple[float, float]]:
  """Seconds per step of (AdamW alone, the method), a pair of neighbouring blocks each."""
  pairs = []
  for i in range(cfg.pairs):
    first, second = (alone, inside) if i % 2 == 0 else (inside, alone)
    times = {first: first.seconds(cfg.block), second: second.seconds(cfg.block)}
    pairs.append((times[alone], times[inside]))
  return pairs


def measure(cfg: Config, method: Method, alone: Run) -> None:
  """Prints a row: a method against AdamW alone."""
  inside = build_run(cfg, method, WARM_UP + cfg.pairs * cfg.block + 1)
  inside.seconds(WARM_UP)
  pairs = time_pairs(cfg, alone, inside)
  assert not inside.synced
  ratios = sorted(with_rounds / without for without, with_rounds in pairs)
  quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
  without, quiet = (1000 * statistics.median(times) for times in zip(*pairs))
  exchange = 1000 * inside.seconds(1)
  assert inside.synced
  inside.seconds(2)
  print(
    f"| {method} | {without:.2f} | {quiet:.2f} | {quartiles[1]:.3f} |"
    f" {quartiles[0]:.3f}, {quartiles[2]:.3f} | {exchange:.1f} | {inside.programs} |",
    flush=True,
  )
  if inside.programs != 1:
    raise SystemExit(f"error: the step of {method} was compiled again within a round.")


def main(cfg: Config) -> None:
  if jax.default_backend() == "cpu" and jax.device_count() < cfg.replicas and not cfg.stacked:
    raise ValueError(f"`replicas` {cfg.replicas} need as many devices, got {jax.device_count()}.")
  print(describe(cfg), flush=True)
  alone = build_run(cfg, "none", 1)
  alone.seconds(WARM_UP)
  print("| method | alone, ms | method, ms | ratio | its quartiles | exchange, ms | programs |")
  print("|---|---|---|---|---|---|---|")
  for method in cfg.methods:
    measure(cfg, method, alone)


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
