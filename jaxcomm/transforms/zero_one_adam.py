"""0/1 Adam: variances updated ever more rarely, then local steps, and signs in between."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_count, check_floating
from jaxcomm.transforms._local_updates import LocalUpdatesState
from jaxcomm.transforms.one_bit_adam import check_adam, sign_mean
from jaxcomm.transforms.pmean_over import pmean_over


class Interval(NamedTuple):
  """An interval that doubles: every `length` updates, for the `hits`-th time. int32[] both."""

  length: jax.Array
  hits: jax.Array


class ZeroOneAdamState(NamedTuple):
  """What `zero_one_adam` keeps besides momentum and outer parameters.

  Attributes:
    nu: like the parameters, float32, equal on all devices: the variance.
    num_nu: int32[], equal on all devices: updates of the variance.
    variance: `Interval` between updates of the variance, equal on all devices.
    local: `Interval` between exchanges after the freeze, equal on all devices.
    rate_sum: float32[], equal on all devices: learning rates since the last exchange.
    mean_state: of `mean`; its residual differs per device.
    exact: bool[], equal on all devices: whether the last update took an exact mean.
  """

  nu: optax.Updates
  num_nu: jax.Array
  variance: Interval
  local: Interval
  rate_sum: jax.Array
  mean_state: optax.OptState
  exact: jax.Array


def zero_one_adam(
  learning_rate: optax.ScalarOrSchedule,
  axis_name: str,
  *,
  var_freeze_step: int,
  var_update_scaler: int = 16,
  local_step_scaler: int = 32768,
  local_step_clipper: int = 16,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mean: optax.GradientTransformation | None = None,
  specs: Any = None,
) -> optax.GradientTransformation:
  r"""Adam(W) that exchanges one bit per element, rarely its variances, at last not at every update.

  **Until** `var_freeze_step` every update is made of a mean gradient g that all replicas share: at
  updates divisible by the variance interval the exact one, which also goes into the variance v; at
  all others :math:`\mathrm{mean}_C(g_1, \dots, g_N)`, which goes into the momentum only. The
  interval starts at 1 and doubles whenever it has been hit `var_update_scaler` times.

  **Afterwards** v stays, and every replica takes local steps with momentum of its own. At updates
  divisible by the local interval, with :math:`\Theta` the parameters after the last exchange, D the
  denominator :math:`\sqrt{\hat v} + \epsilon` and S the sum of the learning rates since then:

  .. math::
    c = \mathrm{mean}_C(D (\Theta - \theta_i)), \quad \Theta \leftarrow \Theta - c / D, \quad
    \theta_i \leftarrow \Theta, \quad m_i \leftarrow c / S

  The local interval starts at 1 and doubles every `local_step_scaler` updates, up to
  `local_step_clipper`. At the first update of this stage the residual is set to zero, since it
  changes its meaning.

  :math:`\mathrm{mean}_C`, the correction of bias (none in the published code), and elements with
  v = 0: as `one_bit_adam`, whose advice on variances holds here too. `weight_decay` is part of the
  local step and thus, as in the published code, of the momentum that is rebuilt from it.

  Wire, per device, over `axis_name`: a float32 all-reduce, :math:`2\frac{N-1}{N} 4d`, at updates of
  the variance; :math:`2 (N-1) (\lceil \lceil d/N \rceil / 8 \rceil + 4)` per leaf of d elements at
  the others until the freeze, and at exchanges after it; nothing at local steps. A leaf sharded
  over inner mesh axes is compressed shard by shard, so nothing crosses those axes.

  Per device: parameters, momentum (`inner_state`), the residual; typed so too, but equal after
  every exchange: the outer parameters (`anchor`). Equal: all else. A restore needs the same number
  of replicas, or a named replica change.

  Args:
    learning_rate: a number or an optax schedule.
    axis_name: axis of the replicas, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    var_freeze_step: updates before the variance is frozen.
    var_update_scaler: hits of the variance interval before it doubles.
    local_step_scaler: updates before the local interval doubles.
    local_step_clipper: largest local interval.
    b1: decay of the momentum.
    b2: decay of the variance.
    eps: added to the root of the variance.
    weight_decay: decoupled, times the learning rate.
    mean: how gradients and steps travel; default
      `error_feedback(axis_name, scaled_sign("rms"), specs=specs)`.
    specs: how leaves are sharded over the other mesh axes, for the default `mean`.

  Returns:
    A transform with `LocalUpdatesState`, the last one of a chain; after an exchange
    `jaxcomm.apply_updates` makes replicas agree bit for bit.

  Raises:
    ValueError: an argument outside these rules, `specs` beside a `mean`, `params` missing in
    update;
      in update as `compressed_mean`.

  References:
    Lu et al., 0/1 Adam, https://arxiv.org/abs/2202.06009, algorithm 1; the intervals as in
    DeepSpeed.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import zero_one_adam
    >>> tx = zero_one_adam(0.5, "replica", var_freeze_step=10)
    >>> grads = jnp.array([[1.0, -2.0], [3.0, -4.0]])
    >>> def step(g):
    ...   return tx.update(g, tx.init(jnp.zeros(2)), jnp.zeros(2))[0]
    >>> jax.vmap(step, axis_name="replica")(grads)[0].round(2).tolist()
    [-0.5, 0.5]
  """
  counts = (var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper)
  names = ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
  for name, value in zip(names, counts):
    check_count(name, value, at_least=1)
  check_adam(b1, b2, eps, weight_decay)
  method = _ZeroOneAdam(
    learning_rate, axis_name, *counts, b1, b2, eps, weight_decay, sign_mean(axis_name, mean, specs)
  )
  return optax.GradientTransformation(method.init, method.update)


def zero_one_adam_levels(
  num_updates: int,
  *,
  var_freeze_step: int,
  var_update_scaler: int = 16,
  local_step_scaler: int = 32768,
  local_step_clipper: int = 16,
) -> tuple[int, int, int]:
  """How many of the first updates of `zero_one_adam` send nothing, signs, and exact means.

  These are the levels 0, 1 and 2 of `exchange_level`.

  >>> from jaxcomm.transforms import zero_one_adam_levels
  >>> zero_one_adam_levels(100, var_freeze_step=20, var_update_scaler=4, local_step_scaler=16)
  (49, 41, 10)
  """
  counts = [0, 0, 0]
  every, hits, scaler, longest = 1, 0, var_update_scaler, 2**30
  for update in range(1, num_updates + 1):
    local = update > var_freeze_step
    if update == var_freeze_step + 1:
      every, hits, scaler, longest = 1, 0, local_step_scaler, local_step_clipper
    hit = update % every == 0
    counts[int(hit) if local else 1 + int(hit)] += 1
    hits += local or hit
    if hits >= scaler:
      every, hits = min(2 * every, longest), 0
  return counts[0], counts[1], counts[2]


@dataclasses.dataclass(frozen=True)
class _ZeroOneAdam:
  """Init and update; fields as the arguments of `zero_one_adam`."""

  learning_rate: optax.ScalarOrSchedule
  axis_name: str
  var_freeze_step: int
  var_update_scaler: int
  local_step_scaler: int
  local_step_clipper: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  mean: optax.GradientTransformation

  def init(self, params) -> LocalUpdatesState:
    check_floating("params", params)
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    own = ZeroOneAdamState(
      nu=jax.tree.map(jnp.copy, zeros),
      num_nu=jnp.zeros((), jnp.int32),
      variance=Interval(jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)),
      local=Interval(jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)),
      rate_sum=jnp.zeros((), jnp.float32),
      mean_state=self.mean.init(zeros),
      exact=jnp.zeros((), jnp.bool_),
    )
    anchor = optax.tree.cast(params, jnp.float32)
    anchor = jax.tree.map(jnp.copy, anchor)  # donation: never the parameters' own buffer
    return LocalUpdatesState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.bool_), anchor, zeros, own)

  def update(self, updates, state, params=None):
    if params is None:
      raise ValueError("`params` must be given to update: the outer parameters need them.")
    _axes.axis_size(self.axis_name)
    check_floating("updates", updates)
    rate = self.learning_rate
    rate = rate(state.count) if callable(rate) else rate
    count = jnp.asarray(optax.safe_increment(state.count))
    grads = optax.tree.cast(updates, jnp.float32)
    start = optax.tree.cast(params, jnp.float32)

    def local_stage(*args):
      return self._local_stage(count, rate, start, *args)

    def variance_stage(*args):
      return self._variance_stage(count, rate, *args)

    frozen = count > self.var_freeze_step
    args = (grads, state.anchor, state.inner_state, state.outer_state)
    new, synced, anchor, mu, own = _axes.cond(frozen, local_stage, variance_stage, *args)
    back = jax.tree.map(lambda x, p, u: (x - p).astype(u.dtype), new, start, updates)
    return back, LocalUpdatesState(count, synced, anchor, mu, own)

  def _variance_stage(self, count, rate, grads, anchor, mu, own):
    """New parameters, whether there was an exchange, outer parameters, momentum, the rest."""
    exact = jnp.equal(count % own.variance.length, 0)

    def take_exact(grads, mean_state):
      return pmean_over(self.axis_name).update(grads, optax.EmptyState())[0], mean_state

    grads, mean_state = _axes.cond(exact, take_exact, self.mean.update, grads, own.mean_state)
    nu = optax.tree.update_moment_per_elem_norm(grads, own.nu, self.b2, 2)
    own = own._replace(
      nu=jax.tree.map(functools.partial(jnp.where, exact), nu, own.nu),
      num_nu=own.num_nu + exact,
      variance=_hit(own.variance, exact, self.var_update_scaler),
      mean_state=mean_state,
      exact=exact,
    )
    mu = optax.tree.update_moment(grads, mu, self.b1, 1)
    anchor = self._step(count, rate, anchor, mu, own)
    return anchor, jnp.ones((), jnp.bool_), anchor, mu, own

  def _local_stage(self, count, rate, params, grads, anchor, mu, own):
    """As `_variance_stage`."""
    first = jnp.equal(count, self.var_freeze_step + 1)
    fresh = self.mean.init(own.nu)
    exchange = jnp.equal(count % own.local.length, 0)
    own = own._replace(
      local=_hit(own.local, True, self.local_step_scaler, self.local_step_clipper),
      rate_sum=own.rate_sum + rate,
      mean_state=jax.tree.map(functools.partial(jnp.where, first), fresh, own.mean_state),
      exact=jnp.zeros((), jnp.bool_),
    )
    mu = optax.tree.update_moment(grads, mu, self.b1, 1)
    local = self._step(count, rate, params, mu, own)

    def sync(local, anchor, mu, own):
      return self._sync(count, local, anchor, mu, own)

    def keep(*args):
      return args

    new, anchor, mu, own = _axes.cond(exchange, sync, keep, local, anchor, mu, own)
    return new, exchange, anchor, mu, own

  def _sync(self, count, local, anchor, mu, own):
    d = self._denominator(own)
    moved = jax.tree.map(lambda a, p, d: (a - p) * d, anchor, local, d)
    moved, mean_state = self.mean.update(moved, own.mean_state)
    anchor = jax.tree.map(lambda a, c, d, v: a - _where_seen(v, c / d), anchor, moved, d, own.nu)
    moving = own.rate_sum > 0
    scale = (1 - self.b1**count) / jnp.where(moving, own.rate_sum, 1.0)  # of biased momentum
    mu = jax.tree.map(lambda c, m: jnp.where(moving, scale * c, m), moved, mu)
    own = own._replace(mean_state=mean_state, rate_sum=jnp.zeros_like(own.rate_sum))
    return anchor, anchor, mu, own

  def _step(self, count, rate, params, mu, own):
    """Parameters after a step of Adam, float32."""
    mu_hat = optax.tree.bias_correction(mu, self.b1, count)

    def leaf(p, m, d, v):
      return p - rate * (_where_seen(v, m / d) + self.weight_decay * p)

    return jax.tree.map(leaf, params, mu_hat, self._denominator(own), own.nu)

  def _denominator(self, own):
    nu_hat = optax.tree.bias_correction(own.nu, self.b2, own.num_nu)
    return jax.tree.map(lambda v: jnp.sqrt(v) + self.eps, nu_hat)


def _where_seen(nu: jax.Array, x: jax.Array) -> jax.Array:
  """x, and zero where no gradient has ever been seen."""
  return jnp.where(nu == 0, 0.0, x)  # a NaN shows


def _hit(interval: Interval, now: Any, num_hits: int, longest: int = 2**30) -> Interval:
  """`interval` after an update that did or did not hit it."""
  hits = interval.hits + now
  full = hits >= num_hits
  length = jnp.where(full, jnp.minimum(2 * interval.length, longest), interval.length)
  return Interval(length, jnp.where(full, 0, hits))
