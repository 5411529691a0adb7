"""Fine-tune a Hugging Face folder over slow links: a folder in, a folder out.

    python examples/finetune_hf.py --out runs/tuned --model Llama-3.2-1B --data mine.jsonl
    python examples/finetune_hf.py --out runs/tuned --resume                # after any kind of stop
    python examples/finetune_hf.py --model Llama-3.2-1B --fsdp 2 --dry-run  # compile only
    python examples/finetune_hf.py --out runs/new                           # no folder: a new model

`--model` is a folder with config.json (`model_type` llama), safetensors and tokenizer.json.
Replicas train by any `--method` of `train_lm.py`, whose other flags work here too. At the end
`OUT/hf-STEP` is a folder that transformers and `models.load_hf` read: the parameters that the
evaluation takes (where replicas differ, their mean), in the dtype of the folder that came in, with
its tokenizer. Until then parameters are float32: a bfloat16 number swallows any update below 1/512
of it.

Without `--model` the script makes a model of `--preset` and a tokenizer of its own. That default
(1.0M parameters, 4 replicas on virtual CPU devices, 100 steps) takes about half a minute on two
cores: evaluation loss from 7.6 to about 5.6.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
from train_lm import Config as TrainConfig
from train_lm import build_step, build_task, load_corpora, with_flags

import jaxcomm
from jaxcomm import data
from jaxcomm.training import Checkpoints, TrainState, TrainStep, launch, run, start_devices
from models import hdee, llama, load_hf, load_hf_config, save_hf

# What transformers writes beside tokenizer.json.
TOKENIZER_FILES = (
  "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
  "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
  """Flags of `finetune_hf.py`: its own, and those of `train_lm.py`."""

  model: str | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
  """Hugging Face folder to start from; default: a new model of --preset"""
  lr: float | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
  """peak learning rate; default 2e-5, of a new model 4e-3"""
  steps: int = 100

  def __post_init__(self):
    if self.lr is None:
      object.__setattr__(self, "lr", 4e-3 if self.model is None else 2e-5)
    super().__post_init__()
    if self.out is None and not self.dry_run:
      raise ValueError("`out` must be given: the fine-tuned folder is written there.")
    if self.model is None:
      return
    for name, default in (("preset", Config.preset), ("vocab_size", None)):
      if (value := getattr(self, name)) != default:
        raise ValueError(f"`{name}` is for new models, `model` has its own, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Where the run starts.

  Attributes:
    cfg: of the model as it is trained.
    dtype: in which its parameters are written at the end.
    folder: of the parameters; None: new ones.
    tokenizer: its tokenizer.json; None: one is trained on the data.
  """

  cfg: llama.LlamaConfig
  dtype: Any
  folder: pathlib.Path | None
  tokenizer: str | None


def open_source(config: Config) -> Source:
  """What `--model` names, checked; no parameter is read.

  Raises:
    ValueError: it is no folder that `models.load_hf` takes, or lacks a tokenizer.json.
  """
  if config.model is None:
    cfg = with_flags(config, getattr(llama, config.preset)())
    return Source(cfg=cfg, dtype=cfg.param_dtype, folder=None, tokenizer=config.tokenizer)
  folder = pathlib.Path(config.model)
  try:
    _, cfg = load_hf_config(folder)
  except (ValueError, OSError, NotImplementedError) as e:
    raise ValueError(str(e).replace("`path`", "`model`")) from e
  tokenizer = config.tokenizer or str(folder / "tokenizer.json")
  if not pathlib.Path(tokenizer).is_file():
    raise ValueError(
      f"`model` must have the tokenizer.json that it was trained with, or `tokenizer` name it, got"
      f" no file {tokenizer}."
    )
  trained = with_flags(config, dataclasses.replace(cfg, param_dtype="float32"))
  return Source(cfg=trained, dtype=cfg.param_dtype, folder=folder, tokenizer=tokenizer)


def start_from(source: Source, train_step: TrainStep) -> TrainStep:
  """`train_step` whose first state has the parameters of `source`, read when it is made."""
  if source.folder is None:
    return train_step
  folder, mesh = source.folder, train_step.layout.mesh

  def init(key):
    _, _, params = load_hf(folder, mesh=mesh, param_dtype="float32")
    return hdee.branch(train_step, params).init(key)

  return dataclasses.replace(train_step, init=init)


def consensus(train_step: TrainStep, state: TrainState, dtype: Any) -> Any:
  """One model of all replicas: outer parameters where the method keeps them, else the mean.

  Wire: nothing over `replica`, or one float32 mean of the parameters where they differ.
  """
  state, varying = train_step.to_logical(state), train_step.logical_layout.varying

  def choose(params, opt_state):
    outer = jaxcomm.outer_params(opt_state)
    return params if outer is None else outer

  stacked = choose(varying.params, varying.opt_state)

  def merge(params):
    mean = jax.tree.map(lambda x, many: x.mean(0) if many else x, params, stacked)
    return jax.tree.map(lambda x: x.astype(dtype), mean)

  return jax.jit(merge)(choose(state.params, state.opt_state))


def export(path: pathlib.Path, source: Source, corpus: data.TextCorpus, make_params: Any) -> None:
  """Writes the folder `path`, all of it or nothing; one that is there is left as it is."""
  say = print if jax.process_index() == 0 else lambda *_, **__: None
  if path.exists():
    say(f"{path} is there already.", flush=True)
    return
  beside = pathlib.Path(source.tokenizer or corpus.tokenizer_path).parent
  files = {name: beside / name for name in TOKENIZER_FILES}
  entries = {"bos_token_id": corpus.eot_id, "eos_token_id": corpus.eot_id}
  if source.folder is not None:
    files["generation_config.json"] = source.folder / "generation_config.json"
    saved = json.loads((source.folder / "config.json").read_text())
    entries = {k: saved[k] for k in TOKEN_IDS if k in saved}
  files = {name: file for name, file in files.items() if file.is_file()}
  save_hf(
    make_params(),
    dataclasses.replace(source.cfg, param_dtype=source.dtype),
    path,
    entries=entries,
    files={**files, "tokenizer.json": corpus.tokenizer_path},
  )
  say(f"{path}: the fine-tuned model, {source.dtype}.", flush=True)


def main(config: Config) -> None:
  """Reads the folder, trains its model, and writes the folder that it has become."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  devices = start_devices(config)
  source = open_source(config)
  corpora = load_corpora(dataclasses.replace(config, tokenizer=source.tokenizer), source.cfg)
  train_step = start_from(source, build_step(config, source.cfg, devices))
  name = f"new {config.preset}" if source.folder is None else source.folder.resolve().name
  title = f"finetune_hf: {name}"
  result = run(config, build_task(config, source.cfg, corpora, train_step, title))
  if config.out is None or config.dry_run or (result is not None and result.terminated):
    return
  out = pathlib.Path(config.out)
  if result is not None:
    step, state = result.step, result.state
  else:  # it had finished, but perhaps was killed before this
    with Checkpoints(out / "checkpoints", train_step.logical_layout) as checkpoints:
      restored = checkpoints.restore()
    step, state = restored.step, train_step.from_logical(restored.state)
  make_params = functools.partial(consensus, train_step, state, source.dtype)
  export(out / f"hf-{step}", source, corpora[0], make_params)


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
