"""Bytes: the formulas, the payloads and the compiled programs say the same."""

import collections
import gzip
import math
import pathlib
import runpy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import (
  allgather_pmean,
  allgather_pmean_bytes,
  allgather_pmean_with_error,
  compressed_pmean,
  compressed_pmean_bytes,
  compressed_pmean_with_error,
  hierarchical_psum_scatter_bytes,
  loco_init,
  loco_psum_scatter,
  loco_psum_scatter_bytes,
  quantized_all_gather_bytes,
  quantized_all_to_all_bytes,
  quantized_pmean,
  quantized_pmean_bytes,
  quantized_psum_bytes,
  quantized_psum_scatter_bytes,
  tree_compressed_pmean_bytes,
)
from jaxcomm.compressors import e3m0, identity, int4, int8
from jaxcomm.inspect import collective_bytes

AXIS = "replica"
ROOT = pathlib.Path(__file__).parents[3]
programs = types.SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "make_hlo_fixtures.py")))


def expected(bits, names):
  """(kind, axis) -> bytes of `programs.quantized_program`, from the formulas."""
  options = {"bits": bits, "block_size": 64}
  total = collections.Counter()
  for name in names:
    shape = (programs.QUANTIZED_ROWS[name], programs.COLUMNS)
    if name == "all_gather":
      total["all-gather", "gpu"] += quantized_all_gather_bytes(shape, 4, **options)
    elif name == "psum":
      sent = quantized_psum_bytes(shape, 4, **options)
      total["all-to-all", "gpu"] += sent / 2
      total["all-gather", "gpu"] += sent / 2
    elif name == "all_to_all":
      total["all-to-all", "gpu"] += quantized_all_to_all_bytes(shape, 4, 0, **options)
    elif name == "hierarchical":
      sizes = {"gpu": 4, "node": 2}
      for axis, sent in hierarchical_psum_scatter_bytes(shape, sizes, **options).items():
        total["all-to-all", axis] += sent
    else:
      kind = "collective-permute" if name == "ring" else "all-to-all"
      total[kind, "gpu"] += quantized_psum_scatter_bytes(shape, 4, **options)
  return total


def measured(program, mesh):
  report = collective_bytes(program, mesh)
  assert {op.dtype for op in report.ops} == {"u8"}
  total = collections.Counter()
  for op in report.ops:
    total[op.kind, op.axis] += op.bytes
  return total


@pytest.mark.parametrize(
  ("bits", "axis_type"),
  [(8, "Explicit"), *(pytest.param(b, "Auto", marks=pytest.mark.slow) for b in (4, "fp8"))],
)
def test_quantized_collectives_send_what_the_formulas_say(bits, axis_type):
  kind = getattr(jax.sharding.AxisType, axis_type)
  mesh = jax.make_mesh((2, 4), ("node", "gpu"), (kind,) * 2)
  names = programs.QUANTIZED_FIXTURES[4] if bits == 8 else tuple(programs.QUANTIZED_ROWS)
  f, arguments = programs.quantized_program(mesh, bits, names)
  compiled = jax.jit(f).lower(*arguments).compile()
  assert measured(compiled, mesh) == expected(bits, names)


@pytest.mark.parametrize("target", ["tpu", "gpu"])
@pytest.mark.parametrize("bits", programs.QUANTIZED_FIXTURES)
def test_compilers_of_accelerators_send_the_same_bytes(bits, target):
  fixtures = ROOT / "tests" / "jaxcomm" / "inspect" / "fixtures" / target
  text = gzip.decompress((fixtures / f"quantized_{bits}.txt.gz").read_bytes()).decode()
  mesh = jax.sharding.AbstractMesh((2, 4), ("node", "gpu"))
  assert measured(text, mesh) == expected(bits, programs.QUANTIZED_FIXTURES[bits])


def expected_messages():
  """(kind, dtype) -> bytes of `programs.messages_program`, from the formulas."""
  total, shape = collections.Counter(), programs.MESSAGE_SHAPE
  for compressor, dtype in programs.MESSAGES.items():
    total["all-gather", dtype] += compressor.payload_bytes(shape)  # to one other device
  total["all-to-all", "u8"] += loco_psum_scatter_bytes(shape, 2)
  tree = programs.message_tree(np.zeros(shape))
  exact = quantized_pmean_bytes((4,), 2, bits=None)
  hop = (tree_compressed_pmean_bytes(tree, 2, int8(), min_size=9) - exact) / 2
  return total + collections.Counter(
    {("all-to-all", "u8"): hop, ("all-gather", "u8"): hop, ("all-reduce", "f32"): exact}
  )


def measured_messages(program, mesh):
  report = collective_bytes(program, mesh)
  assert {op.axis for op in report.ops} == {"gpu"}
  total = collections.Counter()
  for op in report.ops:
    total[op.kind, op.dtype] += op.bytes
  return total


@pytest.mark.slow
def test_messages_of_every_compressor_are_their_payloads_and_all_devices_agree(bits_of):
  mesh = jax.make_mesh((4, 2), ("node", "gpu"), (jax.sharding.AxisType.Auto,) * 2)
  f, (like,) = programs.messages_program(mesh)
  compiled = jax.jit(f).lower(like).compile()
  assert measured_messages(compiled, mesh) == expected_messages()
  x = np.random.default_rng(0).normal(size=like.shape).astype(np.float32)
  means, _, tree = compiled(jax.device_put(x, like.sharding))
  for name, mean in [*zip(programs.MESSAGES, means, strict=True), *tree.items()]:
    pairs = bits_of(mean).reshape(4, 2, -1)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1], err_msg=str(name))
    assert np.any(mean)


@pytest.mark.parametrize("target", ["tpu", "gpu"])
def test_compilers_of_accelerators_keep_the_messages_of_every_compressor(target):
  fixtures = ROOT / "tests" / "jaxcomm" / "inspect" / "fixtures" / target
  text = gzip.decompress((fixtures / "messages.txt.gz").read_bytes()).decode()
  mesh = jax.sharding.AbstractMesh((4, 2), ("node", "gpu"))
  assert measured_messages(text, mesh) == expected_messages()


def compiled(on_devices, fn, n, shape, mode="checked"):
  """[(kind, dtype, bytes sent per device)] of the compiled program."""
  x = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
  ops = collective_bytes(on_devices(fn, mode, n).lower(x).compile()).ops
  return [(op.kind, op.dtype, op.bytes) for op in ops]


ONE_AND_MORE = (
  ("compressor", "n", "shape"),
  [
    (int4(), 8, (7,)),
    *(
      pytest.param(compressor, n, shape, marks=pytest.mark.slow)
      for compressor in (int8(16), e3m0(16))
      for n, shape in ((8, (7,)), (2, (33, 5)), (4, ()))
    ),
  ],
)


@pytest.mark.parametrize(*ONE_AND_MORE)
def test_two_hops_send_what_the_formula_says(compressor, shape, n, on_devices):
  found = compiled(on_devices, lambda v: compressed_pmean(v, AXIS, compressor), n, shape)
  assert [op[:2] for op in found] == [("all-to-all", "u8"), ("all-gather", "u8")]
  assert sum(op[2] for op in found) == compressed_pmean_bytes(shape, n, compressor)
  chunk = -(-math.prod(shape) // n)
  assert found[0][2] == found[1][2] == (n - 1) * compressor.payload_bytes((chunk,))


@pytest.mark.parametrize(*ONE_AND_MORE)
def test_one_hop_sends_what_the_formula_says(compressor, shape, n, on_devices):
  found = compiled(on_devices, lambda v: allgather_pmean(v, AXIS, compressor), n, shape)
  want = allgather_pmean_bytes(shape, n, compressor)
  assert found == [("all-gather", "u8", want)]
  assert want == (n - 1) * compressor.payload_bytes(shape)


def test_exact_mean_and_loco_send_what_the_formulas_say(on_devices):
  def exact(v):
    return quantized_pmean(v, AXIS, bits=None)

  sent = quantized_pmean_bytes((1000, 3), 8, bits=None)
  assert compiled(on_devices, exact, 8, (1000, 3)) == [("all-reduce", "f32", sent)]

  def loco(v):
    return loco_psum_scatter(v, loco_init(v), AXIS)

  sent = loco_psum_scatter_bytes((1000, 3), 8)
  assert compiled(on_devices, loco, 8, (1000, 3), "unchecked") == [("all-to-all", "u8", sent)]
  assert sent == 7 * (125 * 3 / 2 + 0.5 + 4 * 2)


@pytest.mark.slow
def test_errors_cost_no_bytes(on_devices):
  for with_error, plain in (
    (compressed_pmean_with_error, compressed_pmean),
    (allgather_pmean_with_error, allgather_pmean),
  ):
    found = [
      compiled(on_devices, lambda v, fn=fn: fn(v, AXIS, int4()), 4, (100,))
      for fn in (with_error, plain)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_unchecked_program_sends_the_same(on_devices):
  found = [
    compiled(on_devices, lambda v: compressed_pmean(v, AXIS, int4()), 4, (100,), mode)
    for mode in ("checked", "unchecked")
  ]
  assert found[0] == found[1]


@pytest.mark.parametrize(("n", "shape"), [(1, (5,)), (4, (0,))])
def test_nothing_to_send_is_free(n, shape, on_devices):
  found = compiled(on_devices, lambda v: compressed_pmean(v, AXIS, int8()), n, shape)
  assert sum(op[2] for op in found) == 0
  assert compressed_pmean_bytes(shape, n, int8()) == allgather_pmean_bytes(shape, n, int8()) == 0


def test_no_padding_is_sent():
  """Small leaves: a scale and half a byte per element, not a block."""
  assert compressed_pmean_bytes((8,), 4, int4()) == 2 * 3 * (1 + 4)
  assert allgather_pmean_bytes((3,), 4, e3m0()) == 3 * (2 + 4)


def test_ratios_to_float32():
  """int8: 1 + 4 / B bytes per element and hop; 4 bits: 0.5 + 4 / B; float32: 4."""
  shape = (1 << 20,)
  dense = quantized_pmean_bytes(shape, 8, bits=None)
  assert quantized_pmean_bytes(shape, 8, bits=8) / dense == (1 + 4 / 256) / 4 <= 0.26
  assert quantized_pmean_bytes(shape, 8, bits=4) / dense == (0.5 + 4 / 256) / 4 <= 0.14
  assert compressed_pmean_bytes(shape, 8, identity()) == dense
  for sent in (quantized_all_gather_bytes, quantized_psum_scatter_bytes, quantized_psum_bytes):
    assert sent(shape, 8, bits=8) / sent(shape, 8, bits=None) == (1 + 4 / 256) / 4
  rows = (8 * 64, 2048)  # every token's row has scales of its own
  exchanged = [quantized_all_to_all_bytes(rows, 8, 0, bits=bits) for bits in (8, 4, None)]
  assert [sent / exchanged[2] for sent in exchanged[:2]] == [(1 + 4 / 256) / 4, (0.5 + 4 / 256) / 4]


def test_two_hops_spare_the_slow_link():
  """Between nodes a device sends the share of its place in the node."""
  flat = quantized_psum_scatter_bytes((1 << 20,), 32, bits=8)
  sizes = {"gpu": 8, "node": 4}
  sent = hierarchical_psum_scatter_bytes((1 << 20,), sizes, bits=8)
  assert sent["node"] == 3 * ((1 << 15) + 4 * (1 << 15) // 256)
  assert flat - 7 * sent["node"] / 3 == 8 * sent["node"]  # of 31 messages, 24 leave the node
  mixed = hierarchical_psum_scatter_bytes((1 << 20,), sizes, bits={"gpu": 8, "node": None})
  assert mixed == {"gpu": sent["gpu"], "node": 3 * 4 * (1 << 15)}
  rotated = hierarchical_psum_scatter_bytes((32,), sizes, bits=8, hadamard=32)
  assert rotated == {"gpu": 7 * 36, "node": 3 * 36}


@pytest.mark.parametrize(
  "axis_type",
  [
    jax.sharding.AxisType.Explicit,
    pytest.param(jax.sharding.AxisType.Auto, marks=pytest.mark.slow),
  ],
)
def test_only_the_named_axis_is_crossed(axis_type):
  """Manual over two axes: groups of the wire are those of `replica`, whatever the mesh type."""
  mesh = jax.make_mesh((4, 2), (AXIS, "fsdp"), (axis_type,) * 2)
  spec = jax.P(AXIS, "fsdp")
  x = jax.device_put(np.ones((4, 64), np.float32), jax.NamedSharding(mesh, spec))

  def local(v):
    return compressed_pmean(v[0], AXIS, int8(16))

  fn = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=jax.P("fsdp")))
  report = collective_bytes(fn.lower(x).compile(), mesh)
  assert [(op.axis, op.dtype) for op in report.ops] == [(AXIS, "u8")] * 2
  assert report.by_axis == {AXIS: compressed_pmean_bytes((32,), 4, int8(16))}
  np.testing.assert_allclose(fn(x), np.ones(64), rtol=2**-14)


def test_rejects_bad_arguments_of_formulas():
  for formula in (quantized_all_gather_bytes, quantized_psum_scatter_bytes, quantized_psum_bytes):
    with pytest.raises(ValueError, match="`bits` must be 4, 8, 'fp8' or None, got 16"):
      formula((4,), 2, bits=16)
    with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
      formula((4,), 0)
  with pytest.raises(ValueError, match="`split_axis` must name an axis whose size is divisible by"):
    quantized_all_to_all_bytes((5,), 2, 0)
  with pytest.raises(ValueError, match="`axes` must be two or more different axis names"):
    hierarchical_psum_scatter_bytes((4,), {"gpu": 2})
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
    hierarchical_psum_scatter_bytes((4,), {"gpu": 2, "node": 0})


def test_rejects_bad_block_sizes_and_axis_sizes():
  with pytest.raises(ValueError, match="`block_size` must be even for 4-bit codes, got 9"):
    quantized_pmean(jnp.zeros(4), AXIS, bits=4, block_size=9)
  with pytest.raises(ValueError, match="`block_size` must be an integer of at least 8, got 4"):
    quantized_pmean_bytes((4,), 2, bits=8, block_size=4)
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got -1"):
    compressed_pmean_bytes((4,), -1, int8())
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
    allgather_pmean_bytes((4,), 0, int8())
