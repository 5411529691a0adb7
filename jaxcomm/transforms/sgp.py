"""Stochastic gradient push: every step each replica averages with a neighbour or two."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.collectives import Topology, gossip_error, one_peer_exponential
from jaxcomm.transforms._checks import check_floating, check_transform
from jaxcomm.transforms._gossip import check_topology, difference


class SGPState(NamedTuple):
  """State of `sgp`; what differs, differs on every replica.

  Attributes:
    count: int32[], equal on all devices; steps taken.
    weight: float32[], differs: the push-sum weight w.
    inner_state: of the inner optimizer, differs.
    message: None, or with `overlap` what is under way: like the parameters, differs.
    message_weight: None, or with `overlap` float32[], differs: its push-sum weight.
  """

  count: jax.Array
  weight: jax.Array
  inner_state: optax.OptState
  message: Any
  message_weight: Any


def sgp(
  inner: optax.GradientTransformation,
  topology: Topology | None = None,
  *,
  axis_name: str = "replica",
  overlap: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""A step of `inner`, then one push-sum gossip step, whose messages may come a step later.

  The parameters z are those that gradients are taken at; :math:`x = w z` is what gossip conserves:

  .. math::
    x_i \leftarrow w_i z_i + u_i, \quad x_i \leftarrow \sum_j p_{ij} x_j, \quad
    w_i \leftarrow \sum_j p_{ij} w_j, \quad z_i = x_i / w_i

  The columns of P sum to 1, so :math:`\sum x` and :math:`\sum w` stay, and z tends to the mean of x
  even where the rows do not sum to 1. With everybody alive all topologies here are doubly
  stochastic and w stays 1, exactly. (Assran et al. take the gradient step on x with the gradient at
  z, as here; `u` is the update of `inner`.)

  With `overlap` a replica keeps its own share at once, and adds what it receives in the next step:
  the message is state when that step begins, so that it can travel while the gradient is computed.
  The weights then count what is under way: w is below 1 (2/3 with one peer), the same on all.

  Wire, per device and step: the parameters in their own dtype and 4 bytes of weight to each
  neighbour, `gossip_mix_bytes` (4P + 4 bytes with one peer and P float32 parameters).

  Per replica, never equal: parameters and all state but `count`. A restore needs the same number of
  replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.sgd(0.1, momentum=0.9)`.
    topology: who sends to whom; default `one_peer_exponential()`.
    axis_name: axis of the replicas.
    overlap: whether messages arrive one step later.

  Returns:
    A transform with `SGPState`; its update takes `alive`, bool[N], as an extra argument: messages
    from and to dead replicas stay with their sender, with any topology. It belongs at the end of
    its chain.

  Raises:
    ValueError: `inner` is no transform, `topology` is none, parameters are not floating point,
      `params` are missing in update, the axis is unbound, or there is no such topology of N
      replicas.

  References:
    Assran et al., Stochastic Gradient Push, https://arxiv.org/abs/1811.10792.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import sgp
    >>> tx = sgp(optax.sgd(0.5))
    >>> def step(target):
    ...   p = jnp.zeros(())
    ...   updates, _ = tx.update(p - target, tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [1.0, 1.0]
  """
  topology = one_peer_exponential() if topology is None else topology
  check_transform("inner", inner)
  check_topology(topology)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    return SGPState(
      count=jnp.zeros((), jnp.int32),
      weight=jnp.ones((), jnp.float32),
      inner_state=inner.init(params),
      message=optax.tree.zeros_like(params) if overlap else None,
      message_weight=jnp.zeros((), jnp.float32) if overlap else None,
    )

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: they are averaged.")
    size = _axes.axis_size(axis_name)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    # Float32 in x and weight; messages in the dtype of the parameters.
    x = jax.tree.map(lambda p, u: state.weight * p + u.astype(jnp.float32), params, updates)
    new = (jax.tree.map(lambda x, p: x.astype(p.dtype), x, params), state.weight)
    sent = (state.message, state.message_weight) if overlap else new
    error = gossip_error(sent, axis_name, topology, step=state.count, alive=alive)
    pushed = jax.tree.map(jnp.add, (x, state.weight), error)
    if overlap:
      pushed = _swap(pushed, sent, new, _share(topology, size))
    x, weight = pushed
    z = jax.tree.map(lambda x: x / weight, x)
    return difference(z, params, updates), SGPState(
      count=jnp.asarray(optax.safe_increment(state.count)),
      weight=weight,
      inner_state=inner_state,
      message=new[0] if overlap else None,
      message_weight=new[1] if overlap else None,
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _share(topology: Topology, size: int) -> float:
  """How much of its x a replica sends away."""
  num_links = len(topology.phases(size)[0])
  return num_links / (num_links + 1)


def _swap(pushed: Any, arrived: Any, sent: Any, share: float) -> Any:
  """Adds the own part of what arrives, and takes away what is now under way."""

  def leaf(x, a, s):
    return x + share * (a.astype(jnp.float32) - s.astype(jnp.float32))

  return jax.tree.map(leaf, pushed, arrived, sent)
