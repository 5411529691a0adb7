"""Checkpoints with orbax: asynchronous, atomic, verified; replica changes only by name."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxcomm.training._layout import Layout, TrainState
from jaxcomm.training._replicas import (
  average_replicas,
  broadcast_replica,
  check_parts,
  map_masks,
)

_LOG = logging.getLogger(__name__)
_DIGEST = "digest.json"
# Besides itself what orbax writes with the commit: times and an empty mark, nothing of the state.
_UNCHECKED = frozenset((_DIGEST, "_CHECKPOINT_METADATA", "commit_success.txt"))
ReplicaChange = Literal["average_replicas", "broadcast_replica"]


class CheckpointError(ValueError):
  """A checkpoint that cannot be used as asked; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A restored checkpoint: the state, what `save` was given as `meta`, and its step."""

  step: int
  state: TrainState
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in a folder with one sub-folder per step.

  A save copies the state to the host, returns, and is written in the background; a folder appears
  under its final name only when it is complete, with a digest of every file, so a kill at any
  moment leaves the one before. The last `keep` checkpoints and the one with the lowest `eval_loss`
  are kept.

  As a context manager it waits for the last save and frees the threads.

  Per-replica leaves are stored with their leading replica axis, equal ones once. The same number
  of replicas may be restored on any mesh, also stacked on one device.

  Args:
    directory: folder of the checkpoints; made if missing.
    layout: of the state, from `TrainStep.layout`.
    keep: how many of the latest to keep, at least 2 (one may turn out damaged).
  """

  def __init__(self, directory: str | os.PathLike, layout: Layout, *, keep: int = 2):
    if keep < 2:
      raise ValueError(f"`keep` must be at least 2: the newest may be damaged, got {keep}.")
    self._directory = pathlib.Path(directory).absolute()
    self._layout = layout
    self._saving: tuple[int, float | None] | None = None  # step and its `eval_loss`
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True,
        preservation_policy=_LatestAndBest(self._directory, keep),
        async_options=ocp.AsyncOptions(post_finalization_callback=self._record_digest),
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *exc) -> None:
    try:
      self.close()
    except CheckpointError:
      if kind is None:
        raise  # else the error that ended the block says more

  def close(self) -> None:
    """Waits like `wait`, then frees the manager's threads."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # the failed save that `wait` has reported
        self._manager.close()

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, oldest first; not one that is being written."""
    return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdecimal())

  def save(
    self, step: int, state: TrainState, meta: dict[str, Any], *, eval_loss: float | None = None
  ) -> None:
    """Starts saving `state` as `step`; waits only for the save before.

    Args:
      step: the step that `state` is the result of.
      meta: JSON-able; holds the data iterator's state, counters and whatever resume needs.
      eval_loss: loss of this state on the evaluation data, if measured at this step.

    Raises:
      CheckpointError: this or the previous save failed, e.g. the disk is full.
      TypeError: `meta` is not JSON-able.
    """
    self.wait()
    record = {"replicas": self._layout.num_replicas, "leaves": _describe(state), "run": meta}
    json.dumps(record)  # what is no JSON raises here, not in orbax's thread
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_flatten(state)), meta=ocp.args.JsonSave(record)
    )
    self._saving = step, eval_loss
    try:
      self._manager.save(step, args=args, force=True)
    except OSError as e:
      raise self._not_written(e) from e

  def wait(self) -> None:
    """Blocks until nothing is being written.

    Raises:
      CheckpointError: the last save failed; earlier checkpoints are untouched.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as e:  # whatever a full disk makes the writers raise
      raise self._not_written(e) from e

  def _not_written(self, e: Exception) -> CheckpointError:
    step = self._saving[0] if self._saving else None
    return CheckpointError(
      f"the checkpoint of step {step} under {self._directory} could not be written"
      f" ({_first_line(e)}); complete ones: {self.steps or 'none'}."
    )

  def _record_digest(self) -> None:
    """Called by orbax in its thread, on one process, after the last write, before the commit."""
    assert self._saving is not None
    step, eval_loss = self._saving
    [folder] = self._directory.glob(f"{step}.orbax-checkpoint-tmp*")
    record = {"eval_loss": eval_loss, "files": _digest(folder)}
    (folder / _DIGEST).write_text(json.dumps(record))

  def restore(
    self, *, step: int | None = None, replica_change: ReplicaChange | None = None
  ) -> Restored:
    """The newest checkpoint that is whole; damaged ones are set aside with a warning.

    Args:
      step: only this one of `steps`, e.g. the one with the best evaluation; default the newest.
      replica_change: how to go from the saved number of replicas to another:
        `"average_replicas"` (all start from the mean) or `"broadcast_replica"` (all start from
        replica 0). None refuses.

    Raises:
      CheckpointError: no checkpoint, none whole, one that may not or cannot be read for a reason
        that is not damage, another method or model, or another number of replicas without
        `replica_change`.
    """
    candidates = self.steps if step is None else [s for s in self.steps if s == step]
    for candidate in reversed(candidates):
      try:
        _verify_digest(self._directory / str(candidate))
        restored = self._restore_step(candidate, replica_change)
      except CheckpointError:
        raise
      except Exception as e:  # whatever a damaged file makes the readers raise
        _check_damage(candidate, e)
        continue
      self._set_aside([s for s in candidates if s > candidate])
      return restored
    found = f"steps {candidates} are all damaged" if candidates else "there is none"
    if step is not None and not candidates:
      found = f"`step` must be one of {self.steps}, got {step}"
    raise CheckpointError(f"no usable checkpoint in {self._directory}: {found}.")

  def _restore_step(self, step: int, replica_change: ReplicaChange | None) -> Restored:
    saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    record = saved["meta"]
    layout, num_replicas = self._layout, record["replicas"]
    if num_replicas != layout.num_replicas and replica_change is None:
      raise CheckpointError(
        f"the checkpoint holds {num_replicas} replicas, this run has {layout.num_replicas}: what"
        " each replica learnt since the last exchange has no unique place there. Ask for"
        " average_replicas or broadcast_replica (--replica-change)."
      )
    if num_replicas != layout.num_replicas:
      _check_parts(layout)
    shapes = _with_replicas(layout, num_replicas)
    _check_leaves(record["leaves"], _describe(shapes), step)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_flatten(shapes)))
    flat = self._manager.restore(step, args=args)["state"]
    state = jax.tree.unflatten(jax.tree.structure(shapes), [flat[k] for k in _flatten(shapes)])
    if num_replicas != layout.num_replicas:
      averages = replica_change == "average_replicas"
      state = (average_replicas if averages else broadcast_replica)(state, layout)
    return Restored(step, state, record["run"])

  def _set_aside(self, steps: list[int]) -> None:
    """Renames damaged checkpoints, so that their steps can be saved again; deletes nothing."""
    if not steps:
      return
    _wait_for_all("every process has restored")
    if jax.process_index() == 0:
      for step in steps:
        path = self._directory / str(step)
        target = path.with_name(f"damaged-{step}")
        number = 1
        while target.exists():
          target = path.with_name(f"damaged-{step}-{number}")
          number += 1
        path.rename(target)
        _LOG.warning("moved the damaged checkpoint of step %d to %s.", step, target)
    _wait_for_all("damaged checkpoints are set aside")
    self._manager.reload()


class _LatestAndBest:
  """Which checkpoints orbax may not delete: the newest, and that of lowest `eval_loss`."""

  def __init__(self, directory: pathlib.Path, num_latest: int):
    self._directory, self._num_latest = directory, num_latest

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = sorted(c.step for c in checkpoints)
    losses = {step: _eval_loss(self._directory / str(step)) for step in steps}
    best = [s for s in steps if losses[s] == min(losses.values()) < math.inf][:1]
    kept = {*steps[-self._num_latest :], *best}
    return [c.step in kept for c in checkpoints]


def _eval_loss(path: pathlib.Path) -> float:
  """As recorded; infinite if it was not measured, or is damaged."""
  try:
    loss = float(json.loads((path / _DIGEST).read_text())["eval_loss"])
  except (OSError, ValueError, KeyError, TypeError):
    return math.inf
  return math.inf if math.isnan(loss) else loss


def _wait_for_all(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def _flatten(state: Any) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(state: Any) -> dict[str, list]:
  return {k: [list(x.shape), str(x.dtype)] for k, x in _flatten(state).items()}


def _with_replicas(layout: Layout, num_replicas: int) -> TrainState:
  """The state's shapes as saved by `num_replicas`; unstacked on this mesh where they differ."""
  if num_replicas == layout.num_replicas:
    return layout.shapes

  def leaf(shape, varies):
    if not varies:
      return shape
    spec = jax.P(None, *shape.sharding.spec[1:])
    sharding = jax.NamedSharding(layout.mesh, spec)
    return jax.ShapeDtypeStruct((num_replicas, *shape.shape[1:]), shape.dtype, sharding=sharding)

  def mask(shape):
    return jax.ShapeDtypeStruct((num_replicas,), shape.dtype, sharding=shape.sharding)

  return map_masks(mask, jax.tree.map(leaf, layout.shapes, layout.varying))


def _check_parts(layout: Layout) -> None:
  try:
    check_parts(layout.shapes)
  except ValueError as e:
    raise CheckpointError(str(e)) from e


def _check_leaves(saved: dict[str, list], wanted: dict[str, list], step: int) -> None:
  if saved == wanted:
    return
  names = sorted(saved.keys() | wanted.keys())
  wrong = [n for n in names if saved.get(n) != wanted.get(n)]
  shown = "; ".join(f"{n}: saved {saved.get(n)}, here {wanted.get(n)}" for n in wrong[:3])
  raise CheckpointError(
    f"the checkpoint of step {step} is of another model or method: {len(wrong)} of"
    f" {len(names)} arrays differ ({shown})."
  )


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in path.rglob("*") if p.is_file() and p.name not in _UNCHECKED)


def _digest(path: pathlib.Path) -> dict[str, str]:
  digests = {}
  for file in _files(path):
    with file.open("rb") as f:
      digests[file.relative_to(path).as_posix()] = hashlib.file_digest(f, "blake2b").hexdigest()
  return digests


def _verify_digest(path: pathlib.Path) -> None:
  """Raises if a file, or the record of the digests, is not what was written."""
  recorded, now = json.loads((path / _DIGEST).read_text())["files"], _digest(path)
  wrong = [name for name in recorded if recorded[name] != now.get(name)]
  if wrong:
    raise OSError(f"{wrong[0]} is not what was written")


def _check_damage(step: int, error: Exception) -> None:
  """Warns of a damaged checkpoint; raises if it may well be whole and only cannot be read here."""
  if isinstance(error, PermissionError | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
    raise CheckpointError(
      f"the checkpoint of step {step} could not be read ({_first_line(error)}); nothing was"
      " changed."
    ) from error
  _LOG.warning(
    "checkpoint of step %d is damaged (%s); trying the one before.", step, _first_line(error)
  )


def _first_line(e: BaseException) -> str:
  lines = str(e).strip().splitlines()
  return f"{type(e).__name__}: {lines[0][:200] if lines else ''}"


def tree_digest(tree: Any) -> str:
  """A hash of all leaves: equal if names, shapes, dtypes and bits are.

  Example:
    >>> import numpy as np
    >>> tree_digest({"a": np.ones(2)}) == tree_digest({"a": np.ones(2)})
    True
  """
  h = hashlib.blake2b()
  for name, leaf in _flatten(tree).items():
    x = np.asarray(leaf)
    h.update(f"{name} {x.shape} {x.dtype} ".encode() + x.tobytes())
  return h.hexdigest()
