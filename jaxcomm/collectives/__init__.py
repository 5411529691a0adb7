"""How a message travels: means over a mesh axis with compressed payloads on the wire."""

from jaxcomm.collectives._one_hop import (
  allgather_pmean,
  allgather_pmean_bytes,
  allgather_pmean_with_error,
)
from jaxcomm.collectives._quantized_pmean import quantized_pmean, quantized_pmean_bytes
from jaxcomm.collectives._two_hop import (
  compressed_pmean,
  compressed_pmean_bytes,
  compressed_pmean_with_error,
)

__all__ = [
  "allgather_pmean",
  "allgather_pmean_bytes",
  "allgather_pmean_with_error",
  "compressed_pmean",
  "compressed_pmean_bytes",
  "compressed_pmean_with_error",
  "quantized_pmean",
  "quantized_pmean_bytes",
]
