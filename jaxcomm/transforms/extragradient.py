"""Extragradient, and the protocol of methods that need an operator at two points per step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.compressors import Compressor
from jaxcomm.transforms import _masha
from jaxcomm.transforms._compressed import mean_of_messages
from jaxcomm.transforms._leafwise import map_leaves


class ExtragradientTransformation(NamedTuple):
  """A method for variational inequalities: two operator values per step, asked for in turn.

  An operator F maps parameters to a tree like them: of min x max y f(x, y) it is (f_x, -f_y), which
  `saddle_operator` makes; of a minimisation it is the gradient. With F_m of worker m:

      state = tx.init(params, F_m(params))
      ...
      half, state = tx.extrapolate(params, state)
      params, state, do_refresh = tx.update(F_m(half), params, state)
      if do_refresh:  # jax.lax.cond under jit; equal on all workers
        state = tx.refresh(F_m(state.reference), state)

  `masha_step` does all of it. All calls belong inside `jax.shard_map` or
  `jax.vmap(axis_name=...)`. Where shard_map checks types, `jax.grad` at a point that all workers
  share returns the sum over them: take it at `jax.lax.pcast(point, axis_name, to="varying")`, as
  `saddle_operator` does. `half` is typed so already.

  Attributes:
    init: (params, local operator value) -> state; sends one dense mean.
    extrapolate: (params, state) -> (half, state); sends nothing.
    update: (operator at half, params, state) -> (params, state, do_refresh: bool[]).
    refresh: (operator at state.reference, state) -> state; sends one dense mean.
  """

  init: Callable[..., Any]
  extrapolate: Callable[..., Any]
  update: Callable[..., Any]
  refresh: Callable[..., Any]


class ExtragradientState(NamedTuple):
  """State of `extragradient`, equal on all workers.

  Attributes:
    step: int32[], steps taken.
    needs_refresh: bool[], whether `mean_operator` is not that of `reference`.
    reference: like the parameters: where the next step starts.
    mean_operator: like the parameters: F(reference), as it was received.
  """

  step: jax.Array
  needs_refresh: jax.Array
  reference: optax.Params
  mean_operator: optax.Updates


def extragradient(
  learning_rate: float,
  compressor: Compressor | None = None,
  *,
  axis_name: str = "data",
  prox: Callable[[Any, float], Any] | None = None,
  specs: Any = None,
  seed: int = 0,
) -> ExtragradientTransformation:
  r"""The dense baseline; with a compressor the naive one, which stops where its noise stops it.

  .. math::
    z^{k+1/2} = \mathrm{prox}_{\gamma h}(z^k - \gamma F(z^k)), \quad
    z^{k+1} = \mathrm{prox}_{\gamma h}(z^k - \gamma F(z^{k+1/2})), \quad
    F = \frac1M \sum_m F_m \;\text{ or }\; \frac1M \sum_m D(C(F_m))

  The :math:`F_m` are not zero at the solution, only their mean is: compressing them leaves noise
  there. `masha1` and `masha2` compress differences that vanish.

  Wire, per worker and step: two means, dense :math:`2 \cdot 2 \frac{M-1}{M} 4d` bytes (a ring in
  float32), or :math:`2 (M-1)\,\mathrm{payload}(d)`. State is equal on all workers.

  Args:
    learning_rate: gamma > 0; 1 / (2 L) for an L-Lipschitz operator.
    compressor: of both means; None for none.
    axis_name: axis of the workers.
    prox: (tree, gamma) -> tree, the proximal map of gamma h; None for h = 0.
    specs: how leaves are sharded over other mesh axes, see `compressed_mean`.
    seed: of the compressor's keys.

  Returns:
    An `ExtragradientTransformation`; `do_refresh` is always true.

  Raises:
    ValueError: as `masha1`.

  References:
    Korpelevich, The extragradient method for finding saddle points and other problems, 1976.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.transforms import extragradient, masha_step, saddle_operator
    >>> operator = saddle_operator(lambda x, y, c: x * y - c * y)
    >>> tx = extragradient(0.5)
    >>> def solve(c):
    ...   z = (jnp.zeros(()), jnp.zeros(()))
    ...   step, state = masha_step(operator, tx), tx.init(z, operator(z, c))
    ...   for _ in range(30):
    ...     z, state, _ = step(z, state, c)
    ...   return z
    >>> x, y = jax.vmap(solve, axis_name="data")(jnp.asarray([0.0, 2.0]))
    >>> bool(jnp.allclose(x, 1.0, atol=0.05)), bool(jnp.allclose(y, 0.0, atol=0.05))
    (True, True)
  """
  _masha.check_rate(learning_rate)
  prox = prox or _masha.no_prox

  def mean(value, count):
    if compressor is None:
      return _masha.dense_mean(value, axis_name)

    def mean_leaf(leaf, count, x):
      assert compressor is not None
      out, _ = mean_of_messages(x, axis_name, compressor, leaf.key(seed, count))
      return (out.astype(x.dtype),)

    return map_leaves(mean_leaf, count, value, axis_name=axis_name, specs=specs)[0]

  def init_fn(params, operator_value):
    _masha.check_params(params)
    _masha.check_operator(operator_value, params, axis_name)
    step = jnp.zeros((), jnp.int32)
    first = mean(operator_value, step)
    return ExtragradientState(step, jnp.zeros((), bool), jax.tree.map(jnp.copy, params), first)

  def extrapolate_fn(params, state):
    half = _masha.step_from(params, learning_rate, state.mean_operator, prox)
    return _axes.vary(_masha.unless_stale(half, state.needs_refresh), axis_name), state

  def update_fn(operator_value, params, state, *, reference_value=None):
    del reference_value
    _masha.check_operator(operator_value, params, axis_name)
    update = mean(operator_value, 2 * state.step + 1)
    new = _masha.step_from(params, learning_rate, update, prox)
    step = state.step + 1
    always = jnp.ones((), bool)
    return new, state._replace(step=step, needs_refresh=always, reference=new), always

  def refresh_fn(operator_value, state):
    _masha.check_operator(operator_value, state.reference, axis_name)
    fresh = mean(operator_value, 2 * state.step)
    return state._replace(needs_refresh=jnp.zeros((), bool), mean_operator=fresh)

  return ExtragradientTransformation(init_fn, extrapolate_fn, update_fn, refresh_fn)
