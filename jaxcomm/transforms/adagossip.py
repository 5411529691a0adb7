"""AdaGossip: the pull towards the neighbours, scaled for each parameter as in Adam."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import Topology, gossip_error
from jaxcomm.transforms._checks import check_decay, check_floating, check_transform
from jaxcomm.transforms._gossip import check_alive_symmetric, check_positive, check_topology


class AdaGossipState(NamedTuple):
  """State of `adagossip`.

  Attributes:
    count: int32[], equal on all devices; steps taken.
    inner_state: of the inner optimizer, differs per replica.
    nu: like the parameters, float32, differs per replica: mean square of the gossip error.
  """

  count: jax.Array
  inner_state: optax.OptState
  nu: optax.Updates


def adagossip(
  inner: optax.GradientTransformation,
  topology: Topology,
  *,
  consensus_lr: float | jax.Array,
  b2: float | jax.Array = 0.999,
  eps: float | jax.Array = 1e-8,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""A step of `inner`, then a step towards the neighbours' average of its own size per parameter.

  .. math::
    x_i \leftarrow x_i + u_i, \quad e_i = \sum_j w_{ij} x_j - x_i, \quad
    v_i \leftarrow \beta_2 v_i + (1 - \beta_2) e_i^2, \quad
    x_i \leftarrow x_i + \gamma\,e_i / (\sqrt{v_i} + \epsilon)

  There is no correction of bias: the first steps are up to :math:`\gamma / \sqrt{1 - \beta_2}`
  long. Where differences are steady a step is about :math:`\gamma` long, however large they are, so
  choose it well below the spread that you tolerate. Unlike plain gossip this does not keep the mean
  of the
  parameters: replicas scale the same difference differently.

  Wire, per device and step: the parameters in their own dtype to each neighbour,
  `gossip_mix_bytes`.

  Per replica, never equal: parameters, `nu` and `inner_state`. A restore needs the same number of
  replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.sgd(0.1)`.
    topology: who averages with whom, e.g. `ring()`.
    consensus_lr: γ > 0.
    b2: β2 in [0, 1), decay of the squared error.
    eps: ε > 0.
    axis_name: axis of the replicas.

  Returns:
    A transform with `AdaGossipState`; its update takes `alive`, bool[N], as an extra argument, if
    the topology is symmetric. It belongs at the end of its chain.

  Raises:
    ValueError: an argument outside these rules, `inner` is no transform, parameters are not
      floating point, `params` are missing in update, the axis is unbound, there is no such topology
      of N replicas, or `alive` with a directed topology.

  References:
    Aketi et al., AdaGossip, https://arxiv.org/abs/2404.05919 (there of compressed messages; the
    constants are not the paper's).

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import adagossip
    >>> from jaxcomm.collectives import ring
    >>> tx = adagossip(optax.sgd(0.5), ring(), consensus_lr=0.25, b2=0.0)
    >>> def step(p):
    ...   updates, _ = tx.update(jnp.zeros(()), tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [0.25, 3.75]
  """
  check_transform("inner", inner)
  check_topology(topology)
  check_decay("b2", b2)
  check_positive("consensus_lr", consensus_lr)
  check_positive("eps", eps)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    nu = optax.tree.zeros_like(params, dtype=jnp.float32)
    return AdaGossipState(jnp.zeros((), jnp.int32), inner.init(params), nu)

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: they are averaged.")
    check_alive_symmetric(alive, topology)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    local = optax.apply_updates(params, updates)
    error = gossip_error(local, axis_name, topology, step=state.count, alive=alive)
    nu = optax.tree.update_moment_per_elem_norm(error, state.nu, b2, 2)

    def leaf(u, e, v):
      return (u.astype(jnp.float32) + consensus_lr * e / (jnp.sqrt(v) + eps)).astype(u.dtype)

    step = jax.tree.map(leaf, updates, error, nu)
    return step, AdaGossipState(jnp.asarray(optax.safe_increment(state.count)), inner_state, nu)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
