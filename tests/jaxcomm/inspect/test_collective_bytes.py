"""The wire meter on programs compiled here for CPU, against the closed formulas."""

import pathlib
import re
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxcomm import inspect

SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "make_hlo_fixtures.py"
programs = types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))

# XLA:CPU has no bfloat16 collectives: it sends float32.
WIRE = {
  "float32": ("f32", 4),
  "bfloat16": ("f32", 4),
  "int8": ("s8", 1),
  "uint8": ("u8", 1),
}
TIMES = {"plain": 1, "scan": 5, "cond": 1, "cond_in_scan": 5, "scan_in_cond": 5}
# Devices -> mesh shape over (replica, data, fsdp), and the axes to send over.
MESHES = {
  2: ((1, 2, 1), (("data",), ("data", "fsdp"))),
  4: ((1, 2, 2), (("data",), ("data", "fsdp"))),
  8: ((2, 2, 2), (("data",), ("replica", "fsdp"))),
}


def make_mesh(shape, names=programs.AXES):
  grid = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
  return jax.sharding.Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def compile_program(program):
  f, arguments = program
  return jax.jit(f).lower(*arguments).compile()


def formula(kind, num_bytes, group):
  """Bytes for a local array of `num_bytes` before the collective."""
  if kind == "all-gather":
    return inspect.all_gather_bytes(group * num_bytes, group)
  return getattr(inspect, kind.replace("-", "_") + "_bytes")(num_bytes, group)


def sums(ops):
  total = {}
  for op in ops:
    key = (op.kind, op.dtype, op.axis, op.group_size)
    total[key] = total.get(key, 0) + op.bytes
  return total


@pytest.mark.parametrize("num_devices", MESHES)
@pytest.mark.parametrize("place", TIMES)
@pytest.mark.parametrize("kind", programs.KINDS)
def test_equals_the_closed_formula(kind, place, num_devices):
  shape, axis_sets = MESHES[num_devices]
  mesh = make_mesh(shape)
  compiled = compile_program(programs.collective_program(mesh, kind, place, axis_sets))
  report = inspect.collective_bytes(compiled, mesh)

  want = {}
  for dtype in programs.DTYPES:
    name, itemsize = WIRE[dtype]
    for axes in axis_sets:
      group = int(np.prod([mesh.shape[a] for a in axes]))
      axis = ",".join(a for a in axes if mesh.shape[a] > 1)
      sent = formula(kind, programs.ROWS * programs.COLUMNS * itemsize, group)
      key = (kind, name, axis, group)
      want[key] = want.get(key, 0) + TIMES[place] * sent

  assert sums(report.ops) == want
  assert report.total == sum(want.values())
  assert report.by_kind == {kind: report.total}
  assert {op.times for op in report.ops} == {TIMES[place]}
  assert {bool(op.branch) for op in report.ops} == {"cond" in place}
  assert report.always == (0 if "cond" in place else report.total)


@pytest.mark.parametrize("place", ["scan", "cond_in_scan", "scan_in_cond"])
def test_loop_is_read_where_the_count_is_not_written(place):
  """As on TPU: the count comes from start, step and limit in the loop itself."""
  mesh = make_mesh((2, 2, 2))
  compiled = compile_program(programs.collective_program(mesh, "all-reduce", place, (("data",),)))
  text = compiled.as_text()
  without = text.replace("known_trip_count", "unknown")
  assert without != text
  assert inspect.collective_bytes(without, mesh) == inspect.collective_bytes(compiled, mesh)


def test_nested_scans_multiply():
  mesh = make_mesh((8,), ("data",))

  def local(x):
    def outer(x, _):
      return lax.scan(lambda x, i: (lax.psum(x + i, "data"), None), x, jnp.arange(3.0))[0], None

    return lax.scan(outer, x, None, length=7)[0]

  f = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  text = jax.jit(f).lower(jnp.ones((8, 64))).compile().as_text()
  for hlo in (text, text.replace("known_trip_count", "unknown")):
    report = inspect.collective_bytes(hlo, mesh)
    assert [op.times for op in report.ops] == [21]
    assert report.total == 21 * inspect.all_reduce_bytes(4 * 64, 8)


@pytest.mark.parametrize(("start", "stop", "step"), [(2, 11, 3), (0, 9, 1), (12, 3, -2), (5, 5, 1)])
def test_fori_loops_with_other_bounds(start, stop, step):
  mesh = make_mesh((8,), ("data",))

  def local(x):
    def more(carry):
      i, _ = carry
      return i < stop if step > 0 else i > stop

    def body(carry):
      i, x = carry
      return i + step, lax.psum(x, "data") * i

    return lax.while_loop(more, body, (jnp.int32(start), x))[1]

  f = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
  text = jax.jit(f).lower(jnp.ones((8, 64))).compile().as_text()
  want = len(range(start, stop, step)) * inspect.all_reduce_bytes(4 * 64, 8)
  for hlo in (text, text.replace("known_trip_count", "unknown")):
    assert inspect.collective_bytes(hlo, mesh).total == want


def test_unknown_trip_count_raises_and_names_the_loop():
  mesh = make_mesh((2, 2, 2))
  compiled = compile_program(programs.unknown_loop_program(mesh))
  loop = re.search(r"%(\S+) = .* while\(", compiled.as_text()).group(1)
  with pytest.raises(ValueError, match=f"unknown trip count, `{re.escape(loop)}`"):
    inspect.collective_bytes(compiled, mesh)


def test_loop_of_unknown_trip_count_without_a_collective_is_ignored():
  mesh = make_mesh((8,), ("data",))

  def local(x):
    return lax.psum(lax.while_loop(lambda x: x.sum() < 1e6, lambda x: 2 * x, x), "data")

  f = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P())
  report = inspect.collective_bytes(jax.jit(f).lower(jnp.ones((8, 64))).compile(), mesh)
  assert report.total == inspect.all_reduce_bytes(4 * 64, 8)


def test_branches_are_all_reported_and_the_heaviest_counts():
  mesh = make_mesh((2, 2, 2))
  report = inspect.collective_bytes(compile_program(programs.branches_program(mesh)), mesh)
  n = 4 * programs.ROWS * programs.COLUMNS
  half = inspect.all_to_all_bytes(n, 2)
  full = inspect.all_reduce_bytes(n, 2)

  assert sorted((op.axis, op.bytes, len(op.branch)) for op in report.ops) == [
    ("data", half, 1),
    ("data", n, 0),
    ("fsdp", full, 2),
    ("replica", full, 1),
  ]
  assert {b.num_branches for op in report.ops for b in op.branch[:1]} == {3}
  assert report.always == n
  assert report.conditional == 2 * full  # the nested conditional's heavier branch too
  assert report.total == n + 2 * full
  assert report.by_axis_when(taken=True) == {"data": n, "replica": full, "fsdp": full}
  assert report.by_axis_when(taken=False) == {"data": n}


def test_both_branches_send():
  """A warm-up: dense averaging in one branch, a cheaper exchange in the other."""
  mesh = make_mesh((8,), ("replica",))

  def local(x, step):
    return lax.cond(
      step < 10,
      lambda x: lax.psum(x, "replica"),
      lambda x: programs.KINDS["collective-permute"](x, "replica"),
      x,
    )

  f = jax.shard_map(
    local, mesh=mesh, in_specs=(P("replica"), P()), out_specs=P("replica"), check_vma=False
  )
  compiled = jax.jit(f).lower(jnp.ones((8, 64)), 0).compile()
  report = inspect.collective_bytes(compiled, mesh)
  light, heavy = 256, inspect.all_reduce_bytes(256, 8)
  assert (report.always, report.conditional) == (light, heavy - light)
  assert report.by_axis_when(False) == {"replica": light}
  assert report.amortised(4) == pytest.approx((heavy + 3 * light) / 4)


def test_period_amortises_everything():
  mesh = make_mesh((2, 4), ("replica", "fsdp"))
  compiled = compile_program(programs.diloco_program(mesh))
  worst = inspect.collective_bytes(compiled, mesh)
  mean = inspect.collective_bytes(compiled, mesh, period=20)
  assert worst.conditional > 0
  assert mean.total == worst.always + worst.conditional / 20 == worst.amortised(20)
  assert mean.by_axis["replica"] == pytest.approx(worst.by_axis["replica"] / 20)
  assert mean.by_axis["fsdp"] == worst.by_axis["fsdp"]
  assert sum(mean.by_axis.values()) == pytest.approx(mean.total)
  assert sum(mean.by_kind.values()) == pytest.approx(mean.total)


def test_diloco_sync_sends_bytes_over_replica_only():
  mesh = make_mesh((2, 4), ("replica", "fsdp"))
  report = inspect.collective_bytes(compile_program(programs.diloco_program(mesh)), mesh)
  synced = [op for op in report.ops if op.branch]
  assert {op.axis for op in synced} == {"replica"}
  assert {op.axis for op in report.ops if not op.branch} == {"fsdp"}
  elements = 512 * 256 // 4  # of a shard
  codes = inspect.all_to_all_bytes(elements, 2) + inspect.all_gather_bytes(elements, 2)
  assert sum(op.bytes for op in synced if op.dtype == "u8") == codes
  assert sum(op.bytes for op in synced if op.dtype == "f32") == 4 * codes / programs.COLUMNS


def test_permutation_counts_the_busiest_device_and_no_self_pair():
  mesh = make_mesh((8,), ("data",))

  def total(pairs):
    f = jax.shard_map(
      lambda x: lax.ppermute(x, "data", pairs), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    return inspect.collective_bytes(jax.jit(f).lower(jnp.ones((8, 64))).compile(), mesh).total

  assert total([(0, 1)]) == 256
  assert total([(0, 1), (1, 0), (2, 2)]) == 256
  assert total([(i, i) for i in range(8)]) == 0


def test_groups_of_unequal_devices_along_one_axis():
  mesh = make_mesh((8,), ("data",))
  f = jax.shard_map(
    lambda x: lax.psum(x, "data", axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]]),
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
    check_vma=False,
  )
  report = inspect.collective_bytes(jax.jit(f).lower(jnp.ones((8, 64))).compile(), mesh)
  assert report.by_axis == {"data": inspect.all_reduce_bytes(256, 4)}


def test_without_a_mesh_an_axis_is_its_first_group():
  mesh = make_mesh((2, 2, 2))
  compiled = compile_program(
    programs.collective_program(mesh, "all-reduce", "plain", (("replica", "fsdp"),))
  )
  assert list(inspect.collective_bytes(compiled).by_axis) == ["{0,1,4,5}x2"]


def test_table_has_a_row_per_array_and_the_ends():
  mesh = make_mesh((2, 4), ("replica", "fsdp"))
  report = inspect.collective_bytes(compile_program(programs.diloco_program(mesh)), mesh, period=20)
  table = str(report).splitlines()
  assert len(table) == 1 + len(report.ops) + len(report.by_axis) + 2
  assert any(
    re.match(r"all-to-all +replica +u8\[2,1,128,128\] +2 +1 +16,384 ", row) for row in table
  )
  assert table[-1] == f"total (mean over 20 executions): {report.total:,.0f} bytes"


def test_rejects_bad_arguments():
  mesh = make_mesh((8,), ("data",))
  f = jax.jit(lambda x: x + 1)
  compiled = f.lower(jnp.ones(8)).compile()
  with pytest.raises(ValueError, match="`mesh` must have the 1 devices of the program, got 8"):
    inspect.collective_bytes(compiled, mesh)
  with pytest.raises(ValueError, match="`period` must be at least 1, got 0"):
    inspect.collective_bytes(compiled, period=0)
  with pytest.raises(TypeError, match=r"`compiled` must be a jax.stages.Compiled .* got Lowered"):
    inspect.collective_bytes(f.lower(jnp.ones(8)))
  with pytest.raises(ValueError, match="one ENTRY computation"):
    inspect.collective_bytes(f.lower(jnp.ones(8)).as_text())
  with pytest.raises(ValueError, match=r"`period` must be at least 1, got 0\.5"):
    inspect.collective_bytes(compiled).amortised(0.5)
