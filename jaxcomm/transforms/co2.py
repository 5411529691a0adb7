"""CO2: local steps while the mean of the round before is still on its way."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm.transforms._checks import check_count, check_transform
from jaxcomm.transforms._local_updates import local_updates
from jaxcomm.transforms._slow_momentum import Gap, Rate, check_positive, slow_momentum
from jaxcomm.transforms.delayed import delayed
from jaxcomm.transforms.healthy_mean import healthy_mean
from jaxcomm.transforms.pmean_over import pmean_over
from jaxcomm.transforms.sharded_outer import sharded_outer


def co2(
  inner: optax.GradientTransformation,
  *,
  sync_period: int,
  outer_lr: Any = 1.0,
  outer_momentum: Any = 0.5,
  gap: Literal["norm_ratio"] | float | Callable[[Any, Any], Any] = "norm_ratio",
  clip_threshold: Any = None,
  inner_lr: Rate | None = None,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
  skip_nonfinite: bool = False,
  outer_shards: int | None = None,
  specs: Any = None,
) -> optax.GradientTransformationExtraArgs:
  r"""`sync_period` steps of `inner`, then an outer step on the mean of the round before.

  .. math::
    g = \frac1N \sum_i (\Theta_{t-1} - \theta_i^{(t-1)}), \quad
    m \leftarrow \mathrm{clip}_\varphi(\beta m + g / (\gamma \Lambda_t)), \quad
    \Theta_{t+1} = \Theta_t - \alpha \gamma m

  Every replica starts round t + 1 from :math:`\Theta_{t+1}`: what it did in round t enters one
  round later. The exchange of a round thus has the whole next round to finish; here the delay is
  simulated (same numbers), `overlapped_round` and `HostRound` really overlap. The first two rounds
  start from the same parameters. With constant `gap=1.0` and no clip it is `slowmo` one round late.

  :math:`\Lambda_t \ge 1` divides what is added to the momentum; `"norm_ratio"` is `staleness_gap`.
  The paper's own formula was not at hand, its released code has a constant.

  Wire: nothing for `sync_period - 1` steps, then one mean of all parameters, by default float32,
  :math:`2\frac{N-1}{N} 4P` bytes per device for `P` parameters (4 more with `skip_nonfinite`, and
  two numbers more for the norms of sharded momentum).

  Per replica: parameters, `inner_state`, `inflight` (the differences that the next exchange
  averages) and sharded momentum. Equal: the rest. All of it is in a checkpoint. A restore needs
  the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.adamw(3e-4)`.
    sync_period: inner steps per round (τ).
    outer_lr: α > 0.
    outer_momentum: β in [0, 1).
    gap: Λ: `"norm_ratio"`, a constant of at least 1 (1: no penalty), or a function of the last
      outer step :math:`\Theta_t - \Theta_{t-1}` and the mean g that returns a number or a tree.
    clip_threshold: φ: bound of every entry of the momentum; None: no clip.
    inner_lr: γ, as in `slowmo`. None: no division, and φ is in units of parameters.
    axis_name: axis of the replicas.
    mean: how to average, e.g. `compressed_mean("replica", int8())`; default `pmean_over`.
    skip_nonfinite: leave replicas with a NaN or infinity out of the mean, see `healthy_mean`.
    outer_shards: the number of replicas, to shard the momentum over them (`sharded_outer`).
    specs: with `outer_shards`: how leaves are sharded over other mesh axes.

  Returns:
    A transform whose updates bring `jaxcomm.apply_updates` to the outer parameters at the end of a
    round. Between two ends the parameters are a replica's own: evaluate at `outer_params`.

  Raises:
    ValueError: an argument outside these rules, `mean` or a function as `gap` together with
      `outer_shards`, and what `slowmo` and `sharded_outer` raise.

  References:
    Sun et al., CO2: Efficient Distributed Training with Full Communication-Computation Overlap,
    https://arxiv.org/abs/2401.16265, section 3.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import apply_updates, co2
    >>> tx = co2(optax.sgd(0.5), sync_period=1, outer_momentum=0.0)
    >>> def two_rounds(target):
    ...   p, state = jnp.zeros(()), tx.init(jnp.zeros(()))
    ...   updates, state = tx.update(p - target, state, p)
    ...   first = apply_updates(p, updates, state)
    ...   updates, state = tx.update(first - target, state, first)
    ...   return first, apply_updates(first, updates, state)
    >>> first, second = jax.vmap(two_rounds, axis_name="replica")(jnp.array([0.0, 4.0]))
    >>> first.tolist(), second.tolist()
    ([0.0, 0.0], [1.0, 1.0])
  """
  outer = co2_outer(
    sync_period=sync_period, outer_lr=outer_lr, outer_momentum=outer_momentum, gap=gap,
    clip_threshold=clip_threshold, inner_lr=inner_lr, axis_name=axis_name, mean=mean,
    skip_nonfinite=skip_nonfinite, outer_shards=outer_shards, specs=specs,
  )  # fmt: skip
  return local_updates(inner, delayed(outer), sync_period=sync_period, axis_name=axis_name)


def co2_outer(
  *,
  sync_period: int,
  outer_lr: Any = 1.0,
  outer_momentum: Any = 0.5,
  gap: Literal["norm_ratio"] | float | Callable[[Any, Any], Any] = "norm_ratio",
  clip_threshold: Any = None,
  inner_lr: Rate | None = None,
  axis_name: str = "replica",
  mean: optax.GradientTransformation | None = None,
  skip_nonfinite: bool = False,
  outer_shards: int | None = None,
  specs: Any = None,
) -> optax.GradientTransformation:
  """The mean and the outer step of `co2`, not delayed: for `overlapped_round` and `HostRound`.

  Arguments and errors are those of `co2`. For `HostRound`, which is handed the mean, pass
  `mean=optax.identity()`.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import co2_outer
    >>> tx = co2_outer(sync_period=4, outer_lr=0.5, mean=optax.identity())
    >>> step, state = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    >>> step.tolist(), float(state[1].gap)
    ([-1.0], 1.0)
  """
  sharded = outer_shards is not None
  if sharded:
    check_count("outer_shards", outer_shards, at_least=1)
  step = slow_momentum(
    sync_period=sync_period,
    outer_lr=outer_lr,
    outer_momentum=outer_momentum,
    inner_lr=inner_lr,
    gap=_gap_function(gap, axis_name if sharded else None),
    clip_threshold=clip_threshold,
  )
  if sharded:
    if mean is not None:
      raise ValueError("`mean` must be None with `outer_shards`: a reduce-scatter takes the mean.")
    return sharded_outer(step, axis_name, outer_shards, specs=specs, skip_nonfinite=skip_nonfinite)
  if mean is None:
    mean = pmean_over(axis_name)
  check_transform("mean", mean)
  mean = healthy_mean(mean, axis_name) if skip_nonfinite else mean
  return optax.chain(mean, step)


def staleness_gap(
  outer_step: optax.Updates, mean: optax.Updates, *, axis_name: str | None = None
) -> jax.Array:
  r"""How far the outer parameters went since the mean's round began, in units of that mean.

  .. math:: \Lambda = 1 + \|\Theta_t - \Theta_{t-1}\|_2 / (\|g\|_2 + 10^{-12})

  It is at least 1, is 1 if the outer parameters stood still, and does not change if everything is
  scaled.

  Args:
    outer_step: :math:`\Theta_t - \Theta_{t-1}`, a tree.
    mean: g, a tree like it.
    axis_name: the axis over which both are cut into parts, if they are.

  Returns:
    float32[].

  >>> import jax.numpy as jnp
  >>> from jaxcomm.transforms import staleness_gap
  >>> float(staleness_gap(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.5])))
  3.0
  """

  def norm(tree):
    squares = jnp.square(optax.tree.norm(tree))
    return jnp.sqrt(squares if axis_name is None else jax.lax.psum(squares, axis_name))

  return 1 + norm(outer_step) / (norm(mean) + 1e-12)


def suggest_sync_period(step_seconds: float, mean_seconds: float) -> int:
  """The least number of inner steps that hides an exchange: ceil(mean_seconds / step_seconds).

  Args:
    step_seconds: of one inner step.
    mean_seconds: of one exchange.

  Raises:
    ValueError: a time is not positive.

  >>> from jaxcomm.transforms import suggest_sync_period
  >>> suggest_sync_period(step_seconds=0.25, mean_seconds=3.1)
  13
  """
  check_positive("step_seconds", step_seconds)
  check_positive("mean_seconds", mean_seconds)
  return math.ceil(mean_seconds / step_seconds)


def _gap_function(gap: Any, axis_name: str | None) -> Gap | None:
  if isinstance(gap, str) and gap == "norm_ratio":
    return lambda step, mean: staleness_gap(step, mean, axis_name=axis_name)
  if callable(gap):
    if axis_name is not None:
      raise ValueError(
        "`gap` must not be a function with `outer_shards`: it would see one part of the momentum."
      )
    return gap
  if not isinstance(gap, Tracer) and not _is_constant_gap(gap):
    raise ValueError(
      f'`gap` must be "norm_ratio", a number >= 1 or a function of (outer_step, mean), got {gap!r}.'
    )
  return lambda step, mean: jnp.asarray(gap, jnp.float32)


def _is_constant_gap(gap: Any) -> bool:
  try:
    return not isinstance(gap, bool) and bool(1 <= gap < math.inf)
  except (TypeError, ValueError):  # no number, or several
    return False
