"""Sharpness-aware minimisation as a loss: its value is the loss, its gradient SAM's."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def sam_loss(
  loss_fn: Callable[..., Any],
  rho: float = 0.05,
  *,
  has_aux: bool = False,
  norm_axes: Sequence[str] = (),
) -> Callable[..., Any]:
  r"""A loss with the value of `loss_fn` and the gradient at the worst point within `rho`.

  .. math:: \nabla = \nabla F(x + \rho\,g / \|g\|), \quad g = \nabla F(x)

  Any training loop that differentiates the loss thus takes sharpness-aware gradients; both passes
  see the same batch and random keys. It costs a second pass and sends nothing. The radius itself is
  not differentiated.

  Args:
    loss_fn: `(params, ...) -> loss`, or `(loss, aux)` with `has_aux`.
    rho: radius in the Euclidean norm of all parameters together, >= 0; 0 returns `loss_fn` itself.
    has_aux: whether `loss_fn` returns a pair; `aux` is that of the first pass, at x.
    norm_axes: manual mesh axes that shard the parameters of one replica, to sum the norm over
      (automatic axes need not be named, and the axis of the replicas must not).

  Returns:
    A function with the arguments and results of `loss_fn`.

  Raises:
    ValueError: `rho` is negative or not a number.

  References:
    Foret et al., Sharpness-Aware Minimization, https://arxiv.org/abs/2010.01412.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.transforms import sam_loss
    >>> loss = sam_loss(lambda x: jnp.sum(x**2) / 2, rho=0.5)
    >>> value, grad = jax.value_and_grad(loss)(jnp.array([3.0, 4.0]))
    >>> float(value), [round(float(g), 4) for g in grad]
    (12.5, [3.3, 4.4])
  """
  if isinstance(rho, bool) or not rho >= 0:
    raise ValueError(f"`rho` must be a number >= 0, got {rho!r}.")
  if rho == 0:
    return loss_fn

  def loss(params, *args, **kwargs):
    here = jax.lax.stop_gradient(params)
    out, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(here, *args, **kwargs)
    shifted = jax.tree.map(jnp.add, params, _ascent(grads, rho, tuple(norm_axes)))
    there = loss_fn(shifted, *args, **kwargs)
    if not has_aux:
      return _value_of(out, there)
    return _value_of(out[0], there[0]), out[1]

  return loss


def _ascent(grads: Any, rho: float, norm_axes: tuple[str, ...]) -> Any:
  """rho * g / ||g||, in the dtypes of g; zero where g is zero."""
  squares = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
  for axis in norm_axes:
    squares = jax.lax.psum(squares, axis)
  scale = rho / (jnp.sqrt(squares) + 1e-12)
  return jax.tree.map(lambda g: (scale * g.astype(jnp.float32)).astype(g.dtype), grads)


def _value_of(value: jax.Array, like: jax.Array) -> jax.Array:
  """`value` with the derivative of `like`."""
  return jax.lax.stop_gradient(value) + (like - jax.lax.stop_gradient(like))
