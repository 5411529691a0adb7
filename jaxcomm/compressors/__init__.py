"""What a message is: maps from arrays to payloads of fewer bytes, and back."""

from jaxcomm.compressors._base import Compressor, Payload
from jaxcomm.compressors._block_int import BlockInt, int4, int8
from jaxcomm.compressors._e3m0 import E3M0, e3m0
from jaxcomm.compressors._fedzip import (
  FedZipLeaf,
  RawLeaf,
  fedzip_compress,
  fedzip_decompress,
  fedzip_finite,
  top_z,
)
from jaxcomm.compressors._fedzip_bits import encoded_bits, fedzip_bytes
from jaxcomm.compressors._identity import Identity, identity
from jaxcomm.compressors._kmeans import kmeans_1d

__all__ = [
  "E3M0",
  "BlockInt",
  "Compressor",
  "FedZipLeaf",
  "Identity",
  "Payload",
  "RawLeaf",
  "e3m0",
  "encoded_bits",
  "fedzip_bytes",
  "fedzip_compress",
  "fedzip_decompress",
  "fedzip_finite",
  "identity",
  "int4",
  "int8",
  "kmeans_1d",
  "top_z",
]
