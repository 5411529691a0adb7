"""Make a ladder of a trained Llama, and retrain it lightly: how much of the jump comes back.

    python examples/convert_ladder.py --out runs/convert                    # trains a Llama first
    python examples/convert_ladder.py --out runs/convert --resume           # after any kind of stop
    python examples/convert_ladder.py --out runs/convert --model runs/llama        # of train_lm.py
    python examples/convert_ladder.py --out runs/convert --model Llama-3.2-1B --ladder-layers 8
    python examples/convert_ladder.py --model Llama-3.2-1B --tensor 8 --dry-run    # compile only

The last --ladder-layers layers are converted (arXiv 2501.06589, `models.ladder`): the same
parameters, but each block no longer waits for the sum over devices of the one before. The loss
jumps; --retrain-steps steps bring back a share of the jump. Prints the three losses and that share,
on the same held-out tokens, and writes them to `OUT/summary.json`.

`--model` is a Hugging Face folder of a Llama with its tokenizer.json, or a run folder of
`train_lm.py`, whose data flags must then be given again. Without it one is trained in `OUT/llama`
with the flags of `train_lm.py`. `OUT/ladder` is the run folder of the retraining; its checkpoint
has a Llama's parameters, and `OUT/summary.json` the `ladder_layers` to run them with. No Hugging
Face folder is written: transformers would read it as a plain Llama, at the loss of before.

The default (1.0M parameters, 300 steps, half of 4 layers, 15 steps) takes about a minute on two
cores. So small a model hardly jumps: 3.8588 to 3.8694.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from compare_report import align
from compare_runs import check_comparison, check_processes, open_folder, train_in
from finetune_hf import Config as FinetuneConfig
from finetune_hf import consensus, open_source
from lm_methods import Method
from train_ladder import build_step, check_ladder
from train_lm import Config as TrainConfig
from train_lm import build_step as build_llama_step
from train_lm import build_task, load_corpora, with_flags
from train_lm import main as train_llama

from jaxcomm import data
from jaxcomm.training import (
  Checkpoints,
  Loop,
  LoopConfig,
  Task,
  TrainStep,
  launch,
  load_config,
  run,
  start_devices,
)
from models import hdee, ladder, llama, load_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(FinetuneConfig):
  """Flags of `convert_ladder.py`: its own, and those of `train_lm.py`."""

  model: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
  """Hugging Face folder or run folder of train_lm.py; default: a new Llama of --preset"""
  ladder_layers: int | None = None
  """how many layers to convert, the last ones; default half of them"""
  retrain_steps: int | None = None
  """default a twentieth of the steps of the Llama, of a Hugging Face folder 100"""
  retrain_lr: float | None = None
  """its peak; default a twentieth of the Llama's, of a Hugging Face folder 2e-5"""
  method: Method = "none"
  """as of train_lm.py, for more than one of --replicas"""
  replicas: int = 1
  steps: int = 300
  """of the Llama that is trained first"""

  def __post_init__(self):
    super().__post_init__()
    check_comparison(self)
    check_ladder(self)
    for name in ("ladder_layers", "retrain_steps"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if self.retrain_lr is not None and not 0 < self.retrain_lr < math.inf:
      raise ValueError(f"`retrain_lr` must be positive and finite, got {self.retrain_lr}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """The trained Llama.

  Attributes:
    cfg: its config, parameters in float32.
    read: gives its parameters.
    name: for the title.
    steps: of the retraining, unless a flag says it.
    lr: likewise.
    tokenizer: its tokenizer.json; None: the one of the data.
    data: what it was trained on; None: unknown.
  """

  cfg: llama.LlamaConfig
  read: Callable[[], Any]
  name: str
  steps: int
  lr: float
  tokenizer: str | None = None
  data: dict[str, str] | None = None


def find_source(config: Config) -> Source:
  """What `--model` names; no parameter is read.

  Raises:
    ValueError: it is neither a Hugging Face folder nor a run that has finished.
  """
  assert config.model is not None
  path = pathlib.Path(config.model)
  if (path / "checkpoints").is_dir():
    return source_of_run(path)
  found = open_source(config)
  assert found.folder is not None
  folder, lr = found.folder, 2e-5

  def read():
    return load_hf(folder, param_dtype="float32")[2]

  name, tokenizer = folder.resolve().name, found.tokenizer
  return Source(cfg=found.cfg, read=read, name=name, steps=100, lr=lr, tokenizer=tokenizer)


def source_of_run(path: pathlib.Path) -> Source:
  """The Llama that a run of `train_lm.py` in `path` has trained; its replicas are averaged."""
  flags = load_config(path)
  if flags.get("model") != "llama" or "residuals" in flags:
    raise ValueError(f"`model` must be a run of train_lm.py, got one of another script: {path}.")
  if not (path / "summary.json").is_file():
    raise ValueError(f"`model` must be a run that has finished, got no summary.json in {path}.")
  summary = json.loads((path / "summary.json").read_text())
  config = _on_one_device(flags)
  cfg = with_flags(config, getattr(llama, config.preset)())

  def read():
    train_step = build_llama_step(config, cfg, jax.devices()[:1])  # replicas are stacked
    with Checkpoints(path / "checkpoints", train_step.logical_layout) as checkpoints:
      state = checkpoints.restore().state
    return consensus(train_step, train_step.from_logical(state), cfg.param_dtype)

  return Source(
    cfg=cfg,
    read=read,
    name=f"{config.preset} of {path.name}",
    steps=max(1, summary["steps"] // 20),
    lr=config.lr / 20,  # half of what its schedule ended with
    tokenizer=config.tokenizer,
    data=summary["data"],
  )


def _on_one_device(flags: dict[str, Any]) -> TrainConfig:
  """Saved flags of `train_lm.py` for reading what they made, replicas stacked."""
  fields = {f.name for f in dataclasses.fields(TrainConfig)}
  sizes = ("data_parallel", "fsdp", "stages", "seq_shards", "tensor")
  starts = ("out", "coordinator", "num_processes", "process_id", "profile_steps", "wandb")
  changes: dict[str, Any] = {**dict.fromkeys(sizes, 1), **dict.fromkeys(starts)}
  changes |= {"partition": "none", "levels": [], "microbatches": None, "schedule": None}
  changes |= {"sequence_parallel": False, "resume": False, "tensorboard": False}
  changes |= {"replica_change": None}
  return TrainConfig(**{k: v for k, v in flags.items() if k in fields} | changes)


def convert(config: Config, cfg: llama.LlamaConfig) -> ladder.LadderConfig:
  """`cfg` with its last layers as ladders."""
  count = max(1, cfg.num_layers // 2) if config.ladder_layers is None else config.ladder_layers
  return ladder.convert_to_ladder(None, cfg, count)[1]


def retraining(config: Config, source: Source) -> Config:
  """Flags of the run that retrains."""
  steps = config.retrain_steps or source.steps
  return dataclasses.replace(
    config,
    steps=steps,
    lr=config.retrain_lr or source.lr,
    schedule_steps=steps,
    warmup=min(10, steps // 4),
    # Other rows than the first ones of the Llama's run.
    seed=config.seed + 1,
    eval_every=min(config.eval_every, max(1, steps // 5)),
    resume=False,
  )


def make_task(own: Config, source: Source, model: ladder.LadderConfig, devices: list[Any]) -> Task:
  """The retraining of `source` as `model`.

  Raises:
    ValueError: the Llama was trained on other data.
  """
  corpora = load_corpora(dataclasses.replace(own, tokenizer=source.tokenizer), model)
  if source.data is not None and (found := data.provenance(corpora)) != source.data:
    raise ValueError(
      f"`model` was trained on {source.data}, which `data` and its flags must give, got {found}."
    )
  kinds = f"{model.kinds.count('ladder')} of {model.num_layers} layers"
  title = f"convert_ladder: {source.name}, {kinds}"
  return build_task(own, model, corpora, build_step(own, model, devices), title)


def loss_of(train_step: TrainStep, task: Task) -> float:
  """Evaluation loss before any step."""
  config = LoopConfig(steps=0, eval_every=1, save_every=0, log_every=0)
  loop = Loop(config, train_step, task.batches, eval_batches=task.eval_batches)
  found = loop.run(train_step.init(jax.random.key(0))).first_eval_loss
  assert found is not None
  return found


def retrain(config: Config, source: Source, path: pathlib.Path, devices: list[Any]) -> float | None:
  """Retrains in `path`: the loss of the Llama, or None after SIGTERM."""
  # On the host: what reads them is on one device, what trains them perhaps on several.
  params, model = jax.device_get(source.read()), convert(config, source.cfg)
  _, same = ladder.convert_to_ladder(params, source.cfg, 0)
  own = retraining(config, source)
  task = make_task(own, source, model, devices)
  before = loss_of(hdee.branch(build_step(own, same, devices), params), task)

  def train(flags: Config) -> None:
    run(flags, dataclasses.replace(task, train_step=hdee.branch(task.train_step, params)))

  return before if train_in(path, own, train) else None


def summarise(before: float, model: ladder.LadderConfig, path: pathlib.Path) -> dict[str, Any]:
  """What the retraining in `path` has brought back."""
  summary = json.loads((path / "summary.json").read_text())
  after, end = summary["first_eval_loss"], summary["eval_loss"]
  return {
    "ladder_layers": model.ladder_layers,
    "loss_of_llama": before,
    "loss_converted": after,
    "loss_retrained": end,
    # More than 1: better than the Llama, which has seen fewer tokens.
    "recovered": (after - end) / (after - before) if after > before else None,
    "retrain_steps": summary["steps"],
  }


def describe(result: dict[str, Any]) -> str:
  """The result for people."""
  before = result["loss_of_llama"]
  lines = [["", "eval loss", "above the Llama"]]
  for name, key in (("Llama", "of_llama"), ("converted", "converted"), ("retrained", "retrained")):
    loss = result[f"loss_{key}"]
    lines.append([name, f"{loss:.4f}", f"{loss - before:+.4f}"])
  share = result["recovered"]
  text = "the loss did not jump" if share is None else f"{100 * share:.1f} % of the jump recovered"
  return f"{align(lines)}\n{text} in {result['retrain_steps']} steps."


def dry_run(config: Config, devices: list[Any]) -> None:
  """Compiles the step of the retraining."""
  if config.model is not None:
    source = find_source(config)
  else:
    name, lr = f"new {config.preset}", config.lr or 1.0
    source = Source(cfg=new_llama(config), read=dict, name=name, steps=config.steps, lr=lr)
  own = retraining(config, source)
  run(own, make_task(own, source, convert(config, source.cfg), devices))


def new_llama(config: Config) -> llama.LlamaConfig:
  """The model that is trained first."""
  return with_flags(config, getattr(llama, config.preset)())


def llama_flags(config: Config) -> TrainConfig:
  """Flags of the run of `train_lm.py` that comes first."""
  kept: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
  return TrainConfig(**kept | {"model": "llama", "resume": False})


def main(config: Config) -> None:
  """Finds or trains the Llama, converts it, and retrains it."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  devices = start_devices(config)
  check_processes()
  if config.dry_run:
    dry_run(config, devices)
    return
  # Refused before anything is written or trained.
  convert(config, new_llama(config) if config.model is None else find_source(config).cfg)
  with open_folder(config) as folder:
    if config.model is None:
      if not train_in(folder.path / "llama", llama_flags(config), train_llama):
        return
      source = source_of_run(folder.path / "llama")
    else:
      source = find_source(config)
    before = retrain(config, source, folder.path / "ladder", devices)
    if before is None:
      return
    result = summarise(before, convert(config, source.cfg), folder.path / "ladder")
    folder.summarise(result)
    print(f"{describe(result)}\n{folder.path}: summary.json, ladder/", flush=True)


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
