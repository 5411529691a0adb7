"""What a compiled program does: bytes on the wire."""

from jaxcomm.inspect._costs import Work
from jaxcomm.inspect._describe import describe_compiled
from jaxcomm.inspect._machines import H100, TPU_V5E, TPU_V5P, Machine
from jaxcomm.inspect._overlap_report import CollectiveOverlap, OverlapReport
from jaxcomm.inspect._report import Branch, CollectiveOp, WireReport
from jaxcomm.inspect._ring_bytes import (
  all_gather_bytes,
  all_reduce_bytes,
  all_to_all_bytes,
  collective_permute_bytes,
  reduce_scatter_bytes,
)
from jaxcomm.inspect._wire import collective_bytes
from jaxcomm.inspect.overlap import overlap_report
from jaxcomm.inspect.targets import Compilation, Target, compiling_for, current_compilation, target
from jaxcomm.inspect.timeline import Span, Timeline, modelled_timeline, sensitivity

__all__ = [
  "H100",
  "TPU_V5E",
  "TPU_V5P",
  "Branch",
  "CollectiveOp",
  "CollectiveOverlap",
  "Compilation",
  "Machine",
  "OverlapReport",
  "Span",
  "Target",
  "Timeline",
  "WireReport",
  "Work",
  "all_gather_bytes",
  "all_reduce_bytes",
  "all_to_all_bytes",
  "collective_bytes",
  "collective_permute_bytes",
  "compiling_for",
  "current_compilation",
  "describe_compiled",
  "modelled_timeline",
  "overlap_report",
  "reduce_scatter_bytes",
  "sensitivity",
  "target",
]
