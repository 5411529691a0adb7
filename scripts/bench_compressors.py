"""How fast a compressor turns arrays into messages and back, against copying memory.

    python scripts/bench_compressors.py                         # int8 blocks, 64 MB
    python scripts/bench_compressors.py --compressor fp8

In rounds that alternate, so that drift of the machine cancels: a copy of the array (NumPy, one
thread), `compress`, and `decompress`, each into memory that is already there (`--fresh` lets XLA
allocate the results in every call; a first touch of memory can cost more than all the rest). The
estimate is the time in which the measured copy would move the same bytes: 4 read and `payload`
written per element, then `payload` read and 4 written. Best and median over rounds. Expected on an
idle CPU: int8 at 40 % of the estimate or more.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxcomm import compressors

COMPRESSORS = {
  "int8": compressors.int8(),
  "int4": compressors.int4(),
  "e3m0": compressors.e3m0(),
  "fp8": compressors.fp8(),
  "scaled_sign": compressors.scaled_sign(),
  "top_k": compressors.top_k(ratio=0.01),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  compressor: Literal["int8", "int4", "e3m0", "fp8", "scaled_sign", "top_k"] = "int8"
  megabytes: int = 64  # of float32, 2^20 bytes each
  rounds: int = 15
  fresh: bool = False  # results in new memory
  seed: int = 0

  def __post_init__(self):
    if self.megabytes < 1 or self.rounds < 1:
      raise ValueError(f"`megabytes` and `rounds` must be at least 1, got {self}.")


def timed(run: Callable[[], Any]) -> float:
  """Seconds of one call, until its results are there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


class Step:
  """A compiled function that writes over its last result, or over nothing if `fresh`."""

  def __init__(self, fn: Callable, arg: Any, fresh: bool):
    self._arg, self._fresh = arg, fresh
    self._fn = jax.jit(lambda arg, old: fn(arg), donate_argnums=1, keep_unused=True)
    self.result = jax.jit(fn)(arg)

  def __call__(self) -> Any:
    old = () if self._fresh else self.result
    self.result = self._fn(self._arg, old)
    return self.result


def main(cfg: Config) -> dict[str, float]:
  compressor = COMPRESSORS[cfg.compressor]
  size = cfg.megabytes * 2**18
  x = np.random.default_rng(cfg.seed).standard_normal(size, dtype=np.float32)
  target = np.zeros_like(x)
  encode = Step(lambda x: compressor.compress(None, x), jax.device_put(x), cfg.fresh)
  decode = Step(
    lambda p: compressor.decompress(p, (size,)), jax.tree.map(jnp.copy, encode.result), cfg.fresh
  )
  runs = {"copy": lambda: np.copyto(target, x), "compress": encode, "decompress": decode}
  times = {name: [] for name in runs}
  for i in range(cfg.rounds + 2):
    for name, run in runs.items():
      seconds = timed(run)
      if i >= 2:
        times[name].append(seconds)
  return report(cfg, times, compressor.payload_bytes((size,)))


def report(cfg: Config, times: dict[str, list[float]], payload_bytes: int) -> dict[str, float]:
  """Prints the table; returns the share of the estimate that was reached, by name."""
  dense = cfg.megabytes * 2**20
  bandwidth = 2 * dense / min(times["copy"])
  estimate = (dense + payload_bytes) / bandwidth
  print(
    f"{cfg.compressor}, {cfg.megabytes} MB, {jax.default_backend()}, JAX {jax.__version__},"
    f" {platform.processor() or platform.machine()}; payload {payload_bytes} bytes"
  )
  print(f"copy: {bandwidth / 1e9:.1f} GB/s read and written; estimate {1e3 * estimate:.2f} ms")
  shares = {}
  for name, seconds in times.items():
    best, median = min(seconds), statistics.median(seconds)
    line = f"{name:>12}: best {1e3 * best:7.2f} ms, median {1e3 * median:7.2f} ms"
    if name != "copy":
      shares[name] = estimate / best
      line += f", {dense / best / 1e9:5.1f} GB/s of float32, {shares[name]:.0%} of the estimate"
    print(line)
  both = min(a + b for a, b in zip(times["compress"], times["decompress"]))
  shares["both"] = 2 * estimate / both
  print(f"        both: best {1e3 * both:7.2f} ms, {shares['both']:.0%} of the estimate")
  return shares


if __name__ == "__main__":
  main(tyro.cli(Config))
