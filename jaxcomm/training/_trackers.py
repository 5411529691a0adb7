"""Where rows go besides metrics.jsonl: TensorBoard and Weights & Biases."""

import importlib
import importlib.util
import json
import pathlib
import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol


class Tracker(Protocol):
  """Takes the rows of a run while it goes on."""

  def log(self, row: dict[str, Any]) -> None:
    """Takes a row of metrics.jsonl."""
    ...

  def close(self, *, summary: dict[str, Any] | None = None, failed: bool = False) -> None:
    """Writes what is left; `summary` if the run has finished."""
    ...


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
  """Raises ImportError with the pip command if a package is missing; imports nothing."""
  wanted = {
    "tensorboard": (tensorboard, "tensorboardX", "train"),
    "wandb": (wandb, "wandb", "wandb"),
  }
  for flag, (asked, module, extra) in wanted.items():
    spec = importlib.util.find_spec(module) if asked else None
    if asked and (spec is None or spec.origin is None):  # a folder of logs is no package
      raise ImportError(f'--{flag} needs `{module}`: pip install "jaxcomm[{extra}]"')


class Trackers:
  """Hands rows to several trackers; a context manager that closes them all.

  Args:
    trackers: may be none.

  Attributes:
    summary: set it once the run has finished.
  """

  def __init__(self, trackers: Sequence[Tracker]):
    self.summary: dict[str, Any] | None = None
    self._trackers = trackers

  def __enter__(self):
    return self

  def __exit__(self, kind, *exc):
    self.close(summary=self.summary, failed=kind is not None)

  def log(self, row: dict[str, Any]) -> None:
    """Hands on a row."""
    for tracker in self._trackers:
      tracker.log(row)

  def close(self, *, summary: dict[str, Any] | None = None, failed: bool = False) -> None:
    """Closes all."""
    for tracker in self._trackers:
      tracker.close(summary=summary, failed=failed)


class TensorBoard:
  """Scalars as TensorBoard event files, on disk as soon as they are logged.

  Args:
    path: folder of the event files.
    rows: what the run logged up to its checkpoint, written if the folder holds no events yet.
    first_step: of the rows to come; events of an earlier start from there on are void.
  """

  def __init__(self, path: pathlib.Path, rows: Sequence[dict[str, Any]], first_step: int):
    from tensorboardX.event_file_writer import EventsWriter

    protocol = importlib.import_module("tensorboardX.proto.event_pb2")
    summary = importlib.import_module("tensorboardX.proto.summary_pb2")
    self._event, self._summary = protocol.Event, summary.Summary
    path.mkdir(parents=True, exist_ok=True)
    fresh = not any(path.glob("events.*"))
    self._writer = EventsWriter(str(path / "events"))  # not SummaryWriter: its thread lags behind
    start = protocol.SessionLog(status=protocol.SessionLog.START)
    self._write(self._event(step=first_step, session_log=start))
    for row in rows if fresh else ():
      self.log(row)

  def log(self, row: dict[str, Any]) -> None:
    """Writes one scalar for each number of `row`."""
    numbers = [(k, v) for k, v in row.items() if k != "step"]
    values = [self._summary.Value(tag=k, simple_value=v) for k, v in numbers]
    self._write(self._event(step=row["step"], summary=self._summary(value=values)))

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
    self._writer.flush()

  def close(self, *, summary: dict[str, Any] | None = None, failed: bool = False) -> None:
    """Closes the file."""
    del summary, failed
    self._writer.close()


class WandB:
  """A run of Weights & Biases, whose id is kept in the run folder.

  Rows that W&B has got from an earlier start are not sent again. Offline it cannot know: then the
  log of each start, in `wandb/latest-run`, is that of the whole run.

  Args:
    folder: the run folder; W&B's own files go to `wandb` in it.
    project: W&B project.
    config: flags of the run.
    rows: what the run logged up to its checkpoint.

  Raises:
    ValueError: W&B cannot start, for example because nobody has logged in.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    project: str,
    config: dict[str, Any],
    rows: Sequence[dict[str, Any]],
  ):
    wandb = importlib.import_module("wandb")
    file = folder / "wandb.json"
    run_id = json.loads(file.read_text())["id"] if file.exists() else uuid.uuid4().hex[:12]
    try:
      self._run = wandb.init(
        project=project,
        id=run_id,
        name=folder.resolve().name,
        dir=str(folder),
        config=config,
        resume="allow",
      )
    except wandb.Error as e:
      raise ValueError(f"`wandb` could not start the run: {e}") from e
    file.write_text(json.dumps({"project": project, "id": run_id}) + "\n")
    self._next = self._run.step  # the first that W&B has not got
    for row in rows:
      self.log(row)

  def log(self, row: dict[str, Any]) -> None:
    """Sends a row, unless an earlier start has."""
    if row["step"] >= self._next:
      self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

  def close(self, *, summary: dict[str, Any] | None = None, failed: bool = False) -> None:
    """Sends what is left and ends W&B's run."""
    if summary is not None:
      self._run.summary.update(summary)
    self._run.finish(exit_code=int(failed))
