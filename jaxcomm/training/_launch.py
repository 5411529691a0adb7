"""Starting a script: flags, devices, processes, and errors in one line."""

import contextlib
import dataclasses
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

from jaxcomm.training._checkpoints import CheckpointError, ReplicaChange
from jaxcomm.training._compiler_options import parse_options
from jaxcomm.training._loop import NonFiniteLossError
from jaxcomm.training._profile import parse_window
from jaxcomm.training._run_folder import load_config
from jaxcomm.training._trackers import check_installed

_EXPECTED = (ValueError, OSError, ImportError, NonFiniteLossError, CheckpointError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Flags that every training script has.

  `free_on_resume` names those that change neither the trajectory of a run, but for the order of
  sums, nor what its checkpoints hold.
  """

  free_on_resume: ClassVar[frozenset[str]] = frozenset(
    (
      "compiler_options", "coordinator", "data_parallel", "dry_run", "eval_every", "fsdp", "keep",
      "log_every", "max_devices", "num_processes", "out", "process_id", "profile_steps",
      "replica_change", "resume", "save_every", "seq_shards", "stages", "steps", "tensor",
      "tensorboard", "wandb",
    )
  )  # fmt: skip

  steps: int = 300
  """optimizer steps in all"""
  seed: int = 0
  """of initial weights, data order and stochastic rounding"""
  replicas: int = 4
  """replicas that exchange over the slow link"""
  data_parallel: int = 1
  """devices per replica that share its batch"""
  fsdp: int = 1
  """devices per replica that share its batch and its parameters"""
  stages: int = 1
  """devices among which the layers are cut, as a pipeline"""
  seq_shards: int = 1
  """devices that share the tokens of each sequence"""
  tensor: int = 1
  """devices that share heads, feed-forward and vocabulary of each layer"""
  out: str | None = None
  """run folder: metrics, checkpoints, plot"""
  resume: bool = False
  """continue the run in --out; flags not given are taken from it"""
  replica_change: ReplicaChange | None = None
  """with --resume and another number of --replicas: how to go from the old to the new"""
  dry_run: bool = False
  """compile only: memory, bytes on the wire, break-even link speed"""
  log_every: int = 10
  """steps between two lines of metrics.jsonl"""
  eval_every: int = 100
  """steps between two evaluations; 0 for never"""
  save_every: int = 100
  """steps between two checkpoints; 0: only at the end"""
  keep: int = 2
  """latest checkpoints to keep, besides the best"""
  tensorboard: bool = False
  """also write TensorBoard events, to tensorboard/ in --out"""
  wandb: str | None = None
  """also log to this project of Weights & Biases"""
  profile_steps: str | None = None
  """START:STOP: trace these steps (from 1; without STOP) into profile/ in --out"""
  max_devices: int | None = None
  """use at most so many devices; replicas that find no room are stacked"""
  compiler_options: list[str] = dataclasses.field(default_factory=list)
  """xla_name=value: of XLA, beside or instead of those under which communication overlaps"""
  coordinator: str | None = None
  """HOST:PORT of process 0, for several processes (default: what jax.distributed detects)"""
  num_processes: int | None = None
  """number of processes"""
  process_id: int | None = None
  """number of this process, from 0"""

  def __post_init__(self):
    for name in ("steps", "replicas", *REPLICA_SIZES):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    for name in ("seed", "log_every", "eval_every", "save_every"):
      if getattr(self, name) < 0:
        raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")
    if self.keep < 2:
      raise ValueError(f"`keep` must be at least 2: the newest may be damaged, got {self.keep}.")
    if self.max_devices is not None and self.max_devices < 1:
      raise ValueError(f"`max_devices` must be at least 1, got {self.max_devices}.")
    if self.resume and self.out is None:
      raise ValueError("`resume` needs `out`, the folder of the run to continue.")
    if self.replica_change is not None and not self.resume:
      raise ValueError(f"`replica_change` needs `resume`, got {self.replica_change!r} without.")
    for name in ("tensorboard", "wandb", "profile_steps"):
      if getattr(self, name) and self.out is None:
        raise ValueError(f"`{name}` needs `out`, the folder to write to.")
    if self.wandb == "":
      raise ValueError("`wandb` must name a project, got ''.")
    if self.profile_steps is not None and parse_window(self.profile_steps)[0] > self.steps:
      raise ValueError(
        f"`profile_steps` must begin at most at `steps` = {self.steps}, got {self.profile_steps!r}."
      )
    parse_options(self.compiler_options)
    several = (self.coordinator, self.num_processes, self.process_id)
    if any(x is not None for x in several) and any(x is None for x in several):
      raise ValueError(
        f"`coordinator`, `num_processes` and `process_id` must be given together, got {several}."
      )
    if self.num_processes is not None and not 0 <= (self.process_id or 0) < self.num_processes:
      raise ValueError(
        f"`process_id` must be in [0, `num_processes`={self.num_processes}), got {self.process_id}."
      )

  @property
  def devices_per_replica(self) -> int:
    """Places on the mesh of one replica."""
    return math.prod(getattr(self, name) for name in REPLICA_SIZES)

  @property
  def row_shards(self) -> int:
    """Parts into which the rows of a batch are cut."""
    return self.replicas * self.data_parallel * self.fsdp


# Flags whose product is the number of devices of one replica.
REPLICA_SIZES = ("data_parallel", "fsdp", "stages", "seq_shards", "tensor")

# Of one start, not of the run: another start may have other processes.
_NEVER_KEPT = frozenset(
  (
    "coordinator", "dry_run", "num_processes", "out", "process_id", "profile_steps",
    "replica_change", "resume",
  )
)  # fmt: skip

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def launch(
  config_type: type[ConfigT],
  main: Callable[[ConfigT], Any],
  argv: Sequence[str] | None = None,
  *,
  description: str | None = None,
) -> None:
  """Parses flags, runs `main`, and turns expected errors into one line.

  The exit code is then 1, or 2 if the flags cannot be parsed.

  With `--resume` the flags not given are those of the run in `--out`. Set JAXCOMM_DEBUG=1 for the
  full traceback of an error.

  Args:
    config_type: frozen dataclass of flags.
    main: called with the parsed flags.
    argv: default the command line.
    description: text of `--help`.
  """
  argv = sys.argv[1:] if argv is None else list(argv)
  try:
    config = parse_flags(config_type, argv, description=description)
    check_installed(tensorboard=config.tensorboard, wandb=config.wandb is not None)
    if not os.environ.get("JAXCOMM_DEBUG"):
      _quiet_threads()
    main(config)
  except _EXPECTED as e:
    if os.environ.get("JAXCOMM_DEBUG"):
      raise
    message = " ".join(str(e).split()) or type(e).__name__
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2 if isinstance(e, _UsageError) else 1) from e


def _quiet_threads() -> None:
  """Hides the tracebacks that orbax's threads print of a failed save: one line reports it."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  show = sys.unraisablehook

  def hook(unraisable):
    if "Event loop is closed" not in str(unraisable.exc_value):
      show(unraisable)

  if show is sys.__unraisablehook__:
    sys.unraisablehook = hook


class _UsageError(ValueError):
  """Flags that cannot be parsed."""


def parse_flags(
  config_type: type[ConfigT],
  argv: Sequence[str],
  *,
  default: ConfigT | None = None,
  description: str | None = None,
) -> ConfigT:
  """`tyro.cli`, with the box that it draws around an error turned into a sentence.

  Args:
    config_type: frozen dataclass of flags.
    argv: the flags.
    default: what holds where a flag is not given; by default that of the field, or with
      `--resume` the flag of the run in `--out`.
    description: text of `--help`.

  Raises:
    ValueError: flags that cannot be parsed, or that `config_type` refuses.

  Example:
    >>> from jaxcomm.training import RunConfig, parse_flags
    >>> flags = parse_flags(RunConfig, ["--steps", "5"], default=RunConfig(steps=3, seed=2))
    >>> flags.steps, flags.seed
    (5, 2)
  """
  import tyro

  start: Any = _saved_flags(config_type, argv) if default is None else default

  def parse():
    return tyro.cli(config_type, args=argv, default=start, description=description)

  try:
    with contextlib.redirect_stderr(io.StringIO()):
      return parse()
  except SystemExit as e:
    if e.code != 2:
      raise
  box = io.StringIO()
  with contextlib.redirect_stderr(box), _wide_terminal(), contextlib.suppress(SystemExit):
    parse()
  raise _UsageError(_sentence(box.getvalue(), config_type.__name__))


@contextlib.contextmanager
def _wide_terminal():
  """No line is broken meanwhile."""
  before = os.environ.get("COLUMNS")
  os.environ["COLUMNS"] = "100000"
  try:
    yield
  finally:
    os.environ.pop("COLUMNS")
    if before is not None:
      os.environ["COLUMNS"] = before


def _sentence(box: str, name: str) -> str:
  """The sections of a box but the last, which tells of --help, on one line."""
  sections = [""]
  for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:]:  # below the title
    text = line.strip("│╰╯ ")
    if set(text) <= set("─-"):  # a rule; where only ASCII can be printed there are no sides
      sections.append("")
    else:
      sections[-1] += f" {text}"
  kept = [section.strip() for section in sections if section][:-1]
  return "; ".join(kept).removeprefix(f"Error parsing {name}: ") + " (--help lists the flags)"


def _saved_flags(config_type: type[ConfigT], argv: Sequence[str]) -> Any:
  import argparse

  import tyro

  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument("--out", nargs="?")  # tyro says what is wrong without a value
  first.add_argument("--resume", action="store_true")
  known, _ = first.parse_known_args(argv)
  if not known.resume or known.out is None or "--help" in argv or "-h" in argv:
    return tyro.MISSING_NONPROP
  saved = load_config(known.out)
  fields = {f.name for f in dataclasses.fields(config_type)}
  if unknown := sorted(saved.keys() - fields):
    raise ValueError(f"{known.out}/config.json has flags that this script lacks: {unknown}.")
  kept = {k: v for k, v in saved.items() if k not in _NEVER_KEPT}
  try:
    return config_type(**kept, out=known.out)
  except (TypeError, ValueError) as e:
    raise ValueError(f"{known.out}/config.json does not hold the flags of a run: {e}") from e
