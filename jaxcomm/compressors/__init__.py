"""What a message is: maps from arrays to payloads of fewer bytes, and back."""

from jaxcomm.compressors._base import Compressor, Payload
from jaxcomm.compressors._bernoulli import Bernoulli, bernoulli
from jaxcomm.compressors._block_int import BlockInt, int4, int8
from jaxcomm.compressors._blockwise import Blockwise, blockwise
from jaxcomm.compressors._chain import Chain, chain_compressors
from jaxcomm.compressors._contractive import Contractive, contractive
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
from jaxcomm.compressors._fp8 import FP8, fp8
from jaxcomm.compressors._hadamard import Hadamard, hadamard
from jaxcomm.compressors._identity import Identity, identity
from jaxcomm.compressors._induced import Induced, induced
from jaxcomm.compressors._kmeans import kmeans_1d
from jaxcomm.compressors._natural import Natural, natural
from jaxcomm.compressors._qsgd import QSGD, qsgd
from jaxcomm.compressors._rand_k import RandK, rand_k
from jaxcomm.compressors._scaled_sign import ScaledSign, scaled_sign
from jaxcomm.compressors._top_k import TopK, top_k
from jaxcomm.compressors._top_z_kmeans import TopZKMeans, top_z_kmeans

__all__ = [
  "E3M0",
  "FP8",
  "QSGD",
  "Bernoulli",
  "BlockInt",
  "Blockwise",
  "Chain",
  "Compressor",
  "Contractive",
  "FedZipLeaf",
  "Hadamard",
  "Identity",
  "Induced",
  "Natural",
  "Payload",
  "RandK",
  "RawLeaf",
  "ScaledSign",
  "TopK",
  "TopZKMeans",
  "bernoulli",
  "blockwise",
  "chain_compressors",
  "contractive",
  "e3m0",
  "encoded_bits",
  "fedzip_bytes",
  "fedzip_compress",
  "fedzip_decompress",
  "fedzip_finite",
  "fp8",
  "hadamard",
  "identity",
  "induced",
  "int4",
  "int8",
  "kmeans_1d",
  "natural",
  "qsgd",
  "rand_k",
  "scaled_sign",
  "top_k",
  "top_z",
  "top_z_kmeans",
]
