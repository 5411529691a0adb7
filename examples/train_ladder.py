"""Train Ladder, parallel and desync Transformers beside the standard one, on the same tokens.

    python examples/train_ladder.py --out runs/ladder
    python examples/train_ladder.py --out runs/ladder --resume             # after any kind of stop
    python examples/train_ladder.py --tensor 2 --residuals standard ladder parallel --dry-run
    python -m jaxcomm.inspect --target gpu:h100:1x8 -- examples/train_ladder.py \\
        --preset llama3_8b --tensor 8 --residuals ladder             # what overlaps on 8 H100

Residual streams of arXiv 2501.06589 (`models.ladder`): in a ladder a block reads the stream without
the output of the block before, whose sum over devices can run meanwhile; "parallel" has one block a
layer; "desync-2x" and "desync-4x" sum only every second and fourth block, over --desync-devices
devices that are part of the model. Flags of `train_lm.py` hold for all. Every variant has its run
folder in `--out`; beside them are `report.png` (evaluation loss against tokens), `comparison.csv`
and `summary.json`.

The default (1.0M parameters, one replica, 100 steps of five variants) takes about a minute on two
cores. So short a run shows that the variants train, not which is better.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import jax
from compare_report import Run, align, read_run, write_csv
from compare_runs import check_comparison, check_processes, compare
from lm_gossip import training_loss
from lm_methods import Method, build_transform
from train_lm import Config as TrainConfig
from train_lm import build_task, load_corpora, with_flags

from jaxcomm.training import (
  PLOT_STYLE,
  RunFolder,
  TrainStep,
  launch,
  make_train_step,
  run,
  start_devices,
)
from models import ladder, llama
from parallel import make_mesh, mesh_specs

Variant = Literal["standard", "ladder", "parallel", "desync-2x", "desync-4x"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
  """Flags of `train_ladder.py`: its own, and those of `train_lm.py`, for all variants."""

  free_on_resume: ClassVar[frozenset[str]] = TrainConfig.free_on_resume | {"residuals"}

  residuals: list[Variant] = dataclasses.field(
    default_factory=lambda: ["standard", "ladder", "parallel", "desync-2x", "desync-4x"]
  )
  """what to train; the table compares with the first"""
  desync_devices: int = 2
  """devices that a desync model is made for; it computes what they would, on any number"""
  method: Method = "none"
  """as of train_lm.py, for more than one of --replicas"""
  replicas: int = 1
  steps: int = 100
  eval_every: int = 20

  def __post_init__(self):
    super().__post_init__()
    check_comparison(self)
    check_ladder(self)
    if not self.residuals or len(set(self.residuals)) < len(self.residuals):
      raise ValueError(
        f"`residuals` must name at least one variant, none twice, got {self.residuals}."
      )
    if self.desync_devices < 1:
      raise ValueError(f"`desync_devices` must be at least 1, got {self.desync_devices}.")
    if self.tensor > 1 and any(name.startswith("desync") for name in self.residuals):
      raise ValueError(
        f"`tensor` must be 1 for desync, whose devices `desync_devices` counts, got {self.tensor}."
      )


def check_ladder(config: TrainConfig) -> None:
  """Raises ValueError where flags of `train_lm.py` are not for these models."""
  for name in ("stages", "seq_shards"):
    if (value := getattr(config, name)) != 1:
      raise ValueError(f"`{name}` must be 1: `models.ladder` does not cut that, got {value}.")
  for name, value in (("partition", "none"), ("overlap", False), ("sequence_parallel", False)):
    if (got := getattr(config, name)) != value:
      raise ValueError(
        f"`{name}` must be {value!r} for the models of `models.ladder`, got {got!r}."
      )


def variant(base: llama.LlamaConfig, name: str, desync_devices: int) -> ladder.LadderConfig:
  """`base` with the residual stream that `name` says."""
  fields: dict[str, Any] = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
  if not name.startswith("desync"):
    fields["residual"] = name
    return ladder.LadderConfig(**fields)
  every = int(name.removeprefix("desync-").removesuffix("x"))
  return ladder.LadderConfig(
    **fields,
    residual="desync",
    reduce_pattern=ladder.desync_pattern(base.num_layers, every),
    tensor_parallel_size=desync_devices,
  )


def build_model(config: Config, name: str) -> ladder.LadderConfig:
  """The preset as that variant."""
  return variant(with_flags(config, getattr(llama, config.preset)()), name, config.desync_devices)


def build_step(config: TrainConfig, model: ladder.LadderConfig, devices: list[Any]) -> TrainStep:
  """The training step: manual over replicas, all else the compiler's to shard."""
  axes = ladder.specs(model)
  mesh = make_mesh(
    replica=len(devices) // config.devices_per_replica,
    data=config.data_parallel,
    fsdp=config.fsdp,
    tensor=config.tensor,
    devices=devices,
  )
  dropped = () if config.separate_documents else ("segment_ids", "positions")

  def init(key):
    return ladder.init(key, model)

  def loss(params, batch):
    return ladder.loss(params, {k: v for k, v in batch.items() if k not in dropped}, model)

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


def train(config: Config) -> None:
  """One variant, the only one of `config.residuals`."""
  [name] = config.residuals
  devices = start_devices(config)
  model = build_model(config, name)
  corpora = load_corpora(config, model)
  title = f"train_ladder: {config.preset} {name}"
  run(config, build_task(config, model, corpora, build_step(config, model, devices), title))


def table(config: Config, runs: Sequence[Run]) -> list[dict[str, Any]]:
  """One row per variant: its end beside that of the first, and its all-reduces."""
  rows = []
  for name, found in zip(config.residuals, runs):
    sums = ladder.num_all_reduces(build_model(config, name))
    rows.append(
      {
        "residual": name,
        "eval_loss": float(found.losses[-1]),
        "to_first_percent": 100 * float(found.losses[-1] / runs[0].losses[-1] - 1),
        "tokens": found.tokens,
        "all_reduces": sums,  # over `tensor`, forward
        "awaited": 1 if name == "ladder" else sums,
        "step_seconds": found.step_seconds,
      }
    )
  return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
  """The table for people."""
  heads = ["residual", "eval loss", f"to {rows[0]['residual']}", "all-reduces"]
  lines = [[*heads, "awaited by the next block", "ms/step"]]
  for row in rows:
    line = [row["residual"], f"{row['eval_loss']:.4f}", f"{row['to_first_percent']:+.2f} %"]
    line += [str(row["all_reduces"]), str(row["awaited"]), f"{1000 * row['step_seconds']:.1f}"]
    lines.append(line)
  return align(lines)


def draw(path: pathlib.Path, runs: Sequence[Run], title: str) -> None:
  """Evaluation loss against tokens."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.figure import Figure

  with matplotlib.rc_context(PLOT_STYLE):
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.add_subplot()
    for i, found in enumerate(runs):
      tokens = found.steps * (found.tokens / found.steps[-1])
      label = f"{found.name}  {found.losses[-1]:.4f}"
      axes.plot(tokens, found.losses, color=f"C{i}", marker="os^vD"[i], ms=4, lw=1.5, label=label)
    axes.set(xlabel="tokens", ylabel="evaluation loss (nats/token)")
    axes.legend()
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=130)


def report(folder: RunFolder, config: Config) -> None:
  """Draws and prints the comparison, and leaves it in the folder."""
  tokens = config.batch_size * config.seq_len
  runs = [read_run(folder.path / name, tokens) for name in config.residuals]
  title = f"{config.preset}, {config.steps} steps of {tokens} tokens, seed {config.seed}"
  draw(folder.path / "report.png", runs, title)
  rows = table(config, runs)
  write_csv(folder.path / "comparison.csv", rows)
  folder.summarise({"title": title, "runs": rows})
  print(f"{title}\n{format_table(rows)}")
  print(f"{folder.path}: report.png, comparison.csv, summary.json", flush=True)


def main(config: Config) -> None:
  """Trains one variant after the other, and compares them."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  start_devices(config)
  check_processes()
  for name in config.residuals:
    build_model(config, name)  # refuses sizes before the first is trained
  runs = {
    name: dataclasses.replace(config, residuals=[name], resume=False) for name in config.residuals
  }
  compare(config, runs, train, functools.partial(report, config=config))


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
