"""What a slow link adds to a round of CO2 if the mean is waited for, or overlaps with the round.

    python scripts/bench_overlap.py
    python scripts/bench_overlap.py --delays 1.0 --rounds 20

One process trains a small network by rounds of `HostRound`; its mean sleeps for as long as the link
would take, a multiple of the time of a round without communication (sleeping, so that the exchange
takes no processor away from the training). Rounds of three kinds take turns, so that drift of the
machine cancels: no communication, the exchange first and then the inner steps (as local SGD would),
and both at once. Medians over rounds, in units of the round without communication.
Expected on an idle machine, for a delay of d rounds: 1 + d one after the other, max(1, d)
overlapped; at d = 1 at most 1.15.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

from jaxcomm.transforms import HostMean, HostRound, co2_outer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  sync_period: int = 12  # inner steps per round
  width: int = 512  # of the network
  batch_size: int = 256  # rows per inner step
  rounds: int = 10  # timed, of each kind
  delays: tuple[float, ...] = (0.5, 1.0, 2.0)  # time of a mean, in rounds without communication

  def __post_init__(self):
    for name in ("sync_period", "width", "batch_size", "rounds"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    if not self.delays or min(self.delays) < 0:
      raise ValueError(f"`delays` must be numbers >= 0, got {self.delays}.")


class Link:
  """A mean of one process that takes `seconds`."""

  seconds = 0.0

  def __call__(self, tree: Any) -> Any:
    time.sleep(self.seconds)
    return tree


class Training:
  """Rounds of CO2 with the mean of a `Link`."""

  def __init__(self, cfg: Config):
    keys = jax.random.split(jax.random.key(0), 3)
    self._params = [0.1 * jax.random.normal(key, (cfg.width, cfg.width)) for key in keys[:2]]
    self._batches = jax.random.normal(keys[2], (cfg.sync_period, cfg.batch_size, cfg.width))
    outer = co2_outer(sync_period=cfg.sync_period, mean=optax.identity())
    self._link = Link()
    self._round = HostRound(
      jax.value_and_grad(_loss),
      optax.adamw(1e-3),
      outer,
      HostMean(self._link),
      sync_period=cfg.sync_period,
    )
    self._state = self._round.init(self._params)

  def seconds(self, delay: float, *, overlap: bool) -> float:
    """Wall-clock seconds of one round whose mean takes `delay` seconds."""
    start = time.perf_counter()
    if not overlap:
      time.sleep(delay)
    self._link.seconds = delay if overlap else 0.0
    self._params, self._state, _ = jax.block_until_ready(
      self._round(self._params, self._state, self._batches)
    )
    return time.perf_counter() - start


def _loss(params, x):
  first, second = params
  return jnp.mean(jnp.square(jnp.tanh(x @ first) @ second - x))


def main(cfg: Config) -> None:
  training = Training(cfg)
  for _ in range(2):  # compiles
    training.seconds(0.0, overlap=True)
  alone = statistics.median(training.seconds(0.0, overlap=True) for _ in range(cfg.rounds))
  print(f"a round of {cfg.sync_period} steps without communication: {1000 * alone:.0f} ms")
  print("delay / round   one after the other   overlapped")
  for delay in cfg.delays:
    times = {"alone": [], "in_turn": [], "overlapped": []}
    for _ in range(cfg.rounds):
      times["alone"].append(training.seconds(0.0, overlap=True))
      times["in_turn"].append(training.seconds(delay * alone, overlap=False))
      times["overlapped"].append(training.seconds(delay * alone, overlap=True))
    base, in_turn, overlapped = (statistics.median(t) for t in times.values())
    print(f"{delay:13.2f}   {in_turn / base:19.2f}   {overlapped / base:10.2f}")


if __name__ == "__main__":
  main(tyro.cli(Config))
