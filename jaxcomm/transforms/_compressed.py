"""The state and the two ways to travel that compressed means have, with or without feedback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives import allgather_pmean_with_error, compressed_pmean_with_error
from jaxcomm.compressors import Compressor, RandK


def mean_of_messages(
  x: jax.Array, axis_name: str, compressor: Compressor, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """`allgather_pmean_with_error`; on a shared support one all-reduce of k floats instead.

  Returns:
    (mean of D(C(x)) over the axis, what this device's message lost), float32, the first typed as
    equal. On one device the mean is `x`.
  """
  if shares_support(compressor) and x.size and _axes.axis_size(axis_name) > 1:
    return _mean_on_shared_support(x, axis_name, compressor, key)
  return allgather_pmean_with_error(x, axis_name, compressor, key=key)


def shares_support(compressor: Compressor) -> bool:
  """Whether the values of all devices may be summed as they are."""
  return (
    isinstance(compressor, RandK)
    and compressor.shared_support
    and compressor.value_dtype == "float32"
  )


def _mean_on_shared_support(x, axis_name: str, compressor: Any, key):
  flat = x.reshape(-1).astype(jnp.float32)
  support = compressor.support(key, flat.size)
  own = compressor.values(flat, support)
  mean = compressor.expand(jax.lax.pmean(own, axis_name), support, flat.size)
  error = flat - compressor.expand(own, support, flat.size)
  return mean.reshape(x.shape), error.reshape(x.shape)


MEANS = {"two_hop": compressed_pmean_with_error, "all_gather": mean_of_messages}


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
