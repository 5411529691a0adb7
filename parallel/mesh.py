"""Device meshes and the names of their axes."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

REPLICA = "replica"  # slowest link: WAN or between islands; parameters may differ along it
DATA = "data"
FSDP = "fsdp"
STAGE = "stage"
EXPERT = "expert"
SEQ = "seq"
TENSOR = "tensor"  # fastest link
CLIENTS = "clients"  # federated simulation

AXES = (REPLICA, DATA, FSDP, STAGE, EXPERT, SEQ, TENSOR)  # outermost, slowest link first


def make_mesh(
  *,
  replica: int = 1,
  data: int = 1,
  fsdp: int = 1,
  devices: Sequence[Any] | None = None,
  axis_types: AxisType = AxisType.Auto,
) -> jax.sharding.Mesh:
  """Mesh with the axes `("replica", "data", "fsdp")`, all present even at size 1.

  Neighbours in `devices` become neighbours on `fsdp`, so list devices of one host together.

  Args:
    replica: devices along the slowest link, between which parameters may differ.
    data: devices along plain data parallelism.
    fsdp: devices over which parameters and optimizer state are sharded.
    devices: defaults to `jax.devices()`; the first `replica * data * fsdp` are used.
    axis_types: `jax.sharding.AxisType` of all three axes.

  Raises:
    ValueError: a size is not positive, there are fewer devices than their product, or
      `axis_types` is not one `AxisType`.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'replica': 1, 'data': 1, 'fsdp': 1}
  """
  sizes = {REPLICA: replica, DATA: data, FSDP: fsdp}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"`{name}` must be at least 1, got {size}.")
  if not isinstance(axis_types, AxisType):
    raise ValueError(f"`axis_types` must be one jax.sharding.AxisType, got {axis_types!r}.")
  devices = jax.devices() if devices is None else devices
  needed = replica * data * fsdp
  if needed > len(devices):
    raise ValueError(
      f"`replica` * `data` * `fsdp` must not exceed the number of devices:"
      f" {replica} * {data} * {fsdp} = {needed}, got {len(devices)} devices."
    )
  grid = np.asarray(devices[:needed]).reshape(tuple(sizes.values()))
  return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(axis_types,) * len(sizes))
