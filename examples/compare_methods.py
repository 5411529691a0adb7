"""Compare methods of `train_lm.py` at equal tokens: loss against steps, bytes and modelled time.

    python examples/compare_methods.py --out runs/compare
    python examples/compare_methods.py --out runs/compare --resume         # after any kind of stop
    python examples/compare_methods.py --methods diloco noloco --dry-run   # bytes, without a step
    python examples/compare_methods.py --out runs/tuned --preset nano --steps 1000 --methods \\
        ddp "diloco --sync-period 50 --lr 2e-3" "streaming_diloco --alpha 0.2"

Every run is one of `train_lm.py` and has its folder in `--out`; finished ones are not run again.
Beside them are `report.png`, `comparison.csv` and `summary.json`.

The time of n steps over a link of v bit/s is modelled as n * t + 8 * b / v: t is the median time of
a step on the devices used here, b what a device sends over `replica` in the n steps. Latency is
left out, and nothing is granted for overlap, which would hide part of b. Where replicas share the
cores of one machine, t is the time of all of them together.

The default (1.0M parameters, 4 replicas, 120 steps of four methods) takes about two minutes on two
cores. Over 10 Mbit/s a step of `ddp` then needs 4.7 s for its 5.86 MB, one of `diloco` 0.03 s.
"""

import dataclasses
import functools
import math
import shlex
from typing import Annotated, Any, ClassVar, Literal

import tyro
from compare_report import draw, format_table, read_run, table, write_csv
from compare_runs import check_comparison, check_processes, compare
from lm_methods import MethodConfig
from train_lm import Config
from train_lm import main as train

from jaxcomm.training import RunConfig, RunFolder, launch, parse_flags, start_devices

# What a method may be given for itself: everything else is the same for all.
_OF_METHODS = {f.name for f in dataclasses.fields(MethodConfig)} - {
  f.name for f in dataclasses.fields(RunConfig)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
  """Flags of `compare_methods.py`: its own, and those of `train_lm.py`, for all methods."""

  free_on_resume: ClassVar[frozenset[str]] = Config.free_on_resume | {"methods", "link_mbits"}

  methods: list[str] = dataclasses.field(
    default_factory=lambda: ["ddp", "diloco", "noloco", "none"]
  )
  """each a --method of train_lm.py, or in quotes with flags for it: "diloco --sync-period 50\""""
  link_mbits: list[float] = dataclasses.field(default_factory=lambda: [10.0, 100.0, 1000.0])
  """link speeds of the modelled time, Mbit/s"""
  method: Annotated[Literal["diloco"], tyro.conf.Suppress] = "diloco"
  steps: int = 120
  eval_every: int = 20

  def __post_init__(self):
    super().__post_init__()
    check_comparison(self)
    if not self.link_mbits or not all(0 < v < math.inf for v in self.link_mbits):
      raise ValueError(
        f"`link_mbits` must be positive numbers, at least one, got {self.link_mbits}."
      )
    _ = self.runs  # refuses methods before the first is run

  @functools.cached_property
  def runs(self) -> dict[str, Config]:
    """The flags of each run, by the name of its folder.

    Raises:
      ValueError: `methods` has an item that `train_lm.py` would refuse, that changes a flag which
        is not one of methods, or that is there twice.
    """
    shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(Config)}
    base = dataclasses.replace(Config(**shared), resume=False)
    runs = {}
    for item in self.methods:
      parts = shlex.split(item)
      config = parse_flags(Config, ["--method", *parts], default=base)
      changed = {k for k in shared if getattr(config, k) != getattr(base, k)}
      if others := sorted(changed - _OF_METHODS):
        raise ValueError(
          f"`methods` must be given flags of methods only, got {item!r} with {others}."
        )
      name = "_".join(part.lstrip("-") for part in parts)
      if name in runs:
        raise ValueError(f"`methods` must differ, got {item!r} twice.")
      runs[name] = config
    if not runs:
      raise ValueError("`methods` must name at least one, got none.")
    return runs


def main(config: CompareConfig) -> None:
  """Trains with one method after the other, and compares them."""
  if config.schedule_steps is None:
    config = dataclasses.replace(config, schedule_steps=config.steps)
  start_devices(config)
  check_processes()
  compare(config, config.runs, train, functools.partial(report, config=config))


def report(folder: RunFolder, config: CompareConfig) -> None:
  """Draws and prints the comparison, and leaves it in the folder."""
  tokens = config.batch_size * config.seq_len
  runs = [read_run(folder.path / name, tokens) for name in config.runs]
  title = (
    f"{config.preset} {config.model}, {config.replicas} replicas, {config.steps} steps of {tokens}"
    f" tokens, seed {config.seed}"
  )
  draw(folder.path / "report.png", runs, config.link_mbits, title)
  rows = table(runs, config.link_mbits)
  write_csv(folder.path / "comparison.csv", rows)
  folder.summarise({"title": title, "runs": rows})
  print(f"{title}\n{format_table(rows)}")
  print(f"{folder.path}: report.png, comparison.csv, summary.json", flush=True)


if __name__ == "__main__":
  launch(CompareConfig, main, description=__doc__)
