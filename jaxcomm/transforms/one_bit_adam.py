"""1-bit Adam: Adam until the variances have settled, then momentum in signs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.compressors import scaled_sign
from jaxcomm.transforms._checks import check_count, check_decay, check_floating, check_transform
from jaxcomm.transforms.error_feedback import error_feedback
from jaxcomm.transforms.pmean_over import pmean_over


class OneBitAdamState(NamedTuple):
  """State of `one_bit_adam` (the first part of its chain).

  Attributes:
    count: int32[], equal on all devices; updates made.
    mu: like the parameters, float32, equal on all devices: the mean momentum.
    nu: like the parameters, float32, equal on all devices: the variance, frozen after the warm-up.
    mean_state: of `mean`; its residual differs per device.
    exact: bool[], equal on all devices; whether the last update took an exact mean.
  """

  count: jax.Array
  mu: optax.Updates
  nu: optax.Updates
  mean_state: optax.OptState
  exact: jax.Array


def one_bit_adam(
  learning_rate: optax.ScalarOrSchedule,
  axis_name: str,
  *,
  warmup_steps: int,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
  mean: optax.GradientTransformation | None = None,
  specs: Any = None,
) -> optax.GradientTransformation:
  r"""Adam(W) on the gradients of all devices, with one bit per element after a warm-up.

  For `warmup_steps` updates, Adam on the exact mean gradient. Then, with v as the warm-up left it:

  .. math::
    m_i = \beta_1 m + (1 - \beta_1) g_i, \quad m \leftarrow \mathrm{mean}_C(m_1, \dots, m_N), \quad
    \theta \leftarrow \theta - \gamma \Big(\frac{\hat m}{\sqrt{\hat v} + \epsilon} +
    \lambda \theta\Big)

  :math:`\mathrm{mean}_C` is error feedback around signs with one scale per chunk, in two hops. The
  error of the second hop is kept by the device that owns the chunk, in the same buffer as its own
  and N-fold (`compressed_pmean_with_error`), where the paper has two buffers: the sum of all
  outputs is as exact, the mean residual some per cent larger. Bias is corrected as in Adam, so the
  step does not jump at the end of the warm-up; the paper has no correction. Where :math:`v = 0` an
  element has never had a gradient: its momentum, nothing but the scale of its chunk, is ignored.

  A sign gives every element of a chunk the same magnitude, so elements of far smaller variance than
  their chunk take large steps of alternating sign: warm up until the variances are of use (the
  paper: 15 to 20 % of all steps), and give rarely used embedding rows a mean of their own
  (`optax.masked`).

  Wire, per device and update, over `axis_name`: in the warm-up a float32 all-reduce,
  :math:`2\frac{N-1}{N} 4d`; then :math:`2 (N-1) (\lceil \lceil d/N \rceil / 8 \rceil + 4)` per leaf
  of d elements (`collectives.compressed_pmean_bytes`), about 1/32. A leaf sharded over inner mesh
  axes is compressed shard by shard, so nothing crosses those axes.

  Per device: the residual. Equal: `count`, `mu`, `nu`. A restore needs the same number of replicas,
  or a named replica change.

  Args:
    learning_rate: a number or an optax schedule; best constant or falling after the warm-up.
    axis_name: axis of the replicas, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    warmup_steps: updates of plain Adam, at least 1.
    b1: decay of the momentum.
    b2: decay of the variance.
    eps: added to the root of the variance.
    weight_decay: decoupled, times the learning rate.
    mean: of the momentum after the warm-up; default
      `error_feedback(axis_name, scaled_sign("rms"), specs=specs)`.
    specs: how leaves are sharded over the other mesh axes, for the default `mean`.

  Returns:
    A `GradientTransformation`: the last one of a chain, which needs no other mean.

  Raises:
    ValueError: an argument outside these rules, `specs` beside a `mean`; in update as
      `compressed_mean`.

  References:
    Tang et al., 1-bit Adam, https://arxiv.org/abs/2102.02888, algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import one_bit_adam
    >>> tx = one_bit_adam(0.5, "replica", warmup_steps=10)
    >>> grads = jnp.array([[1.0, -2.0], [3.0, -4.0]])
    >>> def step(g):
    ...   return tx.update(g, tx.init(g), jnp.zeros(2))[0]
    >>> jax.vmap(step, axis_name="replica")(grads)[0].round(2).tolist()
    [-0.5, 0.5]
  """
  check_count("warmup_steps", warmup_steps, at_least=1)
  check_adam(b1, b2, eps, weight_decay)
  core = _momentum_in_signs(axis_name, warmup_steps, b1, b2, eps, sign_mean(axis_name, mean, specs))
  decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
  return optax.chain(core, *decay, optax.scale_by_learning_rate(learning_rate))


def _momentum_in_signs(axis_name, warmup_steps, b1, b2, eps, mean):
  exact_mean = pmean_over(axis_name)

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    nu = jax.tree.map(jnp.copy, zeros)
    count, exact = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.bool_)
    return OneBitAdamState(count, zeros, nu, mean.init(zeros), exact)

  def update_fn(updates, state, params=None):
    del params
    _axes.axis_size(axis_name)
    check_floating("updates", updates)
    grads = optax.tree.cast(updates, jnp.float32)

    def warm_up(grads, mu, nu, mean_state):
      grads, _ = exact_mean.update(grads, optax.EmptyState())
      mu = optax.tree.update_moment(grads, mu, b1, 1)
      nu = optax.tree.update_moment_per_elem_norm(grads, nu, b2, 2)
      return mu, nu, mean_state

    def signs(grads, mu, nu, mean_state):
      own = optax.tree.update_moment(grads, mu, b1, 1)
      mu, mean_state = mean.update(own, mean_state)
      mu = jax.tree.map(lambda m, v: jnp.where(v == 0, 0.0, m), mu, nu)  # a NaN shows
      return mu, nu, mean_state

    args = (grads, state.mu, state.nu, state.mean_state)
    exact = state.count < warmup_steps
    mu, nu, mean_state = _axes.cond(exact, warm_up, signs, *args)
    count = jnp.asarray(optax.safe_increment(state.count))
    mu_hat = optax.tree.bias_correction(mu, b1, count)
    nu_hat = optax.tree.bias_correction(nu, b2, jnp.minimum(count, warmup_steps))
    steps = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu_hat, nu_hat)
    steps = optax.tree.cast_like(steps, updates)
    return steps, OneBitAdamState(count, mu, nu, mean_state, exact)

  return optax.GradientTransformation(init_fn, update_fn)


def sign_mean(axis_name: str, mean: Any, specs: Any) -> optax.GradientTransformation:
  """`mean`, or by default error feedback around scaled signs."""
  if mean is None:
    return error_feedback(axis_name, scaled_sign("rms"), specs=specs)
  check_transform("mean", mean)
  if specs is not None:
    raise ValueError("`specs` has no effect beside `mean`: give it to the mean.")
  return mean


def check_adam(b1: Any, b2: Any, eps: Any, weight_decay: Any) -> None:
  """Raises ValueError for constants that are not those of Adam."""
  check_decay("b1", b1)
  check_decay("b2", b2)
  for name, value in (("eps", eps), ("weight_decay", weight_decay)):
    if value < 0:
      raise ValueError(f"`{name}` must be at least 0, got {value!r}.")
