"""What a slow link adds to a round of CO2 if the mean is waited for, or overlaps with the round.

    python scripts/bench_overlap.py                                 # a link that sleeps
    python scripts/bench_overlap.py --delays 1.0 --rounds 20
    scripts/netlab --rate 100mbit -- python scripts/bench_overlap.py --sockets

A process trains a small network by rounds of `HostRound`. Without --sockets it is the only one, and
its mean sleeps for as long as a link would take, a multiple of the time of a round without
communication: the exchange takes no processor away from the training. With --sockets there is one
process per host and the means cross the network, from a second CPU device of each; a round is then
as many inner steps as take as long as a mean.

Rounds of three kinds take turns, so that drift of the machine cancels: no communication, the
exchange first and then the inner steps (as local SGD would), and both at once. Medians over rounds,
in units of the round without communication. Expected on an idle machine, for a mean that takes d
rounds: 1 + d one after the other, max(1, d) overlapped; at d = 1 at most 1.15.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxcomm.transforms import HostMean, HostRound, ProcessMean, co2_outer, suggest_sync_period

KINDS = ("alone", "in_turn", "overlapped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  sync_period: int = 12  # inner steps per round; of --sockets those before it is chosen
  width: int = 512  # of the network
  batch_size: int = 256  # rows per inner step
  rounds: int = 10  # timed, of each kind
  delays: tuple[float, ...] = (0.5, 1.0, 2.0)  # time of a sleep, in rounds without communication
  sockets: bool = False  # between the processes of a job

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
  """Rounds of CO2, with the means of `mean` or with none."""

  def __init__(self, cfg: Config, sync_period: int, mean: Callable[[Any], Any]):
    keys = jax.random.split(jax.random.key(0), 3)
    self._params = [0.1 * jax.random.normal(key, (cfg.width, cfg.width)) for key in keys[:2]]
    self._batches = jax.random.normal(keys[2], (sync_period, cfg.batch_size, cfg.width))
    self._mean, self._exchanges = mean, False
    self._round = HostRound(
      jax.value_and_grad(_loss),
      optax.adamw(1e-3),
      co2_outer(sync_period=sync_period, mean=optax.identity()),
      HostMean(lambda tree: mean(tree) if self._exchanges else tree),
      sync_period=sync_period,
    )
    self._state = self._round.init(self._params)

  def exchange(self) -> float:
    """Seconds of a mean by itself."""
    start = time.perf_counter()
    self._mean(jax.tree.map(np.asarray, self._params))
    return time.perf_counter() - start

  def seconds(self, kind: str) -> float:
    """Wall-clock seconds of one round."""
    _meet()
    start = time.perf_counter()
    if kind == "in_turn":
      self.exchange()
    self._exchanges = kind == "overlapped"
    self._params, self._state, _ = jax.block_until_ready(
      self._round(self._params, self._state, self._batches)
    )
    return time.perf_counter() - start

  def medians(self, rounds: int) -> list[float]:
    """Seconds of a round of each of `KINDS`, which take turns."""
    times = [[self.seconds(kind) for kind in KINDS] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times)]


def _loss(params, x):
  first, second = params
  return jnp.mean(jnp.square(jnp.tanh(x @ first) @ second - x))


def _meet() -> None:
  """Waits for the other processes, if any."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("bench_overlap")


def warmed_up(training: Training, rounds: int = 3) -> float:
  """Seconds of a round without communication, once everything is compiled and connected."""
  for kind in KINDS:
    training.seconds(kind)
  return statistics.median(training.seconds("alone") for _ in range(rounds))


def show(delay: float, times: list[float]) -> None:
  """A row of the table; `delay` in seconds."""
  alone, in_turn, overlapped = times
  if jax.process_index() == 0:
    print(f"{delay / alone:12.2f}   {in_turn / alone:19.2f}   {overlapped / alone:10.2f}")


def head(sync_period: int, alone: float) -> None:
  if jax.process_index() == 0:
    print(f"a round of {sync_period} steps without communication: {1000 * alone:.0f} ms")
    print("mean / round   one after the other   overlapped")


def sleep(cfg: Config) -> None:
  """The table of a link that sleeps."""
  link = Link()
  training = Training(cfg, cfg.sync_period, link)
  alone = warmed_up(training, cfg.rounds)
  head(cfg.sync_period, alone)
  for delay in cfg.delays:
    link.seconds = delay * alone
    show(link.seconds, training.medians(cfg.rounds))


def cross_sockets(cfg: Config) -> None:
  """The row of the network between the processes, for rounds that take as long as a mean."""
  devices = {device.process_index: device for device in jax.devices()}  # the last of each
  mesh = jax.make_mesh((len(devices),), ("replica",), devices=list(devices.values()))
  mean = ProcessMean(mesh)
  training = Training(cfg, cfg.sync_period, mean)
  step = warmed_up(training) / cfg.sync_period
  transfer = statistics.median(training.exchange() for _ in range(3))
  times = ProcessMean(mesh)({"step": np.float32(step), "mean": np.float32(transfer)})
  sync_period = suggest_sync_period(float(times["step"]), float(times["mean"]))
  training = Training(cfg, sync_period, mean)
  head(sync_period, warmed_up(training))
  show(float(times["mean"]), training.medians(cfg.rounds))


def main(cfg: Config) -> None:
  if not cfg.sockets:
    return sleep(cfg)
  jax.config.update("jax_num_cpu_devices", 2)  # one trains, one exchanges
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize()
  return cross_sockets(cfg)


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
