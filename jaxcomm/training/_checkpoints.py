"""Checkpoints with orbax: asynchronous, atomic, verified; replica changes only by name."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jaxcomm.training._layout import Layout, TrainState
from jaxcomm.training._replicas import average_replicas, broadcast_replica

_LOG = logging.getLogger(__name__)
_DIGEST = "digest.json"
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
  under its final name only when it is complete, so a kill at any moment leaves the one before.
  Every file's digest is recorded after the commit. The last `keep` checkpoints and the one with
  the lowest `eval_loss` are kept.

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
    best = checkpoint_managers.BestN(
      get_metric_fn=lambda metrics: metrics["eval_loss"],
      reverse=True,
      n=1,
      keep_checkpoints_without_metrics=False,
    )
    policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep), best])
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        cleanup_tmp_directories=True, preservation_policy=policy
      ),
    )

  def close(self) -> None:
    """Frees the manager's threads."""
    self._manager.close()

  @property
  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

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
    """
    self.wait()
    meta = {"replicas": self._layout.num_replicas, "leaves": _describe(state), **meta}
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_flatten(state)), meta=ocp.args.JsonSave(meta)
    )
    metrics = None if eval_loss is None else {"eval_loss": eval_loss}
    try:
      self._manager.save(step, args=args, metrics=metrics, force=True)
    except OSError as e:
      raise CheckpointError(f"checkpoint of step {step} not written: {e}") from e

  def wait(self) -> None:
    """Blocks until nothing is being written.

    Raises:
      CheckpointError: the last save failed; earlier checkpoints are untouched.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as e:
      raise CheckpointError(
        f"a checkpoint under {self._directory} could not be written ({_first_line(e)});"
        f" complete ones: {self.steps}."
      ) from e
    if jax.process_index() == 0:
      for step in self.steps:
        _record_digest(self._directory / str(step))

  def restore(self, *, replica_change: ReplicaChange | None = None) -> Restored:
    """The newest checkpoint that is whole; damaged ones are set aside with a warning.

    Args:
      replica_change: how to go from the saved number of replicas to another:
        `"average_replicas"` (all start from the mean) or `"broadcast_replica"` (all start from
        replica 0). None refuses.

    Raises:
      CheckpointError: no checkpoint, none whole, another method or model, or another number of
        replicas without `replica_change`.
    """
    steps = self.steps
    for step in reversed(steps):
      try:
        _verify_digest(self._directory / str(step))
        restored = self._restore_step(step, replica_change)
      except CheckpointError:
        raise
      except Exception as e:  # whatever a damaged file makes the readers raise
        _LOG.warning(
          "checkpoint of step %d is damaged (%s); trying the one before.", step, _first_line(e)
        )
        continue
      self._set_aside([s for s in steps if s > step])
      return restored
    found = f"steps {steps} are all damaged" if steps else "there is none"
    raise CheckpointError(f"no usable checkpoint in {self._directory}: {found}.")

  def _restore_step(self, step: int, replica_change: ReplicaChange | None) -> Restored:
    saved = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
    meta = saved["meta"]
    layout, num_replicas = self._layout, meta["replicas"]
    if num_replicas != layout.num_replicas and replica_change is None:
      raise CheckpointError(
        f"the checkpoint holds {num_replicas} replicas, this run has {layout.num_replicas}: what"
        " each replica learnt since the last exchange has no unique place there. Ask for"
        " average_replicas or broadcast_replica."
      )
    shapes = _with_replicas(layout, num_replicas)
    _check_leaves(meta["leaves"], _describe(shapes), step)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(_flatten(shapes)))
    flat = self._manager.restore(step, args=args)["state"]
    state = jax.tree.unflatten(jax.tree.structure(shapes), [flat[k] for k in _flatten(shapes)])
    if num_replicas != layout.num_replicas:
      change = {"average_replicas": average_replicas, "broadcast_replica": broadcast_replica}
      state = change[replica_change](state, layout)
    return Restored(step, state, meta)

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

  return jax.tree.map(leaf, layout.shapes, layout.varying)


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
  return sorted(p for p in path.rglob("*") if p.is_file() and p.name != _DIGEST)


def _digest(path: pathlib.Path) -> dict[str, str]:
  digests = {}
  for file in _files(path):
    with file.open("rb") as f:
      digests[file.relative_to(path).as_posix()] = hashlib.file_digest(f, "blake2b").hexdigest()
  return digests


def _record_digest(path: pathlib.Path) -> None:
  target = path / _DIGEST
  if target.exists():
    return
  temporary = target.with_suffix(".tmp")
  temporary.write_text(json.dumps(_digest(path)))
  os.replace(temporary, target)


def _verify_digest(path: pathlib.Path) -> None:
  """Raises if a file differs from what was committed; a kill may have left no record."""
  try:
    recorded = json.loads((path / _DIGEST).read_text())
  except FileNotFoundError:
    return
  now = _digest(path)
  wrong = [name for name in recorded if recorded[name] != now.get(name)]
  if wrong:
    raise OSError(f"{wrong[0]} is not what was written")


def _first_line(e: BaseException) -> str:
  lines = str(e).strip().splitlines()
  return f"{type(e).__name__}: {lines[0][:200] if lines else ''}"


def tree_digest(tree: Any) -> str:
  """A hash of all leaves' bits: equal trees have equal digests.

  Example:
    >>> import numpy as np
    >>> tree_digest({"a": np.ones(2)}) == tree_digest({"a": np.ones(2)})
    True
  """
  h = hashlib.blake2b()
  for name, leaf in _flatten(tree).items():
    h.update(name.encode() + np.asarray(leaf).tobytes())
  return h.hexdigest()
