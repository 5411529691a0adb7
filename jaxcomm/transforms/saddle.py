"""Saddle points as operators: the sign of the max player, its check, and a duality gap."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes


def saddle_operator(
  fun: Callable[..., jax.Array],
  argnums_min: Sequence[int] = (0,),
  argnums_max: Sequence[int] = (1,),
) -> Callable[..., tuple]:
  r"""The operator :math:`F = (\nabla_x f, -\nabla_y f)` of :math:`\min_x \max_y f(x, y)`.

  Args:
    fun: (x, y, *rest) -> scalar; minimising and maximising arguments come first, in any order.
    argnums_min: which of them are minimised over.
    argnums_max: which of them are maximised over.

  Returns:
    `operator(z, *rest)` with the tuple z of all these arguments: a tuple like z. Inside
    `jax.shard_map` it is this worker's own, also at a point that all workers share.

  Raises:
    ValueError: the numbers are not 0, 1, ... without gaps and repeats.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.transforms import saddle_operator
    >>> operator = saddle_operator(lambda x, y: 3 * x * y)
    >>> [float(v) for v in operator((1.0, 2.0))]
    [6.0, -3.0]
  """
  numbers = sorted([*argnums_min, *argnums_max])
  if numbers != list(range(len(numbers))) or not argnums_min or not argnums_max:
    raise ValueError(
      "`argnums_min` and `argnums_max` must share out 0, 1, ... among them, got"
      f" {tuple(argnums_min)} and {tuple(argnums_max)}."
    )

  def operator(z, *rest):
    for axis in sorted(_varying(rest)):  # else shard_map would sum the gradients of all workers
      z = _axes.vary(z, axis)
    grads = jax.grad(lambda z: fun(*z, *rest))(tuple(z))
    return tuple(
      jax.tree.map(jnp.negative, g) if i in argnums_max else g for i, g in enumerate(grads)
    )

  return operator


def _varying(tree: Any) -> set[str]:
  return {axis for x in jax.tree.leaves(tree) for axis in _axes.varying_axes(x)}


def check_monotone(
  operator: Callable[[Any], Any], params: Any, key: jax.Array, *, num_pairs: int = 16
) -> float:
  r"""The least of :math:`\langle F(u) - F(v), u - v\rangle / \|u - v\|^2` over random pairs.

  Pairs are drawn around `params`. Warns if it is clearly negative: then the operator is not
  monotone, most often because the sign of the max player is missing (see `saddle_operator`).

  Args:
    operator: tree -> tree like it.
    params: floating point.
    key: of the pairs.
    num_pairs: how many.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.transforms import check_monotone
    >>> round(check_monotone(lambda z: 2 * z, jnp.zeros(3), jax.random.key(0)), 4)
    2.0
  """

  def one(key):
    keys = jax.random.split(key)
    u, v = (
      optax.tree.add(params, optax.tree.random_like(k, params, jax.random.normal)) for k in keys
    )
    apart, change = optax.tree.sub(u, v), optax.tree.sub(operator(u), operator(v))
    square = optax.tree.vdot(apart, apart)
    slope = optax.tree.norm(change) / jnp.sqrt(square)
    return optax.tree.vdot(change, apart) / square, slope

  values, slopes = jax.lax.map(one, jax.random.split(key, num_pairs))
  least = float(values.min())
  if least < -1e-3 * float(slopes.max()):
    warnings.warn(
      f"the operator is not monotone: <F(u) - F(v), u - v> = {least:.3g} ||u - v||^2 for some u, v;"
      " does the max player have its minus sign (saddle_operator)?",
      stacklevel=2,
    )
  return least


def gap_bilinear(
  a: jax.Array, b: jax.Array, c: jax.Array, z: tuple[jax.Array, jax.Array], radius: float
) -> jax.Array:
  r"""The duality gap of :math:`f(x, y) = y^T A x + b^T x - c^T y` on balls, in closed form.

  .. math::
    \max_{\|y'\| \le r} f(x, y') - \min_{\|x'\| \le r} f(x', y)
    = r \|A x - c\| + r \|A^T y + b\| + b^T x + c^T y

  Args:
    a: [m, n].
    b: [n].
    c: [m].
    z: (x [n], y [m]), in the balls.
    radius: r > 0, of both balls.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.transforms import gap_bilinear
    >>> one = jnp.ones(1)
    >>> float(gap_bilinear(jnp.eye(1), 0 * one, 0 * one, (one, 0 * one), 2.0))
    2.0
  """
  x, y = z
  far = jnp.linalg.norm(a @ x - c) + jnp.linalg.norm(a.T @ y + b)
  return radius * far + b @ x + c @ y
