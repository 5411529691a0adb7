"""A topic that is asked for again far away: the task of `train_long_context.py`.

Some tokens of a real text are replaced. In the first eighth of a row half of them are one and the
same: the topic's. All along the rest stand questions, one token for all topics, where the target is
a token that names the topic. No answer stands in the row, so they can only come from its beginning.

Letters: B rows, S tokens.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.training import PLOT_STYLE

NUM_TOPICS = 8
NUM_IDS = 2 * NUM_TOPICS + 1  # topics, their names, the question
SHORTEST = 16  # tokens from the end of the topic to a question
QUESTIONS = 8  # for each group of distances
_STYLE: dict[Any, Any] = {**PLOT_STYLE, "font.size": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """Where topics and questions go, and the ids that they have.

  Attributes:
    seq_len: S, at least 64.
    first_id: of NUM_IDS ids that the text does not use.
  """

  seq_len: int
  first_id: int

  def __post_init__(self):
    if self.seq_len < 4 * SHORTEST:
      raise ValueError(f"`seq_len` must be at least {4 * SHORTEST}, got {self.seq_len}.")

  @property
  def distances(self) -> list[int]:
    """Shortest distance of each group, which goes up to twice of it."""
    longest = self.seq_len - self.seq_len // 8 - 1
    return [2**k for k in range(SHORTEST.bit_length() - 1, longest.bit_length())]

  def hide(self, row: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A packed row with a topic and questions in it.

    Args:
      row: `tokens`, `targets`, `loss_mask` [S].
      rng: decides which topic and places.

    Returns:
      `tokens` and `targets` int32[S]; `text_mask` float32[S], 0 where the text did not decide the
      target; `distance` int32[S], at questions the tokens back to the topic, 0 elsewhere.
    """
    tokens, distance = row["tokens"].copy(), np.zeros(self.seq_len, np.int32)
    topic, taken = rng.integers(NUM_TOPICS), np.zeros(self.seq_len, bool)
    places = rng.choice(self.seq_len // 8, self.seq_len // 16, replace=False)
    tokens[places] = self.first_id + topic
    taken[places] = True
    for shortest in self.distances:
      start = places.max() + shortest
      stop = min(start + shortest, self.seq_len)
      questions = rng.choice(np.arange(start, stop), min(QUESTIONS, stop - start), replace=False)
      tokens[questions] = self.first_id + 2 * NUM_TOPICS
      taken[questions], distance[questions] = True, questions - places.max()
    targets = np.append(tokens[1:], row["targets"][-1])
    targets[distance > 0] = self.first_id + NUM_TOPICS + topic
    text = row["loss_mask"] * ~taken * ~np.append(taken[1:], False)
    return {
      "tokens": tokens,
      "targets": targets.astype(np.int32),
      "text_mask": text.astype(np.float32),
      "distance": distance,
    }

  def losses(self, loss_BS: jax.Array, distance_BS: jax.Array) -> dict[str, jax.Array]:
    """Mean loss of the answers, and of those of each group: `recall`, `recall_16`, ..."""

    def mean(chosen_BS):
      return (loss_BS * chosen_BS).sum() / jnp.maximum(chosen_BS.sum(), 1)

    groups = {
      f"recall_{d}": mean((distance_BS >= d) & (distance_BS < 2 * d)) for d in self.distances
    }
    return {"recall": mean(distance_BS > 0), **groups}


def by_distance(rows: Sequence[Mapping[str, Any]], recall: Recall, parts: int) -> np.ndarray:
  """float[parts, groups]: mean of the logged losses over equal parts of the run."""
  logged = [row for row in rows if "recall" in row]
  table = np.array([[row[f"recall_{d}"] for d in recall.distances] for row in logged])
  return np.stack([part.mean(0) for part in np.array_split(table, min(parts, len(table)))])


def plot(path: pathlib.Path, means: np.ndarray, recall: Recall, title: str) -> None:
  """Draws `by_distance` as curves, one for each part of the run."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib.figure import Figure

  with matplotlib.rc_context(_STYLE):
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, losses in enumerate(means):
      part = f"{i + 1} of {len(means)}"
      shade = matplotlib.colormaps["viridis"](0.9 * i / max(len(means) - 1, 1))
      axes.plot(recall.distances, losses, "o-", color=shade, label=f"part {part}")
    axes.axhline(np.log(NUM_TOPICS), color="0.5", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens from topic to question", ylabel="loss of the answer, nats", title=title)
    axes.legend()
    figure.savefig(path)
