"""AD-PSGD in lock step: random pairs average while stale gradients are on their way."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import Topology, gossip_error, random_matching
from jaxcomm.transforms._checks import check_count, check_floating, check_transform
from jaxcomm.transforms._gossip import check_alive_symmetric, check_topology


class ADPSGDState(NamedTuple):
  """State of `ad_psgd`.

  Attributes:
    count: int32[], equal on all devices; steps taken.
    inner_state: of the inner optimizer, differs per replica.
    pending: the last `delay` updates, float32, oldest first; differ per replica.
  """

  count: jax.Array
  inner_state: optax.OptState
  pending: tuple[optax.Updates, ...]


def ad_psgd(
  inner: optax.GradientTransformation,
  topology: Topology | None = None,
  *,
  delay: int = 0,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""Averages the parameters before a step, then adds the update computed `delay` steps ago.

  .. math:: x_i \leftarrow \sum_j w_{ij} x_j + u_i^{(t - \tau)}, \quad
    u_i^{(t)} = \mathrm{inner}(\nabla F_i(x_i^{(t)}))

  In AD-PSGD every replica runs at its own pace: while it computes a gradient, others average with
  it, and the update lands on parameters that the gradient has not seen. One compiled program runs
  in lock step, so here all replicas are equally late: by the average of the same step, and by
  `delay` steps more. Averaging needs the parameters only, not the gradient, so that it can travel
  while the gradient is computed.

  Wire, per device and step: the parameters in their own dtype to each neighbour, `gossip_mix_bytes`
  (4P bytes in pairs, with P float32 parameters).

  Per replica, never equal: parameters, `inner_state` and `pending`. A restore needs the same number
  of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica, e.g. `optax.sgd(0.1)`.
    topology: who averages with whom; default `random_matching(bipartite=True)`, the paper's pairs
      of an active and a passive replica (for an even number of replicas).
    delay: steps by which updates are late, >= 0; the first `delay` steps only average.
    axis_name: axis of the replicas.

  Returns:
    A transform with `ADPSGDState`; its update takes `alive`, bool[N], as an extra argument, if the
    topology is symmetric. It belongs at the end of its chain.

  Raises:
    ValueError: an argument outside these rules, `inner` is no transform, parameters are not
      floating point, `params` are missing in update, the axis is unbound, there is no such topology
      of N replicas, or `alive` with a directed topology.

  References:
    Lian et al., Asynchronous Decentralized Parallel Stochastic Gradient Descent,
    https://arxiv.org/abs/1710.06952.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import ad_psgd
    >>> tx = ad_psgd(optax.sgd(0.5))
    >>> def step(p):
    ...   updates, _ = tx.update(jnp.ones(()), tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 4.0])).tolist()
    [1.5, 1.5]
  """
  topology = random_matching(bipartite=True) if topology is None else topology
  check_transform("inner", inner)
  check_topology(topology)
  check_count("delay", delay, at_least=0)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    return ADPSGDState(
      count=jnp.zeros((), jnp.int32),
      inner_state=inner.init(params),
      pending=tuple(optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(delay)),
    )

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: they are averaged.")
    check_alive_symmetric(alive, topology)
    error = gossip_error(params, axis_name, topology, step=state.count, alive=alive)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    due, *pending = (*state.pending, optax.tree.cast(updates, jnp.float32))
    step = jax.tree.map(lambda e, d, u: (e + d).astype(u.dtype), error, due, updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    return step, ADPSGDState(count, inner_state, tuple(pending))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
