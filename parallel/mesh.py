"""Device meshes and the names of their axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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
  by_topology: bool = False,
  axis_types: AxisType = AxisType.Auto,
) -> jax.sharding.Mesh:
  """Mesh with the axes `("replica", "data", "fsdp", "stage", "seq", "tensor")`, slowest link first.

  All are present even at size 1. Neighbours in `devices` become neighbours on the last axis that is
  larger, so list devices of one host together; or let `by_topology` find who is near whom.

  Args:
    replica: devices along the slowest link, between which parameters may differ.
    data: devices along plain data parallelism.
    fsdp: devices over which parameters and optimizer state are sharded.
    stage: devices along the layers, for pipelines.
    seq: devices among which the tokens of a sequence are cut (`ContextParallel`).
    tensor: devices among which heads, feed-forward and vocabulary are cut.
    devices: defaults to `jax.devices()`; as many as the product of the sizes are used, the first.
    by_topology: reorder the devices used, so that links between slices (TPU pods, NVLink domains)
      lie along the first axes, and the torus of a TPU slice gives its best rings to the last ones.
      Changes nothing where there is one slice of GPUs, or CPUs. Rows of one process may then no
      longer be neighbours, as `TrainStep.local_rows` needs them.
    axis_types: `jax.sharding.AxisType` of all axes.

  Raises:
    ValueError: a size is not positive, there are fewer devices than their product, `axis_types` is
      not one `AxisType`, or `by_topology` with devices that are no box of a torus, or slices that
      the first axes cannot be divided among.

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
  shape = tuple(sizes.values())
  if by_topology:
    grid = _by_topology(shape, devices[:needed])
  else:
    grid = np.asarray(devices[:needed]).reshape(shape)
  return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(axis_types,) * len(sizes))


def _by_topology(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
  """Devices in this shape, the fastest links along its last dimensions."""
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  try:
    if slices == 1:
      return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer = _outer_shape(shape, slices)
    inner = tuple(size // part for size, part in zip(shape, outer))
    return mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  except (AssertionError, NotImplementedError, ValueError) as e:
    raise ValueError(
      f"`by_topology` cannot arrange {len(devices)} devices of {slices} slices as {shape}: {e}"
    ) from e


def _outer_shape(shape: tuple[int, ...], slices: int) -> tuple[int, ...]:
  """How many slices lie along each dimension, the first ones before the others."""
  outer = []
  for size in shape:
    outer.append(math.gcd(size, slices))
    slices //= outer[-1]
  if slices > 1:
    raise ValueError(f"a factor {slices} of the slices divides none of the sizes")
  return tuple(outer)
