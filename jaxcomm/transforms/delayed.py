"""An outer step that acts on what was handed to it one round before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.transforms._checks import check_transform


class DelayedState(NamedTuple):
  """State of `delayed`. All of it belongs to a checkpoint, or a resume would lose a round.

  Attributes:
    inflight: like the parameters, float32, differs per replica: what the next call acts on.
    outer_state: of the transform that is delayed.
  """

  inflight: optax.Updates
  outer_state: optax.OptState


def delayed(outer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  r"""`outer`, one call late: :math:`u_t = \mathrm{outer}(g_{t-1})`, with :math:`g_{-1} = 0`.

  As the outer chain of `diloco` it makes the exchange of a round use what the replicas had at the
  end of the round before. Its operands are there when a round begins and its result is needed when
  it ends, so the exchange may take as long as the round: `overlapped_round` compiles that, and
  `HostRound` takes it off the device. Under `diloco` itself the delay is only simulated.

  The first call acts on zeros: the first two rounds start from the same parameters.

  Wire: what `outer` sends. Memory: one float32 tree per replica more.

  Args:
    outer: a mean and an optimizer, e.g. `optax.chain(pmean_over("replica"), optax.sgd(0.7))`.

  Returns:
    A `GradientTransformation` with `DelayedState`.

  Raises:
    ValueError: `outer` is not a transform.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import pmean_over
    >>> from jaxcomm.transforms import delayed
    >>> tx = delayed(pmean_over("replica"))
    >>> def two_calls(g):
    ...   first, state = tx.update(g, tx.init(g))
    ...   second, _ = tx.update(10 * g, state)
    ...   return first, second
    >>> first, second = jax.vmap(two_calls, axis_name="replica")(jnp.array([1.0, 3.0]))
    >>> first.tolist(), second.tolist()
    ([0.0, 0.0], [2.0, 2.0])
  """
  check_transform("outer", outer)
  outer = optax.with_extra_args_support(outer)

  def init_fn(params):
    return DelayedState(optax.tree.zeros_like(params, dtype=jnp.float32), outer.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    step, outer_state = outer.update(state.inflight, state.outer_state, params, **extra_args)
    inflight = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
    return step, DelayedState(inflight, outer_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
