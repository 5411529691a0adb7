"""Outer optimizers of asynchronous Local SGD: a step for every pseudo-gradient that arrives."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm.transforms._checks import check_count, check_decay, check_floating, check_transform


def async_outer(
  outer: optax.GradientTransformation,
  *,
  num_workers: int,
  buffer: int = 1,
  staleness: Literal["constant", "poly"] = "constant",
) -> optax.GradientTransformationExtraArgs:
  r"""Outer optimizer of a server that takes pseudo-gradients one by one, as workers finish.

  Each arrival :math:`\Delta` is weighted by its age s, the number of arrivals since its worker
  fetched the outer parameters; every B-th makes one step of `outer` on the mean of the last B,

  .. math::
    g = \sqrt{\frac BN}\; \frac1B \sum_{b=1}^B w(s_b)\,\Delta_b, \qquad
    w(s) = 1 \text{ or } (1 + s)^{-1/2}

  so that with `buffer=1` a single one counts :math:`1/\sqrt N`, and with `buffer=num_workers` (the
  delayed outer step) N of them make the step of a synchronous round. Momentum of single, stale
  arrivals is what makes plain Nesterov fail here: give it a buffer, or use `delayed_nesterov`.

  Nothing crosses a mesh axis: this runs where pseudo-gradients arrive. `simulate_arrivals` says in
  which order they do.

  Args:
    outer: an optimizer without a mean, e.g. `optax.sgd(0.7, momentum=0.9, nesterov=True)`.
    num_workers: N.
    buffer: arrivals per step (B), from 1 to N.
    staleness: `"constant"` for w = 1; `"poly"` for the root, where update needs the extra argument
      `age`, int32[].

  Returns:
    A transform whose updates are zero for arrivals that only fill the buffer.

  Raises:
    ValueError: an argument outside these rules, `outer` is no transform, updates are not floating
      point, or `age` is missing where it counts.

  References:
    Liu et al., Asynchronous Local-SGD Training for Language Modeling,
    https://arxiv.org/abs/2401.09135, and its notebook, for B = 1 and B = N.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import async_outer
    >>> tx = async_outer(optax.sgd(0.5), num_workers=2, buffer=2)
    >>> outer = jnp.array(1.0)
    >>> state = tx.init(outer)
    >>> for pseudo_gradient in (2.0, 4.0):
    ...   updates, state = tx.update(jnp.array(pseudo_gradient), state, outer)
    ...   outer = optax.apply_updates(outer, updates)
    ...   print(float(outer))
    1.0
    -0.5
  """
  check_transform("outer", outer)
  check_count("num_workers", num_workers, at_least=1)
  check_count("buffer", buffer, at_least=1)
  if buffer > num_workers:
    raise ValueError(f"`buffer` must be at most `num_workers`, {num_workers}, got {buffer}.")
  if staleness not in ("constant", "poly"):
    raise ValueError(f"`staleness` must be 'constant' or 'poly', got {staleness!r}.")
  if buffer > 1:
    outer = optax.MultiSteps(outer, buffer).gradient_transformation()
  outer = optax.with_extra_args_support(outer)

  def update_fn(updates, state, params=None, *, age=None, **extra_args):
    check_floating("updates", updates)
    weight = jnp.float32(math.sqrt(buffer / num_workers))
    if staleness == "poly":
      if age is None:
        raise ValueError("`age` must be given to update with staleness 'poly', got None.")
      weight = weight / jnp.sqrt(1.0 + jnp.asarray(age, jnp.float32))
    updates = jax.tree.map(lambda g: (weight * g).astype(g.dtype), updates)
    return outer.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(outer.init, update_fn)


class DelayedNesterovState(NamedTuple):
  """State of `delayed_nesterov`.

  Attributes:
    count: int32[]; arrivals so far.
    gathered: like the updates, float32: the sum of the arrivals since momentum last changed.
    momentum: like the updates, float32.
  """

  count: jax.Array
  gathered: optax.Updates
  momentum: optax.Updates


def delayed_nesterov(
  learning_rate: float, momentum: float = 0.9, *, num_workers: int
) -> optax.GradientTransformation:
  r"""Nesterov's outer step, spread over N arrivals: momentum acts with the last of them.

  Every arrival moves the outer parameters by its own part, at once; every N-th also changes the
  momentum, by the mean of N, and applies it:

  .. math::
    \Theta \leftarrow \Theta - \nu\,\frac{\Delta_t}{N}, \qquad \text{and if } N \mid t: \quad
    m \leftarrow \mu m + \frac1N \sum_{b=0}^{N-1} \Delta_{t-b}, \quad
    \Theta \leftarrow \Theta - \nu \mu m

  N updates together are one of `optax.sgd(learning_rate, momentum, nesterov=True)` on the mean.

  Nothing crosses a mesh axis: this runs where pseudo-gradients arrive.

  Args:
    learning_rate: ν, positive.
    momentum: μ, in [0, 1).
    num_workers: N.

  Raises:
    ValueError: an argument outside these rules; in update, updates that are not floating point.

  References:
    Liu et al., Asynchronous Local-SGD Training for Language Modeling,
    https://arxiv.org/abs/2401.09135, delayed Nesterov (with c = 0).

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import delayed_nesterov
    >>> tx = delayed_nesterov(1.0, 0.5, num_workers=2)
    >>> outer = jnp.array(0.0)
    >>> state = tx.init(outer)
    >>> for pseudo_gradient in (2.0, 4.0):
    ...   updates, state = tx.update(jnp.array(pseudo_gradient), state)
    ...   outer = optax.apply_updates(outer, updates)
    ...   print(float(outer))
    -1.0
    -4.5
  """
  check_count("num_workers", num_workers, at_least=1)
  check_decay("momentum", momentum)
  if not isinstance(learning_rate, Tracer) and not 0 < learning_rate < math.inf:
    raise ValueError(f"`learning_rate` must be positive and finite, got {learning_rate!r}.")

  def init_fn(params):
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return DelayedNesterovState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

  def update_fn(updates, state, params=None):
    del params
    check_floating("updates", updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    last = count % num_workers == 0
    gathered = jax.tree.map(lambda s, g: s + g / num_workers, state.gathered, updates)

    def changed(m: Any, s: Any) -> Any:
      return jnp.where(last, momentum * m + s, m)

    def step(g, m):
      return (-learning_rate * (g / num_workers + jnp.where(last, momentum * m, 0.0))).astype(
        g.dtype
      )

    new = jax.tree.map(changed, state.momentum, gathered)
    gathered = jax.tree.map(lambda s: jnp.where(last, 0.0, s), gathered)
    return jax.tree.map(step, updates, new), DelayedNesterovState(count, gathered, new)

  return optax.GradientTransformation(init_fn, update_fn)
