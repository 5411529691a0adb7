"""The state and the two ways to travel that compressed means have, with or without feedback."""

from typing import Any, NamedTuple

import jax

from jaxcomm.collectives import allgather_pmean_with_error, compressed_pmean_with_error

MEANS = {"two_hop": compressed_pmean_with_error, "all_gather": allgather_pmean_with_error}


class CompressedMeanState(NamedTuple):
  """State of `compressed_mean` and `error_feedback`.

  Attributes:
    count: int32[], equal on all devices; number of means taken, folded into the rounding key.
    residual: like the parameters, float32, differs per device: what compression still owes.
      `optax.EmptyState()` without error feedback.
  """

  count: jax.Array
  residual: Any


def check_algorithm(algorithm: str) -> None:
  """Raises ValueError unless `algorithm` names one of the means."""
  if algorithm not in MEANS:
    raise ValueError(f"`algorithm` must be one of {sorted(MEANS)}, got {algorithm!r}.")
