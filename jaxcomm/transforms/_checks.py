"""Checks of arguments that several transforms share."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcomm.compressors import Compressor


def check_transform(name: str, transform: Any) -> None:
  """Raises ValueError unless `transform` has the two functions of an optax transform."""
  if not all(callable(getattr(transform, part, None)) for part in ("init", "update")):
    raise ValueError(f"`{name}` must be an optax transform, got {transform!r}.")


def check_compressor(compressor: Any) -> None:
  """Raises ValueError unless `compressor` is one."""
  if not isinstance(compressor, Compressor):
    raise ValueError(f"`compressor` must be a Compressor, such as int8(), got {compressor!r}.")


def check_floating(name: str, tree: Any) -> None:
  """Raises ValueError at the first leaf that float32 arithmetic would damage."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
      where = jax.tree_util.keystr(path) or "the root"
      raise ValueError(
        f"`{name}` must be floating-point arrays, got {dtype} at {where}: keep such leaves from"
        " the transform with optax.masked or optax.partition."
      )


def check_period(sync_period: Any) -> None:
  """Raises ValueError unless `sync_period` is an integer of at least 1, or a traced integer."""
  if isinstance(sync_period, Tracer):  # a hyperparameter that optax injected
    good = jnp.issubdtype(sync_period.dtype, jnp.integer)
  else:
    good = not isinstance(sync_period, bool) and _at_least_one(sync_period)
  if not good:
    raise ValueError(f"`sync_period` must be an integer >= 1 (inner steps), got {sync_period!r}.")


def check_count(name: str, value: Any, *, at_least: int) -> None:
  """Raises ValueError unless `value` is an integer of at least so many."""
  if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
    raise ValueError(f"`{name}` must be an integer >= {at_least}, got {value!r}.")


def check_decay(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is in [0, 1), or traced."""
  if not isinstance(value, Tracer) and not 0 <= value < 1:
    raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")


def _at_least_one(value: Any) -> bool:
  try:
    return operator.index(value) >= 1
  except TypeError:
    return False
