"""What the overlap report reads from compiled GPU and TPU programs, and from hand-written ones."""

import jax
import pytest
from hypothesis import given, settings

from jaxcomm import inspect
from jaxcomm.inspect._costs import Costs
from jaxcomm.inspect._hlo import parse_module
from jaxcomm.inspect._loops import Scope
from tests.jaxcomm.inspect.hlo_programs import (
  GLOBAL,
  MATMUL,
  SQUARE,
  done,
  dot,
  mangled,
  read_fixture,
  root,
  square_program,
  start,
)

LAYERS = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
PRODUCT = 2 * 1024 * 4096 * 4096  # FLOPs of one matrix product of the ladder, per device


def read(*lines, **kwargs):
  return inspect.overlap_report(square_program(*lines, **kwargs)).collectives


def reasons(*lines, **kwargs):
  return [c.reason for c in read(*lines, **kwargs)]


# --- compiled programs


@pytest.mark.parametrize(
  ("target", "hidden", "last"), [("gpu", (1, 2), "shared"), ("tpu", (1, 1), "scheduler")]
)
def test_ladder(target, hidden, last):
  """Three blocks whose all-reduce is used a block later: all but the last are hidden."""
  report = inspect.overlap_report(read_fixture(f"{target}/ladder"), LAYERS)
  *beside, exposed = report.collectives
  assert [c.num_matmuls for c in beside] == list(hidden)
  assert [sum(w.flops for w in c.hidden) for c in beside] == [n * PRODUCT for n in hidden]
  assert {(c.axis, c.times, c.reason) for c in beside} == {("tensor", 1, "overlapped")}
  assert report.async_pairs == report.overlapped == tuple(beside)
  assert report.synchronous == report.exposed == (exposed,)
  assert exposed.reason == last
  assert "2 of 3 collectives have computation beside them" in str(report)


@pytest.mark.parametrize(
  ("target", "exposed"),
  [
    ("gpu", {("all-gather", 1), ("all-gather", 2), ("reduce-scatter", 1)}),
    ("tpu", {("all-gather", 3), ("reduce-scatter", 3)}),
  ],
)
def test_loops(target, exposed):
  text = read_fixture(f"{target}/fsdp_grad")
  report = inspect.overlap_report(text, LAYERS)
  assert {(c.kind, c.times) for c in report.exposed} == exposed
  assert all(not c.asynchronous for c in report.exposed)
  sent = sum(c.bytes * c.times for c in report.collectives)
  assert sent == inspect.collective_bytes(text, LAYERS).total


@pytest.mark.parametrize("target", ["gpu", "tpu"])
def test_flops_of_a_scanned_gradient(target):
  """Of each of three layers two products forward, one of them again, and four of the derivative."""
  module = parse_module(read_fixture(f"{target}/fsdp_grad"))
  costs, scope = Costs(module), Scope(module.entry)
  works = [costs.work(scope, i) for i in module.entry.instructions.values()]
  assert sum(w.flops for w in works) == 3 * (2 + 1 + 4) * PRODUCT


# --- hand-written programs


def test_reasons():
  free = (dot("a", "p", "p"), start("s", "a"), done("d", "s"))
  assert reasons(*free, root("d", "d")) == ["dependency"]
  assert reasons(*free, dot("b", "d", "d"), root("b", "b")) == ["dependency"]
  assert reasons(*free, dot("b", "p", "p"), root("b", "d")) == ["scheduler"]
  hidden = (start("s", "p"), dot("b", "p", "p"), done("d", "s"))
  assert reasons(*hidden, root("b", "d")) == ["overlapped"]
  again = (start("t", "d"), done("e", "t"))
  assert reasons(*hidden, *again, root("b", "e")) == ["overlapped", "shared"]


def test_what_a_collective_waits_for_and_what_waits_for_it():
  lines = (dot("a", "p", "p"), dot("o", "p", "p"), start("s", "a"), done("d", "s"))
  lines += (dot("b", "d", "d"), dot("c", "b", "b"), root("c", "o"))
  (found,) = read(*lines)
  assert (found.waits_for, found.needed_by) == ("a", "b")
  report = inspect.overlap_report(square_program(*lines[:1], *lines[2:-1], root("c", "c")))
  assert "dependency  after a, before b" in str(report)
  (found,) = read(start("s", "p"), done("d", "s"), root("d", "d"))
  assert found.waits_for == ""


def test_a_pair_marked_as_synchronous_hides_nothing():
  lines = (start("s", "p", is_sync=True), dot("b", "p", "p"), done("d", "s"), root("b", "d"))
  (found,) = read(*lines)
  assert (found.asynchronous, found.reason) == (False, "scheduler")
  assert [w.flops for w in found.available] == [MATMUL]


def test_dependencies_go_through_tuples_by_element():
  lines = (
    dot("b", "p", "p"),
    start("s", "p"),
    done("d", "s"),
    f"%t = ({SQUARE}, {SQUARE}) tuple(%d, %b)",
    f"%x = {SQUARE} get-tuple-element(%t), index=1",
    dot("c", "x", "x"),
    root("c", "d"),
  )
  (found,) = read(*lines)
  assert [w.name for w in found.available] == ["b", "c"]


def test_small_kernels_hide_nothing():
  lines = (start("s", "p"), "%i = s32[] add(%one, %one)", done("d", "s"), root("d", "d"))
  assert reasons("%one = s32[] constant(1)", *lines) == ["dependency"]


def test_wrapped_asynchronous_computation():
  inner = f"""
%wrapped (x: f32[256,256]) -> f32[256,256] {{
  %x = {SQUARE} parameter(0)
  ROOT %c = {SQUARE} all-to-all(%x), replica_groups={{}}, dimensions={{0}}, {GLOBAL}
}}
"""
  types = f"(({SQUARE}), {SQUARE}, u32[])"
  (found,) = read(
    f"%s = {types} async-start(%p), calls=%wrapped",
    dot("b", "p", "p"),
    f"%u = {types} async-update(%s), calls=%wrapped",
    dot("c", "b", "b"),
    f"%d = {SQUARE} async-done(%u), calls=%wrapped",
    root("c", "d"),
    others=inner,
  )
  assert (found.name, found.kind, found.num_matmuls) == ("s", "all-to-all", 2)


def test_a_loop_beside_a_collective_counts_all_its_iterations():
  pair = f"(s32[], {SQUARE})"
  loop = f"""
%body (t: {pair}) -> {pair} {{
  %t = {pair} parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %v = {SQUARE} get-tuple-element(%t), index=1
  {dot("w", "v", "v")}
  ROOT %o = {pair} tuple(%i, %w)
}}
%condition (t: {pair}) -> pred[] {{
  %t = {pair} parameter(0)
  ROOT %c = pred[] constant(true)
}}
"""
  config = 'backend_config={"known_trip_count":{"n":"7"}}'
  (found,) = read(
    "%zero = s32[] constant(0)",
    f"%init = {pair} tuple(%zero, %p)",
    start("s", "p"),
    f"%loop = {pair} while(%init), condition=%condition, body=%body, {config}",
    done("d", "s"),
    f"%x = {SQUARE} get-tuple-element(%loop), index=1",
    root("x", "d"),
    others=loop,
  )
  assert [(w.name, w.flops) for w in found.hidden] == [("loop", 7 * MATMUL)]


def test_a_program_without_collectives_gets_one_line():
  report = inspect.overlap_report(square_program(root("p", "p")))
  assert str(report) == "overlap: the program has no collectives."


def test_a_collective_that_never_ends_raises():
  with pytest.raises(ValueError, match="starts `s`, but never ends it"):
    read(start("s", "p"), root("p", "p"))


def test_calls_of_unknown_cost_are_named():
  call = f'%k = {SQUARE} custom-call(%p), custom_call_target="mine"'
  report = inspect.overlap_report(square_program(call, root("k", "p")))
  assert report.uncounted == {"k": "mine"}


def flops(line, *operands):
  lines = [f"%o{i} = {text} parameter({i + 1})" for i, text in enumerate(operands)]
  module = parse_module(square_program(*lines, line, root("p", "p")))
  return Costs(module).work(Scope(module.entry), module.entry.instructions["k"]).flops


def test_flops_of_products():
  batched = "%k = f32[4,8,16]{2,1,0} dot(%o0, %o1), lhs_batch_dims={0}, lhs_contracting_dims={2}"
  assert flops(batched, "f32[4,8,32]{2,1,0}", "f32[4,32,16]{2,1,0}") == 2 * 4 * 8 * 16 * 32
  # The same product as XLA:TPU writes it: a window that meets one element of the batch each.
  window = "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf"
  tpu = f"%k = f32[4,8,16]{{2,1,0}} convolution(%o0, %o1), {window}"
  assert flops(tpu, "f32[4,8,32]{2,1,0}", "f32[4,32,16]{2,1,0}") == 2 * 4 * 8 * 16 * 32
  image = "%k = f32[1,8,8,5]{3,2,1,0} convolution(%o0, %o1), dim_labels=b01f_01io->b01f"
  padded = f"{image}, window={{size=3x3 pad=1_1x1_1}}"
  meets = (3 * 8 - 2) ** 2  # of 24 pairs along each side two are padding
  assert flops(padded, "f32[1,8,8,6]{3,2,1,0}", "f32[3,3,6,5]{3,2,1,0}") == 2 * 5 * 6 * meets
  config = 'backend_config={"gemm_backend_config":{"lhs_contracting_dimensions":["1"]}}'
  cublas = (
    f'%k = f32[8,16]{{1,0}} custom-call(%o0, %o1), custom_call_target="__cublas$gemm", {config}'
  )
  assert flops(cublas, "f32[8,32]{1,0}", "f32[32,16]{1,0}") == 2 * 8 * 16 * 32


SOURCES = [read_fixture(n) for n in ("gpu/ladder", "tpu/ladder", "gpu/all-to-all-scan_in_cond")]


@settings(deadline=5000, max_examples=40)
@given(mangled(SOURCES))
def test_mangled_text_is_reported_or_refused(text):
  try:
    report = inspect.overlap_report(text)
  except (ValueError, NotImplementedError):
    return
  assert len(report.overlapped) + len(report.exposed) == len(report.collectives)
