import dataclasses
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm.inspect import target
from parallel import AXES, make_mesh
from parallel import mesh as mesh_module


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_all_axes_are_always_there(axis_types):
  mesh = make_mesh(replica=2, fsdp=2, tensor=2, axis_types=axis_types)
  assert mesh.axis_names == tuple(a for a in AXES if a != "expert")
  sizes = {"replica": 2, "data": 1, "fsdp": 2, "stage": 1, "seq": 1, "tensor": 2}
  assert dict(mesh.shape) == sizes
  assert set(mesh.axis_types) == {axis_types}


def test_default_axes_are_automatic():
  assert set(make_mesh().axis_types) == {AxisType.Auto}
  assert make_mesh().size == 1


def test_uses_the_first_devices_with_tensor_innermost():
  mesh = make_mesh(replica=2, tensor=2)
  assert list(mesh.devices.flat) == jax.devices()[:4]
  assert list(mesh.devices[0].flat) == jax.devices()[:2]
  last = make_mesh(fsdp=2, devices=jax.devices()[6:])
  assert list(last.devices.flat) == jax.devices()[6:]


def test_rejects_more_than_there_are():
  message = r"`replica` \* `data` \* `seq` must not .* 3 \* 2 \* 2 = 12, got 8 devices"
  with pytest.raises(ValueError, match=message):
    make_mesh(replica=3, data=2, seq=2)
  with pytest.raises(ValueError, match="got 1 devices"):
    make_mesh(replica=2, devices=jax.devices()[:1])


@pytest.mark.parametrize("name", ["replica", "stage", "tensor"])
def test_rejects_sizes_below_one(name):
  with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
    make_mesh(**{name: 0})


def test_rejects_a_tuple_of_axis_types():
  with pytest.raises(ValueError, match="`axis_types` must be one"):
    make_mesh(axis_types=(AxisType.Auto,) * 6)


# By topology.


@dataclasses.dataclass(frozen=True)
class Device:
  """What is asked of a GPU: its number and the NVLink domain, here called a slice."""

  id: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "gpu"


def grid(sizes, devices):
  return mesh_module._by_topology(sizes, devices)


def test_without_a_topology_the_order_stays():
  sizes = {"replica": 2, "fsdp": 2, "tensor": 2}
  assert make_mesh(**sizes, by_topology=True) == make_mesh(**sizes)


def test_slices_lie_along_the_first_axes():
  """Four slices of four, listed in turns: two along replicas, two along data."""
  devices = [Device(i, i % 4) for i in range(16)]
  found = grid((2, 4, 1, 1, 1, 2), devices)
  of_slice = np.vectorize(lambda d: d.slice_index)(found)[:, :, 0, 0, 0]
  assert of_slice.tolist() == [[[0, 0]] * 2 + [[1, 1]] * 2, [[2, 2]] * 2 + [[3, 3]] * 2]
  assert len(set(found.flat)) == 16


def test_rejects_slices_that_do_not_fit():
  message = (
    r"`by_topology` cannot arrange 8 devices of 4 slices as \(2, 1, 1, 1, 1, 3\): a factor 2"
  )
  with pytest.raises(ValueError, match=message):
    grid((2, 1, 1, 1, 1, 3), [Device(i, i % 4) for i in range(8)])


@pytest.mark.aot
def test_tensor_gets_neighbours_on_the_torus():
  """All hops of rings along `tensor` are single links; the plain order has longer ones."""
  try:
    devices = list(target("tpu:v5p:4x4x4").devices)
  except ImportError as e:
    pytest.skip(str(e))
  sizes = {"fsdp": len(devices) // 4, "tensor": 4}
  bounds = np.max([d.coords for d in devices], 0) + 1

  def hops(mesh):
    """Links between neighbours on `tensor`, the longest way; a side of 4 chips is a ring."""
    rings = mesh.devices.reshape(-1, 4)
    apart = [
      np.abs(np.subtract(a.coords, b.coords)) for ring in rings for a, b in itertools.pairwise(ring)
    ]
    return max(int(np.where(bounds == 4, np.minimum(d, 4 - d), d).sum()) for d in apart)

  found = make_mesh(**sizes, devices=devices, by_topology=True)
  assert hops(found) == 1
  assert hops(make_mesh(**sizes, devices=devices)) > 1
  assert {d.id for d in found.devices.flat} == {d.id for d in devices}
