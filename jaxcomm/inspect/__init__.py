"""What a compiled program does: bytes on the wire."""

from jaxcomm.inspect._report import Branch, CollectiveOp, WireReport
from jaxcomm.inspect._ring_bytes import (
  all_gather_bytes,
  all_reduce_bytes,
  all_to_all_bytes,
  collective_permute_bytes,
  reduce_scatter_bytes,
)
from jaxcomm.inspect._wire import collective_bytes

__all__ = [
  "Branch",
  "CollectiveOp",
  "WireReport",
  "all_gather_bytes",
  "all_reduce_bytes",
  "all_to_all_bytes",
  "collective_bytes",
  "collective_permute_bytes",
  "reduce_scatter_bytes",
]
