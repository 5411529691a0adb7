"""Bytes: the formulas, the payloads and the compiled programs say the same."""

import math

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
  quantized_pmean,
  quantized_pmean_bytes,
)
from jaxcomm.compressors import e3m0, identity, int4, int8
from jaxcomm.inspect import collective_bytes

AXIS = "replica"


def compiled(on_devices, fn, n, shape, mode="checked"):
  """[(kind, dtype, bytes sent per device)] of the compiled program."""
  x = jax.ShapeDtypeStruct((n, *shape), jnp.float32)
  ops = collective_bytes(on_devices(fn, mode, n).lower(x).compile()).ops
  return [(op.kind, op.dtype, op.bytes) for op in ops]


@pytest.mark.parametrize(("n", "shape"), [(2, (33, 5)), (4, ()), (8, (7,)), (8, (4096,))], ids=str)
@pytest.mark.parametrize("compressor", [int8(16), int4(), e3m0(16)], ids=str)
def test_two_hops_send_what_the_formula_says(compressor, shape, n, on_devices):
  found = compiled(on_devices, lambda v: compressed_pmean(v, AXIS, compressor), n, shape)
  assert [op[:2] for op in found] == [("all-to-all", "u8"), ("all-gather", "u8")]
  assert sum(op[2] for op in found) == compressed_pmean_bytes(shape, n, compressor)
  chunk = -(-math.prod(shape) // n)
  assert found[0][2] == found[1][2] == (n - 1) * compressor.payload_bytes((chunk,))


@pytest.mark.parametrize(("n", "shape"), [(2, ()), (8, (33, 5))], ids=str)
@pytest.mark.parametrize("compressor", [int8(16), int4(), e3m0(16)], ids=str)
def test_one_hop_sends_what_the_formula_says(compressor, shape, n, on_devices):
  found = compiled(on_devices, lambda v: allgather_pmean(v, AXIS, compressor), n, shape)
  want = allgather_pmean_bytes(shape, n, compressor)
  assert found == [("all-gather", "u8", want)]
  assert want == (n - 1) * compressor.payload_bytes(shape)


@pytest.mark.parametrize("bits", [8, 4, None])
def test_quantized_pmean_sends_what_the_formula_says(bits, on_devices):
  def fn(v):
    return quantized_pmean(v, AXIS, bits=bits, block_size=64)

  found = compiled(on_devices, fn, 8, (1000, 3))
  total = sum(op[2] for op in found)
  assert total == quantized_pmean_bytes((1000, 3), 8, bits=bits, block_size=64)
  if bits is None:
    assert [op[:2] for op in found] == [("all-reduce", "f32")]


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


def test_unchecked_program_sends_the_same(on_devices):
  found = [
    compiled(on_devices, lambda v: compressed_pmean(v, AXIS, int4()), 4, (100,), mode)
    for mode in ("checked", "unchecked")
  ]
  assert found[0] == found[1]


@pytest.mark.parametrize(("n", "shape"), [(1, (5,)), (1, (0,)), (4, (0,))])
def test_nothing_to_send_is_free(n, shape, on_devices):
  found = compiled(on_devices, lambda v: compressed_pmean(v, AXIS, int8()), n, shape)
  assert sum(op[2] for op in found) == 0
  assert compressed_pmean_bytes(shape, n, int8()) == allgather_pmean_bytes(shape, n, int8()) == 0


def test_no_padding_is_sent():
  """Small leaves: a scale and half a byte per element, not a block."""
  assert compressed_pmean_bytes((8,), 4, int4()) == 2 * 3 * (1 + 4)
  assert allgather_pmean_bytes((3,), 4, e3m0()) == 3 * (2 + 4)


def test_ratios_of_the_card():
  """int8: 1 + 4 / B bytes per element and hop; 4 bits: 0.5 + 4 / B; float32: 4."""
  dense = quantized_pmean_bytes((1 << 20,), 8, bits=None)
  assert quantized_pmean_bytes((1 << 20,), 8, bits=8) / dense == (1 + 4 / 256) / 4
  assert quantized_pmean_bytes((1 << 20,), 8, bits=4) / dense == (0.5 + 4 / 256) / 4
  assert compressed_pmean_bytes((1 << 20,), 8, identity()) == dense


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
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


@pytest.mark.parametrize("bits", [16, 2, 0, "8"])
def test_rejects_bits(bits):
  with pytest.raises(ValueError, match="`bits` must be 4, 8, .fp8. or None, got"):
    quantized_pmean(jnp.zeros(4), AXIS, bits=bits)
  with pytest.raises(ValueError, match="`bits` must be 4, 8, .fp8. or None, got"):
    quantized_pmean_bytes((4,), 2, bits=bits)


@pytest.mark.parametrize("bits", [8, None])
def test_rejects_bad_input(bits, on_devices):
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    quantized_pmean(jnp.zeros(4), AXIS, bits=bits)
  run = on_devices(lambda v: quantized_pmean(v, AXIS, bits=bits), "checked", 2)
  with pytest.raises(ValueError, match="`x` must have a floating-point dtype, got int8"):
    run(jnp.zeros((2, 4), jnp.int8))
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
    quantized_pmean_bytes((4,), 0, bits=bits)


def test_rejects_bad_block_sizes_and_axis_sizes():
  with pytest.raises(ValueError, match="`block_size` must be even for 4-bit codes, got 9"):
    quantized_pmean(jnp.zeros(4), AXIS, bits=4, block_size=9)
  with pytest.raises(ValueError, match="`block_size` must be an integer of at least 8, got 4"):
    quantized_pmean_bytes((4,), 2, bits=8, block_size=4)
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got -1"):
    compressed_pmean_bytes((4,), -1, int8())
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
    allgather_pmean_bytes((4,), 0, int8())
