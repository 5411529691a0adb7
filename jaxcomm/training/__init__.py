"""Training: the step builder, the loop, checkpoints and run folders."""

from jaxcomm.training._checkpoints import (
  CheckpointError,
  Checkpoints,
  ReplicaChange,
  Restored,
  tree_digest,
)
from jaxcomm.training._compiler_options import overlap_options
from jaxcomm.training._devices import start_devices
from jaxcomm.training._launch import RunConfig, launch, parse_flags
from jaxcomm.training._layout import Layout, TrainState
from jaxcomm.training._loop import Loop, LoopConfig, LoopResult, NonFiniteLossError
from jaxcomm.training._progress import Progress, format_bytes
from jaxcomm.training._replicas import average_replicas, broadcast_replica
from jaxcomm.training._report import PLOT_STYLE, plot_report
from jaxcomm.training._run import Task, run
from jaxcomm.training._run_folder import RunFolder, RunFolderError, load_config, read_metrics
from jaxcomm.training._step import TrainStep, make_train_step
from jaxcomm.training._wire import StepWire, bytes_over_replica, step_wire

__all__ = [
  "PLOT_STYLE",
  "CheckpointError",
  "Checkpoints",
  "Layout",
  "Loop",
  "LoopConfig",
  "LoopResult",
  "NonFiniteLossError",
  "Progress",
  "ReplicaChange",
  "Restored",
  "RunConfig",
  "RunFolder",
  "RunFolderError",
  "StepWire",
  "Task",
  "TrainState",
  "TrainStep",
  "average_replicas",
  "broadcast_replica",
  "bytes_over_replica",
  "format_bytes",
  "launch",
  "load_config",
  "make_train_step",
  "overlap_options",
  "parse_flags",
  "plot_report",
  "read_metrics",
  "run",
  "start_devices",
  "step_wire",
  "tree_digest",
]
