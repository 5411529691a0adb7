"""What a message is: maps from arrays to payloads of fewer bytes, and back."""

from jaxcomm.compressors._base import Compressor, Payload
from jaxcomm.compressors._block_int import BlockInt, int4, int8
from jaxcomm.compressors._e3m0 import E3M0, e3m0
from jaxcomm.compressors._identity import Identity, identity

__all__ = [
  "E3M0",
  "BlockInt",
  "Compressor",
  "Identity",
  "Payload",
  "e3m0",
  "identity",
  "int4",
  "int8",
]
