"""Runs beside each other in one folder: what scripts that compare have in common.

Each run has its own folder in `--out`. Finished ones are not run again, one that was stopped goes
on, and the report is made when all have finished.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from jaxcomm.training import RunConfig, RunFolder

ConfigT = TypeVar("ConfigT", bound=RunConfig)


def check_comparison(config: RunConfig) -> None:
  """Raises ValueError where flags do not make a comparison."""
  if config.out is None and not config.dry_run:
    raise ValueError("`out` must be given: the runs are kept there.")
  if config.eval_every < 1:
    raise ValueError(
      f"`eval_every` must be at least 1: evaluations are compared, got {config.eval_every}."
    )
  if config.replica_change is not None:
    raise ValueError(
      "`replica_change` is not for comparisons, whose runs share one history, got"
      f" {config.replica_change!r}."
    )
  if config.coordinator is not None:
    raise ValueError(
      f"`coordinator` must not be given: one process compares, got {config.coordinator!r}."
    )


def check_processes() -> None:
  """Raises ValueError if a launcher has started several processes."""
  if jax.process_count() > 1:
    raise ValueError(f"one process compares, got {jax.process_count()}: train_lm.py takes several.")


def compare(
  config: RunConfig,
  runs: Mapping[str, ConfigT],
  train: Callable[[ConfigT], Any],
  report: Callable[[RunFolder], None],
) -> None:
  """Trains `runs`, one after the other; `report` is called when all have finished.

  Args:
    config: of the comparison; with `dry_run` the runs are only compiled.
    runs: flags of each, by the name of its folder.
    train: a script's `main`.
    report: gets the folder of the comparison.
  """
  if config.dry_run:
    for run in runs.values():
      train(run)
      print(flush=True)
    return
  with open_folder(config) as folder:
    if all(train_in(folder.path / name, run, train) for name, run in runs.items()):
      report(folder)


@contextlib.contextmanager
def open_folder(config: RunConfig):
  """The folder `--out`, in which runs have theirs."""
  assert config.out is not None
  may_change, flags = config.free_on_resume, dataclasses.asdict(config)
  folder = RunFolder(config.out, flags, resume=config.resume, may_change=may_change)
  with contextlib.closing(folder):
    if config.resume:
      folder.continue_from(-1)  # records flags that have changed
    yield folder


def train_in(path: pathlib.Path, config: ConfigT, train: Callable[[ConfigT], Any]) -> bool:
  """Starts or continues the run in `path`, unless it has finished; whether it then has."""
  if not _finished(path, config.steps):
    resume = (path / "config.json").exists()
    train(dataclasses.replace(config, out=str(path), resume=resume))
    print(flush=True)
  return _finished(path, config.steps)  # not after SIGTERM


def _finished(path: pathlib.Path, steps: int) -> bool:
  try:
    return json.loads((path / "summary.json").read_text())["steps"] >= steps
  except FileNotFoundError:
    return False
