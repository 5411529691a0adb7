"""The wire meter on programs that the TPU and GPU compilers made ahead of time.

`scripts/make_hlo_fixtures.py` has the programs; the expected numbers here are closed formulas.
"""

import gzip
import pathlib
import re
import runpy
import types

import jax
import numpy as np
import pytest

from jaxcomm import inspect

SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "make_hlo_fixtures.py"
programs = types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))
TARGETS = ("gpu", "tpu")
ITEMSIZE = {"f32": 4, "bf16": 2, "s8": 1, "u8": 1, "u32": 4}
HLO_DTYPE = {"float32": "f32", "bfloat16": "bf16", "int8": "s8", "uint8": "u8"}
TIMES = {"plain": 1, "scan": 5, "cond": 1, "cond_in_scan": 5, "scan_in_cond": 5}

CUBE = jax.sharding.AbstractMesh((2, 2, 2), programs.AXES)
LAYERS = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
ISLANDS = jax.sharding.AbstractMesh((2, 4), ("replica", "fsdp"))


def read(target, name):
  path = pathlib.Path(__file__).parent / "fixtures" / target / f"{name}.txt.gz"
  return gzip.decompress(path.read_bytes()).decode()


def on_the_wire(target, kind, dtype):
  """(kind, HLO dtype) that the target's compiler makes of a collective."""
  if target == "tpu" and kind in ("all-reduce", "reduce-scatter") and dtype in ("int8", "uint8"):
    return "all-reduce", "u32"  # four bytes at a time; the scatter is a slice afterwards
  return kind, HLO_DTYPE[dtype]


def formula(kind, num_bytes, group):
  if kind == "all-gather":
    return inspect.all_gather_bytes(group * num_bytes, group)
  return getattr(inspect, kind.replace("-", "_") + "_bytes")(num_bytes, group)


def sums(ops, *fields):
  total = {}
  for op in ops:
    key = tuple(getattr(op, field) for field in fields)
    total[key] = total.get(key, 0) + op.bytes
  return total


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", TIMES)
@pytest.mark.parametrize("kind", programs.KINDS)
def test_equals_the_closed_formula(kind, place, target):
  report = inspect.collective_bytes(read(target, f"{kind}-{place}"), CUBE)
  want = {}
  for dtype in programs.DTYPES:
    itemsize = np.dtype(jax.numpy.dtype(dtype)).itemsize
    for axis, group in (("data", 2), ("replica,fsdp", 4)):
      wire_kind, wire_dtype = on_the_wire(target, kind, dtype)
      sent = formula(wire_kind, programs.ROWS * programs.COLUMNS * itemsize, group)
      key = (wire_kind, wire_dtype, axis, group)
      want[key] = want.get(key, 0) + TIMES[place] * sent
  assert sums(report.ops, "kind", "dtype", "axis", "group_size") == want
  assert report.total == sum(want.values())
  assert {op.times for op in report.ops} == {TIMES[place]}
  assert report.always == (0 if "cond" in place else report.total)
  for op in report.ops:
    local = np.prod(op.shape) * ITEMSIZE[op.dtype]
    assert op.bytes == TIMES[place] * formula(op.kind, local, op.group_size)


@pytest.mark.parametrize("place", ["scan", "cond_in_scan", "scan_in_cond"])
def test_gpu_loop_is_read_where_the_count_is_not_written(place):
  text = read("gpu", f"all-to-all-{place}")
  without = text.replace("known_trip_count", "unknown")
  assert without != text
  assert inspect.collective_bytes(without, CUBE) == inspect.collective_bytes(text, CUBE)


def test_tpu_text_has_no_known_trip_count():
  assert "known_trip_count" not in read("tpu", "all-to-all-scan")


@pytest.mark.parametrize("target", TARGETS)
def test_diloco_sync_sends_bytes_over_replica_only(target):
  report = inspect.collective_bytes(read(target, "diloco"), ISLANDS)
  synced = [op for op in report.ops if op.branch]
  assert {op.axis for op in synced} == {"replica"}
  assert {op.axis for op in report.ops if not op.branch} == {"fsdp"}
  elements = 512 * 256 // 4
  codes = inspect.all_to_all_bytes(elements, 2) + inspect.all_gather_bytes(elements, 2)
  assert sums(synced, "dtype") == {("u8",): codes, ("f32",): 4 * codes / programs.COLUMNS}
  assert report.by_axis_when(taken=False) == {"fsdp": inspect.all_reduce_bytes(32 * 256 * 4, 4)}


@pytest.mark.parametrize("target", TARGETS)
def test_branches_are_all_reported_and_the_heaviest_counts(target):
  report = inspect.collective_bytes(read(target, "branches"), CUBE)
  n = 4 * programs.ROWS * programs.COLUMNS
  half, full = inspect.all_to_all_bytes(n, 2), inspect.all_reduce_bytes(n, 2)
  depths = {(op.axis, op.bytes, len(op.branch)) for op in report.ops}
  assert depths == {("data", n, 0), ("data", half, 1), ("replica", full, 1), ("fsdp", full, 2)}
  assert (report.always, report.total) == (n, n + 2 * full)


@pytest.mark.parametrize("target", TARGETS)
def test_asynchronous_all_reduces_count_once(target):
  text = read(target, "ladder")
  sign = {"gpu": r" all-reduce-start\(", "tpu": "AsyncCollectiveStart"}[target]
  assert len(re.findall(sign, text)) >= 2
  report = inspect.collective_bytes(text, LAYERS)
  n = programs.TOKENS // 2 * programs.MODEL * 2
  assert [op.bytes for op in report.ops] == programs.LAYERS * [inspect.all_reduce_bytes(n, 4)]
  assert list(report.by_axis) == ["tensor"]


def test_tpu_repetition_without_its_start_raises():
  text = read("tpu", "ladder").replace("AsyncCollectiveStart", "AsyncCollectiveBegin")
  with pytest.raises(NotImplementedError, match="continued, never started"):
    inspect.collective_bytes(text, LAYERS)


@pytest.mark.parametrize("target", TARGETS)
def test_scanned_fsdp_gradient(target):
  """Both weights are gathered in the forward and in the backward pass, gradients scattered."""
  report = inspect.collective_bytes(read(target, "fsdp_grad"), LAYERS)
  weight = programs.MODEL * programs.HIDDEN // 4 * 2  # bytes of one gathered bfloat16 matrix
  gathers = 4 * programs.LAYERS * inspect.all_gather_bytes(weight, 2)
  assert report.by_kind["all-gather"] == gathers
  scatters = 2 * programs.LAYERS * inspect.reduce_scatter_bytes(weight, 2)
  if target == "gpu":
    assert report.by_kind == {"all-gather": gathers, "reduce-scatter": scatters}
  else:
    # XLA:TPU pads one of the two scatters from 4096 to 4256 rows and then shifts 80 rows over.
    padding = programs.LAYERS * inspect.reduce_scatter_bytes(160 * programs.MODEL * 2, 2)
    shift = programs.LAYERS * inspect.collective_permute_bytes(80 * programs.MODEL * 2, 2)
    assert report.by_kind["reduce-scatter"] == scatters + padding
    assert report.by_kind["collective-permute"] == shift
  assert list(report.by_axis) == ["data"]


@pytest.mark.parametrize(
  ("target", "form"), [("tpu", r"\[4,2\]<=\[2,4\]T\(1,0\)"), ("gpu", "mesh\\[")]
)
def test_groups_of_the_partitioner(target, form):
  text = read(target, "auto_grad")
  assert re.search("replica_groups=" + form, text)
  report = inspect.collective_bytes(text, LAYERS)
  groups = {(op.axis, op.group_size) for op in report.ops}
  assert groups == {("data", 2), ("tensor", 4)}
  activation = programs.TOKENS // 2 * programs.MODEL * 2
  assert report.by_axis["tensor"] == 3 * inspect.all_reduce_bytes(activation, 4)


def test_elements_of_four_and_eight_bits():
  n = programs.ROWS * programs.COLUMNS
  sent = {
    b: inspect.collective_permute_bytes(b, 2) + inspect.all_to_all_bytes(b, 2) for b in (n, n // 2)
  }
  tpu = inspect.collective_bytes(read("tpu", "narrow"), CUBE)
  assert sums(tpu.ops, "dtype") == {
    ("s4",): sent[n // 2],
    ("f8e4m3fn",): sent[n],
    ("pred",): sent[n],
  }
  gpu = inspect.collective_bytes(read("gpu", "narrow"), CUBE)  # packs two int4 in an int8
  assert sums(gpu.ops, "dtype") == {
    ("s8",): sent[n // 2],
    ("f8e4m3fn",): sent[n],
    ("pred",): sent[n],
  }


@pytest.mark.parametrize("target", TARGETS)
def test_unknown_trip_count_raises_and_names_the_loop(target):
  text = read(target, "unknown_loop")
  loop = re.search(r"%(\S+) = .* while\(", text).group(1)
  with pytest.raises(ValueError, match=f"unknown trip count, `{re.escape(loop)}`"):
    inspect.collective_bytes(text, CUBE)


@pytest.mark.parametrize("target", TARGETS)
def test_ragged_all_to_all_raises(target):
  with pytest.raises(NotImplementedError, match="ragged-all-to-all"):
    inspect.collective_bytes(read(target, "ragged"), CUBE)
