"""Error feedback (EF14): what compression lost is added to the next input."""

import math
import warnings
from typing import Any, Literal

import jax.numpy as jnp
import optax

from jaxcomm.compressors import Compressor
from jaxcomm.transforms._checks import check_compressor
from jaxcomm.transforms._compressed import MEANS, CompressedMeanState, check_algorithm
from jaxcomm.transforms._leafwise import map_leaves


def error_feedback(
  axis_name: str,
  compressor: Compressor,
  *,
  decay: float = 1.0,
  ef_scale: Literal["grad", "step"] = "grad",
  learning_rate: optax.ScalarOrSchedule | None = None,
  algorithm: Literal["two_hop", "all_gather"] = "two_hop",
  specs: Any = None,
  seed: int = 0,
) -> optax.GradientTransformation:
  r"""Mean over `axis_name` of compressed updates with memory; `compressed_mean` with more options.

  With :math:`\lambda` the decay and :math:`\gamma_t` the learning rate at step t (1 for "grad"):

  .. math::
    h_i = g_i + \lambda e_i / \gamma_t, \quad u = \mathrm{mean}_C(h_1, \dots, h_N), \quad
    \tfrac1N \sum_i e_i' = \gamma_t (\tfrac1N \sum_i h_i - u)

  So the sum of :math:`\gamma_t u_t` plus the mean residual is that of :math:`\gamma_t \tfrac1N
  \sum_i g_i` (for :math:`\lambda = 1`): nothing is lost, only late. "grad" keeps the residual in
  units of the gradient: what was lost under a large learning rate is repaid at the present, smaller
  one. "step" keeps it in units of the step, as if the compressor came after the learning rate; the
  optimizer behind must then scale by the same `learning_rate`. While that is zero, the residual
  waits.

  Wire, algorithms and shards: as `compressed_mean`. Per device: `residual`; `count` is equal
  everywhere. A restore needs the same number of replicas, or a named replica change.

  Args:
    axis_name: axis to average over, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    compressor: contractive, e.g. `top_k(ratio=0.01)`, `scaled_sign()`, `int4()`.
    decay: share of the residual that is kept, in (0, 1]; below 1 old errors are forgotten.
    ef_scale: "grad" or "step", the unit of the residual.
    learning_rate: a positive number or an optax schedule of the number of updates; for "step" only.
    algorithm: `"two_hop"` or `"all_gather"`, see `compressed_mean`.
    specs: how leaves are sharded over the other mesh axes, see `compressed_mean`.
    seed: of the rounding keys, which are folded by mean, leaf and device.

  Returns:
    A `GradientTransformation` with `CompressedMeanState`.

  Raises:
    ValueError: an argument outside these rules; in update as `compressed_mean`. Warns
      (UserWarning) if `compressor` is unbiased but not contractive: feedback may then grow without
      bound.

  References:
    Seide et al., 1-Bit Stochastic Gradient Descent, 2014; Karimireddy et al., Error Feedback Fixes
    SignSGD, https://arxiv.org/abs/1901.09847.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import e3m0, error_feedback
    >>> tx = error_feedback("replica", e3m0(), algorithm="all_gather")
    >>> def two_means(g):
    ...   first, state = tx.update(g, tx.init(g))
    ...   return first, tx.update(g, state)[0]
    >>> grads = jnp.array([[8.0, 2.5], [8.0, 2.5]])  # 2.5 is rounded to 2, then 3 to 4
    >>> first, second = jax.vmap(two_means, axis_name="replica")(grads)
    >>> first[0].tolist(), second[0].tolist()
    ([8.0, 2.0], [8.0, 4.0])
  """
  check_algorithm(algorithm)
  check_compressor(compressor)
  _check_scale(ef_scale, learning_rate)
  if not 0 < decay <= 1:
    raise ValueError(f"`decay` must be in (0, 1], got {decay!r}.")
  if compressor.alpha is None and compressor.omega is not None:
    warnings.warn(
      f"`compressor` should be contractive for error feedback, got {compressor}, which is unbiased"
      f" with omega {compressor.omega:.3g}: without feedback its error averages out by itself.",
      stacklevel=2,
    )

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return CompressedMeanState(jnp.zeros((), jnp.int32), zeros)

  def mean_of_leaf(leaf, scalars, g, residual):
    count, rate = scalars
    owed = residual if decay == 1 else decay * residual
    if rate is not None:
      owed = owed * jnp.where(rate > 0, 1 / jnp.where(rate > 0, rate, 1.0), 0.0)
    h = g.astype(jnp.float32) + owed
    mean, error = MEANS[algorithm](h, axis_name, compressor, key=leaf.key(seed, count))
    if rate is not None:
      error = jnp.where(rate > 0, rate * error, residual)
    return mean.astype(g.dtype), error

  def update_fn(updates, state, params=None):
    del params
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    rate = None if rate is None else jnp.asarray(rate, jnp.float32)
    means, residual = map_leaves(
      mean_of_leaf, (state.count, rate), updates, state.residual, axis_name=axis_name, specs=specs
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return means, CompressedMeanState(count, residual)

  return optax.GradientTransformation(init_fn, update_fn)


def _check_scale(ef_scale: str, learning_rate: Any) -> None:
  if ef_scale not in ("grad", "step"):
    raise ValueError(f"`ef_scale` must be 'grad' or 'step', got {ef_scale!r}.")
  if (learning_rate is None) != (ef_scale == "grad"):
    raise ValueError(
      "`learning_rate` must be given for `ef_scale='step'` and for nothing else, got"
      f" `ef_scale={ef_scale!r}`, `learning_rate={learning_rate!r}`."
    )
  if isinstance(learning_rate, (int, float)) and not 0 < learning_rate < math.inf:
    raise ValueError(f"`learning_rate` must be positive and finite, got {learning_rate!r}.")
