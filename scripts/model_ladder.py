"""Modelled: how much all-reduce time a ladder hides in Llama 3 70B on eight H100, and its speed-up.

    python scripts/model_ladder.py

The setting of the paper's inference benchmark (arXiv 2501.06589, data of its plots): tensor
parallelism over 8 devices, prompts of 1,024 tokens, 512 new ones, 16-bit, batches of 1 to 64, with
fast links between devices (NVLink) and without (`NCCL_P2P_DISABLE=1`). Nothing here is measured by
us.

A block takes the larger of its memory time and its arithmetic, and a constant; an all-reduce a
latency and its bytes over a bandwidth. The standard model takes one after the other. In a ladder an
all-reduce runs beside the next block: the longer of the two counts, and while the all-reduce runs
the block computes at 1 - `interference` of its speed.

The seven constants of blocks and links are fitted to the published tokens per second of the
standard model and of one without communication (twelve numbers). The speed-ups are predictions,
but for `interference`: the first table has none, the second the one number that fits all cells.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize

D, LAYERS, F, HEADS, KV_HEADS, C, V, DEVICES = 8192, 80, 28_672, 64, 8, 128, 128_256, 8
PROMPT, NEW = 1024, 512
BATCHES = (1, 4, 16, 64)
LINKS = ("fast", "slow")
# Published tokens per second, by batch.
STANDARD = {"fast": (77.39, 258.56, 843.15, 1940.99), "slow": (51.66, 173.62, 546.68, 1454.42)}
LADDER = {"fast": (101.22, 331.45, 1003.52, 2242.10), "slow": (82.59, 271.82, 738.56, 1864.05)}
NO_COMMUNICATION = (110.59, 355.80, 1109.65, 2474.49)
INTERFERENCE = 0.22


@dataclasses.dataclass(frozen=True)
class Machine:
  """Constants of a device and its links: seconds, bytes/s, FLOP/s."""

  memory: float = 2.5e12
  arithmetic: float = 4e14
  block_overhead: float = 1e-5
  fast_latency: float = 2e-5
  fast_bandwidth: float = 3e11
  slow_latency: float = 6e-5
  slow_bandwidth: float = 3e10


@dataclasses.dataclass(frozen=True)
class Pass:
  """Seconds of the parts of one forward pass: two blocks of a layer, an all-reduce, the head."""

  attention: float
  feed_forward: float
  all_reduce: float
  head: float


def forward(machine: Machine, batch: int, tokens: int, context: int, link: str) -> Pass:
  """Of `tokens` per sequence that see `context`."""
  rows = batch * tokens
  attention_weights = 2 * D * C * (HEADS + KV_HEADS) / DEVICES
  feed_forward_weights = 3 * D * F / DEVICES
  cache_bytes = 2 * 2 * KV_HEADS * C * batch * context / DEVICES
  seen = context / 2 if tokens > 1 else context  # causal
  attention_flops = 2 * attention_weights * rows + 4 * rows * seen * HEADS * C / DEVICES

  def at_least(num_bytes, flops):
    return max(num_bytes / machine.memory, flops / machine.arithmetic)

  latency, bandwidth = (getattr(machine, f"{link}_{x}") for x in ("latency", "bandwidth"))
  return Pass(
    attention=at_least(2 * attention_weights + cache_bytes, attention_flops)
    + machine.block_overhead,
    feed_forward=at_least(2 * feed_forward_weights, 2 * feed_forward_weights * rows)
    + machine.block_overhead,
    all_reduce=latency + 2 * (DEVICES - 1) / DEVICES * rows * D * 2 / bandwidth,
    head=at_least(2 * V * D / DEVICES, 2 * V * D / DEVICES * batch),
  )


def exposed(p: Pass, residual: str, interference: float) -> float:
  """Seconds by which the all-reduces of a pass lengthen it."""
  if residual == "none":
    return 0.0
  if residual == "standard":
    return 2 * LAYERS * p.all_reduce

  def beside(block):  # an all-reduce, beyond the block that it runs beside
    slowed = interference * p.all_reduce
    return slowed if p.all_reduce - slowed <= block else p.all_reduce - block

  # The first attention has nothing to wait for, the last feed-forward's sum nothing beside it.
  layers = (LAYERS - 1) * beside(p.attention) + LAYERS * beside(p.feed_forward)
  return layers + p.all_reduce


def both_phases(machine: Machine, batch: int, link: str) -> tuple[tuple[Pass, int], ...]:
  """(pass, how many of them): the prompt and the new tokens, at their mean context."""
  prompt = forward(machine, batch, PROMPT, PROMPT, link)
  return (prompt, 1), (forward(machine, batch, 1, PROMPT + NEW // 2, link), NEW - 1)


def tokens_per_second(
  machine: Machine, residual: str, batch: int, link: str, interference: float = 0.0
) -> float:
  """New tokens of all sequences, by the time of prompt and generation."""
  seconds = sum(
    count * (LAYERS * (p.attention + p.feed_forward) + p.head + exposed(p, residual, interference))
    for p, count in both_phases(machine, batch, link)
  )
  return batch * NEW / seconds


def hidden(machine: Machine, batch: int, link: str, interference: float) -> float:
  """Share of the standard model's all-reduce time that a ladder hides."""
  phases = both_phases(machine, batch, link)
  left, all_of_it = (
    sum(count * exposed(p, residual, interference) for p, count in phases)
    for residual in ("ladder", "standard")
  )
  return 1 - left / all_of_it


def fit() -> tuple[Machine, float]:
  """The constants, and the largest relative error of the twelve numbers they are fitted to."""

  def machine(logs):
    return Machine(*np.exp(logs).tolist())

  def errors(logs):
    found = machine(logs)
    out = []
    for i, batch in enumerate(BATCHES):
      rate = tokens_per_second(found, "none", batch, "fast")
      out.append(math.log(rate / NO_COMMUNICATION[i]))
      for link in LINKS:
        rate = tokens_per_second(found, "standard", batch, link)
        out.append(math.log(rate / STANDARD[link][i]))
    return out

  start = [math.log(x) for x in dataclasses.astuple(Machine())]
  solution = optimize.least_squares(errors, start)
  return machine(solution.x), float(np.abs(solution.fun).max())


def table(machine: Machine, interference: float) -> list[tuple[str, int, float, float, float]]:
  """(links, batch, share hidden, modelled speed-up, published speed-up)."""
  rows = []
  for link in LINKS:
    for i, batch in enumerate(BATCHES):
      rate = tokens_per_second(machine, "ladder", batch, link, interference)
      speedup = rate / tokens_per_second(machine, "standard", batch, link)
      published = LADDER[link][i] / STANDARD[link][i]
      rows.append((link, batch, hidden(machine, batch, link, interference), speedup, published))
  return rows


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.parse_args(argv)
  machine, error = fit()
  print("fitted, seconds, bytes/s and FLOP/s:")
  for field in dataclasses.fields(machine):
    print(f"  {field.name:22} {getattr(machine, field.name):.3g}")
  print(f"largest error of what they are fitted to: {100 * error:.1f} %")
  for interference in (0.0, INTERFERENCE):
    print(f"\nmodelled, interference {interference}\n")
    print("| links | batch | all-reduce time hidden | speed-up | paper | difference |")
    print("|---|---|---|---|---|---|")
    for link, batch, share, speedup, published in table(machine, interference):
      cells = f"{100 * share:.0f} % | {speedup:.2f} | {published:.2f}"
      print(f"| {link} | {batch} | {cells} | {100 * (speedup / published - 1):+.1f} % |")


if __name__ == "__main__":
  main()
