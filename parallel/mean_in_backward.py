"""Gradients averaged layer by layer, while the backward pass goes on."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax

from jaxcomm import _axes

Function = Callable[..., Any]
Mean = Callable[[Any], Any]


def mean_in_backward(
  mean: Mean, *, axis_name: str = "replica", skip: Collection[str] = ()
) -> Callable[[Function], Function]:
  r"""A `partition` for models: gradients of weights are averaged where they arise.

  Models apply it to each of their parts, `f(weights, *args)`. The values of f do not change; the
  gradient of its weights becomes the mean over `axis_name` as soon as the backward pass has it:

  .. math:: \bar g_l = \mathrm{mean}_i\, \partial L_i / \partial w_l

  No other layer waits for this exchange. A back end that runs what is ready computes the layers
  below meanwhile (XLA on CPU, unrolled layers; on accelerators the scheduler decides). A mean of
  the finished gradient, `optax.chain(compressed_mean(...), ...)`, comes after all layers.

  Weights must be equal over `axis_name`, also by their types (not cast to varying), and every
  weight must pass through the partition: the gradient of another one is summed instead. A weight
  that several parts use (a tied embedding) would be averaged once per use: name it in `skip`, and
  hand the model `average_gradient` of it.

  Wire: what `mean` sends for the weights of each part, in the backward pass of every step.

  Args:
    mean: from a tree of gradients to their mean, equal on all devices, of the same shapes and
      dtypes; without state. Over `axis_name`.
    axis_name: axis of the replicas, of `jax.shard_map` or `jax.vmap`.
    skip: keys of weights that are left alone.

  Returns:
    A function of functions, the `partition` of `models.llama.loss`.

  Raises:
    ValueError: when the model is traced: `axis_name` is unbound, or there is something to `skip`
      and weights are not a dict.

  References:
    Li et al., PyTorch Distributed, https://arxiv.org/abs/2006.15704, section 3.2.3 (overlap by
    buckets, which follow the order of the backward pass).

  Example:
    >>> import jax, jax.numpy as jnp
    >>> partition = mean_in_backward(lambda tree: jax.lax.pmean(tree, "replica"))
    >>> layer = partition(lambda w, x: w["scale"] * x)
    >>> grad = jax.grad(lambda w, x: layer(w, x))
    >>> per_replica = jax.vmap(grad, in_axes=(None, 0), axis_name="replica")
    >>> per_replica({"scale": jnp.ones(())}, jnp.array([1.0, 3.0]))["scale"].tolist()
    [2.0, 2.0]
  """

  def partition(function: Function) -> Function:
    @functools.wraps(function)
    def wrapped(weights, *args):
      if skip and not isinstance(weights, dict):
        raise ValueError(f"`skip` names keys of a dict of weights, got {type(weights).__name__}.")
      averaged = {k: v for k, v in weights.items() if k not in skip} if skip else weights
      averaged = average_gradient(averaged, mean, axis_name=axis_name)
      return function({**weights, **averaged} if skip else averaged, *args)

    return wrapped

  return partition


def average_gradient(weights: Any, mean: Mean, *, axis_name: str = "replica") -> Any:
  """`weights`; their gradient is averaged over `axis_name` when all of their uses have given it.

  Wire: what `mean` sends for a tree like `weights`, in the backward pass; nothing in the forward.

  Args:
    weights: arrays, equal over `axis_name`, also by their types.
    mean: as in `mean_in_backward`.
    axis_name: axis of the replicas.

  Returns:
    The same values, typed as differing.

  Raises:
    ValueError: `axis_name` is unbound.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> mean = lambda tree: jax.lax.pmean(tree, "replica")
    >>> grad = jax.grad(lambda w, x: x * average_gradient(w, mean))
    >>> jax.vmap(grad, (None, 0), axis_name="replica")(jnp.ones(()), jnp.array([1.0, 3.0])).tolist()
    [2.0, 2.0]
  """
  _axes.axis_size(axis_name)
  return _averaged(mean, axis_name, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _averaged(mean, axis_name, weights):
  return _axes.vary(weights, axis_name)


def _forward(mean, axis_name, weights):
  return _averaged(mean, axis_name, weights), None


def _backward(mean, axis_name, _, grads):
  return (mean(grads),)


_averaged.defvjp(_forward, _backward)
