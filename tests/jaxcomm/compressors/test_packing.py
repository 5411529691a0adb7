"""Codes of any width as bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors import _packing

WIDTHS = [*range(10), 12, 20, 31]
SIZES = [0, 1, 7, 33]


def test_unpack_inverts_pack_for_every_width_and_odd_sizes():
  rng = np.random.default_rng(0)
  codes = {
    f"{bits}/{size}": rng.integers(0, 2**bits, size).astype(np.uint32)
    for bits in WIDTHS
    for size in SIZES
  }

  @jax.jit
  def pack_and_unpack(codes):
    packed, unpacked = {}, {}
    for name, array in codes.items():
      bits = int(name.split("/")[0])
      packed[name] = _packing.pack(array, bits)
      unpacked[name] = _packing.unpack(packed[name], array.size, bits)
    return packed, unpacked

  packed, unpacked = pack_and_unpack(codes)
  for name, array in codes.items():
    bits, size = map(int, name.split("/"))
    np.testing.assert_array_equal(unpacked[name], array)
    assert packed[name].dtype == jnp.uint8
    assert packed[name].size == _packing.packed_bytes(size, bits)
    assert bits * size <= 8 * packed[name].size < bits * size + 8 * max(1, bits.bit_count() + 2)
  # The layout that receivers rely on.
  all_bits = np.unpackbits(np.asarray(packed["1/33"]), bitorder="little")
  np.testing.assert_array_equal(all_bits[:33], codes["1/33"])
  np.testing.assert_array_equal(packed["8/33"], codes["8/33"])
  np.testing.assert_array_equal(packed["9/33"][5:], codes["9/33"] >> 1)


def test_packing_by_columns_changes_no_bit():
  """For every width, of arrays whose rows fill whole bytes and of others."""
  shapes = [(3, 16), (2, 33)]
  rng = np.random.default_rng(0)
  codes = {shape: rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes}
  for code in codes.values():
    code.reshape(-1)[-5:] = 0  # filled up

  @jax.jit
  def both(codes):
    pairs = {}
    for (shape, code), bits in itertools.product(codes.items(), range(1, 9)):
      low, size = code & (2**bits - 1), code.size - 5
      by_columns = _packing.pack_columns(lambda i, step, a=low: a[:, i::step], shape, bits, size)
      pairs[f"{shape} {bits}"] = by_columns, _packing.pack(low.reshape(-1)[:size], bits)
    return pairs

  for name, (got, want) in both(codes).items():
    np.testing.assert_array_equal(got, want, err_msg=name)


def test_low_nibble_comes_first():
  assert _packing.pack(jnp.asarray([1, 2, 3], jnp.uint8), 4).tolist() == [0x21, 0x03]
