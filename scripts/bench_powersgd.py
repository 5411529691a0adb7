"""How fast PowerSGD encodes and decodes on one device, against the memory traffic that it needs.

    python scripts/bench_powersgd.py                      # five 1024 x 1024 matrices, rank 4
    python scripts/bench_powersgd.py --rank 1 --variant alternating

One compiled update of `powersgd_mean` with error feedback on an axis of one replica: both products,
both bases, the mean and the residual, into memory that is already there. The estimate is the time
in which a copy (NumPy, one thread) would move what cannot be avoided: gradients and residuals are
read and their sum written; it is read by either product and once more for the residual; result and
residual are written: 8 passes of 4 bytes per parameter. Best and median over rounds that alternate
with the copy. Torch's hook, written out for one process, took 16.5 + 8.0 ms on one thread of a
machine like that of CI.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxcomm import powersgd_mean
from jaxcomm.transforms import PowerSGDState

PASSES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  rank: int = 4
  variant: Literal["two_sided", "alternating"] = "two_sided"
  matrices: int = 5
  rows: int = 1024
  columns: int = 1024
  rounds: int = 20
  seed: int = 0

  def __post_init__(self):
    for name in ("rank", "matrices", "rows", "columns", "rounds"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")


class Update:
  """A compiled update that writes over its last state and result."""

  def __init__(self, cfg: Config):
    tx = powersgd_mean("replica", cfg.rank, variant=cfg.variant, min_compression_rate=1.0)
    keys = jax.random.split(jax.random.key(cfg.seed), cfg.matrices)
    self._grads = [jax.random.normal(key, (cfg.rows, cfg.columns)) for key in keys]
    state = tx.init(self._grads)
    stack = lambda x: x[None]  # noqa: E731
    self._grads = jax.tree.map(stack, self._grads)
    self._state = state._replace(residual=jax.tree.map(stack, state.residual))
    self._means = jax.tree.map(jnp.copy, self._grads)

    equal: Any = None
    per_replica = PowerSGDState(count=equal, residual=0, left=equal, right=equal, exact=equal)
    axes = {"in_axes": (0, per_replica), "out_axes": (0, per_replica)}
    update = jax.vmap(tx.update, axis_name="replica", **axes)
    # The memory of the old means is the result's.
    self._step = jax.jit(
      lambda grads, state, old_means: update(grads, state), donate_argnums=(1, 2), keep_unused=True
    )

  def __call__(self) -> Any:
    self._means, self._state = self._step(self._grads, self._state, self._means)
    return self._means, self._state


def timed(run: Callable[[], Any]) -> float:
  """Milliseconds of one call, until its results are there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return 1e3 * (time.perf_counter() - start)


def main(cfg: Config) -> dict[str, float]:
  """Prints the table; returns best milliseconds by name."""
  size = cfg.matrices * cfg.rows * cfg.columns
  source = np.random.default_rng(cfg.seed).standard_normal(size, dtype=np.float32)
  target = np.zeros_like(source)
  runs = {"copy": lambda: np.copyto(target, source), "update": Update(cfg)}
  times = {name: [] for name in runs}
  for i in range(cfg.rounds + 3):
    for name, run in runs.items():
      ms = timed(run)
      if i >= 3:
        times[name].append(ms)
  best = {name: min(ms) for name, ms in times.items()}
  best["estimate"] = PASSES / 2 * best["copy"]  # a copy is two passes
  shape = f"{cfg.matrices} x {cfg.rows} x {cfg.columns}"
  print(f"PowerSGD, {cfg.variant}, rank {cfg.rank}, {shape} = {size / 1e6:.1f}M parameters,")
  print(f"{jax.default_backend()}, JAX {jax.__version__}")
  for name, ms in times.items():
    print(f"{name:>8}: best {min(ms):7.2f} ms, median {statistics.median(ms):7.2f} ms")
  share = best["estimate"] / best["update"]
  print(f"estimate: {best['estimate']:.2f} ms, of which the update reaches {share:.0%}")
  return best


if __name__ == "__main__":
  main(tyro.cli(Config))
