"""Device meshes and the names of their axes."""

import math
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
  stage: int = 1,
  seq: int = 1,
  tensor: int = 1,
  devices: Sequence[Any] | None = None,
  axis_types: AxisType = AxisType.Auto,
) -> jax.sharding.Mesh:
  """Mesh with the axes `("replica", "data", "fsdp", "stage", "seq", "tensor")`, slowest link first.

  All are present even at size 1. Neighbours in `devices` become neighbours on the last axis that is
  larger, so list devices of one host together.

  Args:
    replica: devices along the slowest link, between which parameters may differ.
    data: devices along plain data parallelism.
    fsdp: devices over which parameters and optimizer state are sharded.
    stage: devices along the layers, for pipelines.
    seq: devices among which the tokens of a sequence are cut (`ContextParallel`).
    tensor: devices among which heads, feed-forward and vocabulary are cut.
    devices: defaults to `jax.devices()`; as many as the product of the sizes are used, the first.
    axis_types: `jax.sharding.AxisType` of all axes.

  Raises:
    ValueError: a size is not positive, there are fewer devices than their product, or
      `axis_types` is not one `AxisType`.

  Example:
    >>> dict(make_mesh(devices=jax.devices()[:1]).shape)
    {'replica': 1, 'data': 1, 'fsdp': 1, 'stage': 1, 'seq': 1, 'tensor': 1}
  """
  sizes = {REPLICA: replica, DATA: data, FSDP: fsdp, STAGE: stage, SEQ: seq, TENSOR: tensor}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"`{name}` must be at least 1, got {size}.")
  if not isinstance(axis_types, AxisType):
    raise ValueError(f"`axis_types` must be one jax.sharding.AxisType, got {axis_types!r}.")
  devices = jax.devices() if devices is None else devices
  needed = math.prod(sizes.values())
  if needed > len(devices):
    larger = {name: size for name, size in sizes.items() if size > 1}
    raise ValueError(
      f"{' * '.join(f'`{name}`' for name in larger)} must not exceed the number of devices:"
      f" {' * '.join(map(str, larger.values()))} = {needed}, got {len(devices)} devices."
    )
  grid = np.asarray(devices[:needed]).reshape(tuple(sizes.values()))
  return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(axis_types,) * len(sizes))
