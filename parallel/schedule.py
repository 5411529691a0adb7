"""When each stage of a pipeline works on which microbatch.

S stages, M microbatches. A tick is as long as its longest work on any stage: a forward pass takes
1, a backward pass 3 (the forward pass again, the gradient of the input, that of the weights).
"""

from typing import Literal

import numpy as np

Schedule = Literal["gpipe", "1f1b", "zb"]
SCHEDULES = ("gpipe", "1f1b", "zb")


def schedule_table(num_stages: int, num_microbatches: int, schedule: Schedule) -> np.ndarray:
  """Which microbatch every stage works on in every tick.

  - `gpipe` (arXiv 1811.06965): all forward passes, then all backward passes, last first.
    `2 (M + S - 1)` ticks.
  - `1f1b`, in lockstep (the order of PipeDream-Flush, arXiv 2104.04473): in one tick a stage does
    the forward pass of one microbatch and the backward pass of another, the last stage both of one.
    `M + 2 (S - 1)` ticks.
  - `zb`: the same with gradients of weights apart (arXiv 2401.10241), on all stages in the tick in
    which the first stage could do them. A table only: `pipeline_value_and_grad` does not run it.

  Returns:
    int[ticks, S, 2], the microbatch of the forward and of the backward pass, -1 where there is
    none; for `zb` int[ticks, S, 3], the last one for the gradients of the weights.

  Raises:
    ValueError: a number is not positive, or the schedule is unknown.

  Example:
    >>> schedule_table(2, 2, "1f1b")[:, 0].tolist()  # the first stage
    [[0, -1], [1, -1], [-1, 0], [-1, 1]]
  """
  _check(num_stages, num_microbatches, schedule)
  S, M = num_stages, num_microbatches
  stage = np.arange(S)[None]
  if schedule == "gpipe":
    tick = np.arange(2 * (M + S - 1))[:, None]
    kinds = [tick - stage, 2 * (M + S - 1) - 1 - tick - stage]
  else:
    tick = np.arange(M + 2 * (S - 1))[:, None]
    kinds = [tick - stage, tick - 2 * (S - 1) + stage]
    if schedule == "zb":
      kinds.append(tick - 2 * (S - 1) + 0 * stage)
  table = np.stack(kinds, axis=-1)
  return np.where((table >= 0) & (table < M), table, -1)


def bubble_fraction(num_stages: int, num_microbatches: int, schedule: Schedule) -> float:
  """Share of its time that a stage spends waiting.

  `(S - 1) / (M + S - 1)` for `gpipe` and `1f1b`: ticks in which no stage has a backward pass (or a
  forward pass) do not contain one. For `zb`, if gradients of weights needed no forward pass again,
  `3 (S - 1) / (4 M + 3 (S - 1))` from `M = S - 1` on.

  Raises:
    ValueError: as in `schedule_table`.

  Example:
    >>> bubble_fraction(4, 12, "1f1b")
    0.2
  """
  work = schedule_table(num_stages, num_microbatches, schedule) >= 0  # [ticks, S, kinds]
  cost = np.array((1.0, 2.0, 1.0) if schedule == "zb" else (1.0, 3.0))
  total = num_stages * (work.any(1) * cost).sum()
  return float((total - (work * cost).sum()) / total)


def peak_activations(num_stages: int, num_microbatches: int, schedule: Schedule) -> int:
  """Most microbatches whose input a stage must hold at once, the first stage being the fullest.

  `M` for `gpipe`; `min(M, 2 S - 1)` for `1f1b` and `zb`.

  Raises:
    ValueError: as in `schedule_table`.

  Example:
    >>> peak_activations(4, 64, "gpipe"), peak_activations(4, 64, "1f1b")
    (64, 7)
  """
  return int(live_inputs(schedule_table(num_stages, num_microbatches, schedule)).max())


def live_inputs(table: np.ndarray) -> np.ndarray:
  """int[ticks, S]: inputs held, from the forward pass of a microbatch to the last use of it."""
  begun = np.cumsum(table[..., 0] >= 0, axis=0)
  ended = np.cumsum(table[..., -1] >= 0, axis=0)
  return begun - ended + (table[..., -1] >= 0)


def _check(num_stages, num_microbatches, schedule):
  for name, value in (("num_stages", num_stages), ("num_microbatches", num_microbatches)):
    if value < 1:
      raise ValueError(f"`{name}` must be at least 1, got {value}.")
  if schedule not in SCHEDULES:
    raise ValueError(f"`schedule` must be one of {SCHEDULES}, got {schedule!r}.")
