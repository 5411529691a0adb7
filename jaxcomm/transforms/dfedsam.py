"""DFedSAM: local steps on sharpness-aware gradients, then gossip with a few neighbours."""

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.collectives import Topology, gossip_mix
from jaxcomm.transforms._checks import (
  check_count,
  check_floating,
  check_period,
  check_transform,
)
from jaxcomm.transforms._gossip import check_alive_symmetric, check_topology, difference
from jaxcomm.transforms._local_updates import LocalUpdatesState


def dfedsam(
  inner: optax.GradientTransformation,
  topology: Topology,
  *,
  sync_period: int | jax.Array,
  gossip_steps: int = 1,
  axis_name: str = "replica",
) -> optax.GradientTransformationExtraArgs:
  r"""`sync_period` steps of `inner` per replica, then `gossip_steps` averages with neighbours.

  .. math:: z_i = \mathrm{inner}^K(x_i), \qquad x_i \leftarrow \sum_j (W^Q)_{ij} z_j

  The gradients should be those of `sam_loss`; with plain ones this is DFedAvg, and with
  `sync_period=1` D-PSGD. More than one gossip step is DFedSAM-MGS. The state of `inner` is kept per
  replica and not averaged. No replica ever holds the mean; `gossip_mix` keeps the mean of all.

  Wire, per device: nothing for `sync_period - 1` steps, then `gossip_steps` times the parameters,
  in their own dtype, to each neighbour: `gossip_mix_bytes`. The sharpness-aware gradient sends
  nothing.

  Per replica, never equal: parameters and `inner_state`. No copy of the parameters is kept
  (`anchor` is masked). A restore needs the same number of replicas, or a named replica change.

  Args:
    inner: optimizer of each replica; the paper's is `optax.sgd`.
    topology: who averages with whom, e.g. `exponential()`, `ring()`; over rounds the steps of a
      topology that changes go on being counted.
    sync_period: inner steps per round (K).
    gossip_steps: Q.
    axis_name: axis of the replicas.

  Returns:
    A transform with `LocalUpdatesState`; its update takes `alive`, bool[N], as an extra argument,
    if the topology is symmetric: the weight of a dead neighbour stays with the replica itself.

  Raises:
    ValueError: an argument outside these rules, `inner` is no transform, parameters are not
      floating point, `params` are missing in update, the axis is unbound, there is no such topology
      of N replicas, or `alive` with a directed topology.

  References:
    Shi et al., Improving the Model Consistency of Decentralized Federated Learning,
    https://arxiv.org/abs/2302.04083.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import dfedsam
    >>> from jaxcomm.collectives import ring
    >>> tx = dfedsam(optax.sgd(1.0), ring(), sync_period=1)
    >>> def step(target):
    ...   p = jnp.zeros(())
    ...   updates, _ = tx.update(p - target, tx.init(p), p)
    ...   return optax.apply_updates(p, updates)
    >>> jax.vmap(step, axis_name="replica")(jnp.array([0.0, 3.0, 0.0, 9.0])).round().tolist()
    [4.0, 1.0, 4.0, 3.0]
  """
  check_period(sync_period)
  check_transform("inner", inner)
  check_topology(topology)
  check_count("gossip_steps", gossip_steps, at_least=1)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    check_floating("params", params)
    return LocalUpdatesState(
      count=jnp.zeros((), jnp.int32),
      synced=jnp.zeros((), jnp.bool_),
      anchor=jax.tree.map(lambda _: optax.MaskedNode(), params),  # there are no outer parameters
      inner_state=inner.init(params),
      outer_state=optax.EmptyState(),
    )

  def update_fn(updates, state, params=None, *, alive=None, **extra_args):
    if params is None:
      raise ValueError("`params` must be given to update: they are averaged.")
    check_alive_symmetric(alive, topology)
    _axes.axis_size(axis_name)
    updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
    count = jnp.asarray(optax.safe_increment(state.count))
    synced = jnp.equal(count % sync_period, 0)
    first_step = gossip_steps * (count // sync_period - 1)

    def sync(updates):
      local = optax.apply_updates(params, updates)
      mixed = gossip_mix(
        local, axis_name, topology, steps=gossip_steps, first_step=first_step, alive=alive
      )
      return difference(mixed, params, updates)

    updates = _axes.cond(synced, sync, lambda updates: updates, updates)
    return updates, state._replace(count=count, synced=synced, inner_state=inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
