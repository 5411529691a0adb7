"""What the methods share that average with neighbours."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxcomm.collectives import Topology, gossip_error


def gossip_average(tree: Any, axis_name: str, topology: Topology, **kwargs: Any) -> Any:
  """One step of `gossip_mix` that stays in float32."""
  error = gossip_error(tree, axis_name, topology, **kwargs)
  return jax.tree.map(lambda x, e: x.astype(jnp.float32) + e, tree, error)


def difference(new: Any, params: Any, updates: Any) -> Any:
  """What `optax.apply_updates` must add to `params`, in the dtypes of `updates`."""
  return jax.tree.map(lambda x, p, u: (x - p).astype(u.dtype), new, params, updates)


def check_positive(name: str, value: Any) -> None:
  """Raises ValueError unless `value` is above zero, or traced."""
  if not isinstance(value, Tracer) and not value > 0:
    raise ValueError(f"`{name}` must be positive, got {value!r}.")


def check_topology(topology: Any) -> None:
  """Raises ValueError unless `topology` is one."""
  if not isinstance(topology, Topology):
    raise ValueError(
      f"`topology` must be a topology such as ring() or exponential(), got {topology!r}."
    )


def check_alive_symmetric(alive: Any, topology: Topology) -> None:
  """Raises ValueError if leaving replicas out would give the others unequal weights."""
  if alive is not None and not topology.symmetric:
    raise ValueError(
      f"`alive` needs a symmetric `topology`, got {topology!r}: without some replicas its averages"
      " would be biased; use sgp, which corrects them."
    )
