"""How a message travels: collectives over mesh axes with compressed payloads on the wire."""

from jaxcomm.collectives._compressed_pmean import (
  allgather_pmean,
  allgather_pmean_bytes,
  allgather_pmean_with_error,
  compressed_pmean,
  compressed_pmean_bytes,
  compressed_pmean_with_error,
)
from jaxcomm.collectives._gossip import (
  consensus_distance,
  gossip_error,
  gossip_mix,
  gossip_mix_bytes,
)
from jaxcomm.collectives._hierarchical_psum_scatter import (
  hierarchical_psum_scatter,
  hierarchical_psum_scatter_bytes,
)
from jaxcomm.collectives._loco import (
  LocoState,
  loco_init,
  loco_psum_scatter,
  loco_psum_scatter_bytes,
)
from jaxcomm.collectives._quantized_all_gather import (
  quantized_all_gather,
  quantized_all_gather_bytes,
)
from jaxcomm.collectives._quantized_all_to_all import (
  quantized_all_to_all,
  quantized_all_to_all_bytes,
)
from jaxcomm.collectives._quantized_psum import (
  quantized_pmean,
  quantized_pmean_bytes,
  quantized_psum,
  quantized_psum_bytes,
)
from jaxcomm.collectives._quantized_psum_scatter import (
  quantized_psum_scatter,
  quantized_psum_scatter_bytes,
)
from jaxcomm.collectives._topologies import (
  Topology,
  complete,
  exponential,
  one_peer_exponential,
  random_matching,
  ring,
  torus,
)
from jaxcomm.collectives._tree_pmean import (
  tree_compressed_pmean,
  tree_compressed_pmean_bytes,
  tree_compressed_pmean_with_error,
)

__all__ = [
  "LocoState",
  "Topology",
  "allgather_pmean",
  "allgather_pmean_bytes",
  "allgather_pmean_with_error",
  "complete",
  "compressed_pmean",
  "compressed_pmean_bytes",
  "compressed_pmean_with_error",
  "consensus_distance",
  "exponential",
  "gossip_error",
  "gossip_mix",
  "gossip_mix_bytes",
  "hierarchical_psum_scatter",
  "hierarchical_psum_scatter_bytes",
  "loco_init",
  "loco_psum_scatter",
  "loco_psum_scatter_bytes",
  "one_peer_exponential",
  "quantized_all_gather",
  "quantized_all_gather_bytes",
  "quantized_all_to_all",
  "quantized_all_to_all_bytes",
  "quantized_pmean",
  "quantized_pmean_bytes",
  "quantized_psum",
  "quantized_psum_bytes",
  "quantized_psum_scatter",
  "quantized_psum_scatter_bytes",
  "random_matching",
  "ring",
  "torus",
  "tree_compressed_pmean",
  "tree_compressed_pmean_bytes",
  "tree_compressed_pmean_with_error",
]
