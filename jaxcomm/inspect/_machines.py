"""Constants of the machines that a modelled timeline is computed with."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
  """Rates of one device and of its links: data sheet values, which no program reaches.

  Attributes:
    name: printed with every number modelled with these constants.
    peak_flops: matrix products in bfloat16, FLOP/s.
    hbm_bandwidth: of the device's memory, bytes/s.
    memory_bytes: of the device's memory, as much as its compiler hands out.
    link_bandwidth: what one device sends inside a host (GPU) or along one axis of the torus, both
      ways together (TPU), bytes/s.
    link_latency: of one step of a ring over such links, s.
    network_bandwidth: what one device sends to other hosts, bytes/s.
    network_latency: of one step of a ring that leaves the host, s.
    devices_per_host: devices that such links join; None if they join all.
  """

  name: str
  peak_flops: float
  hbm_bandwidth: float
  memory_bytes: int
  link_bandwidth: float
  link_latency: float
  network_bandwidth: float = math.inf
  network_latency: float = 0.0
  devices_per_host: int | None = None

  def __post_init__(self):
    for name in ("peak_flops", "hbm_bandwidth", "memory_bytes", "link_bandwidth"):
      if not getattr(self, name) > 0:
        raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

  def describe(self) -> str:
    """The constants on one line."""
    line = (
      f"{self.name}: {self.peak_flops / 1e12:g} TFLOP/s, memory {self.hbm_bandwidth / 1e9:g} GB/s,"
      f" link {self.link_bandwidth / 1e9:g} GB/s and {self.link_latency * 1e6:g} us a step"
    )
    if self.devices_per_host is None:
      return line
    return (
      f"{line}, network of {self.devices_per_host} devices a host"
      f" {self.network_bandwidth / 1e9:g} GB/s each and {self.network_latency * 1e6:g} us a step"
    )


# Dense bfloat16, HBM3, NVLink 4 one way and one 400 Gb/s card a GPU: NVIDIA's data sheets of H100
# SXM and DGX H100; memory_bytes is the device_memory_size of h100_sxm.txtpb.
H100 = Machine(
  name="H100 SXM",
  peak_flops=989e12,
  hbm_bandwidth=3.35e12,
  memory_bytes=84_978_434_048,
  link_bandwidth=450e9,
  link_latency=1e-6,
  network_bandwidth=50e9,
  network_latency=5e-6,
  devices_per_host=8,
)
# Google Cloud's system pages and "How to Scale Your Model" (Austin et al. 2025), part 2. Memory is
# what XLA:TPU hands out of the 16 and 95 GB.
TPU_V5E = Machine(
  name="TPU v5e",
  peak_flops=197e12,
  hbm_bandwidth=8.1e11,
  memory_bytes=int(15.75 * 2**30),
  link_bandwidth=9e10,
  link_latency=1e-6,
)
TPU_V5P = Machine(
  name="TPU v5p",
  peak_flops=459e12,
  hbm_bandwidth=2.8e12,
  memory_bytes=int(95.74 * 2**30),
  link_bandwidth=1.8e11,
  link_latency=1e-6,
)
