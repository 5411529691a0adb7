import jax
import pytest
from jax.sharding import AxisType

from parallel import AXES, make_mesh


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
