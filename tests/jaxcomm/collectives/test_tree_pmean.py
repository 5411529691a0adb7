"""Buckets: leaves share messages, never blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import (
  allgather_pmean,
  compressed_pmean_bytes,
  quantized_pmean_bytes,
  tree_compressed_pmean,
  tree_compressed_pmean_bytes,
  tree_compressed_pmean_with_error,
)
from jaxcomm.compressors import Hadamard, identity, int4, int8
from jaxcomm.inspect import collective_bytes

AXIS, N = "replica", 4


@pytest.fixture
def tree(stacked):
  """Leaves of unlike sizes and scales: mixed in a block, the small ones would vanish."""
  return {
    "bias": stacked(N, (3,)) * 1e-6,
    "empty": jnp.zeros((N, 0, 2)),
    "scalar": stacked(N, ()) * 1e3,
    "weight": stacked(N, (7, 5), dtype="bfloat16"),
  }


def leafwise(tree, coded):
  """Every leaf by itself, one_hop and then rounded again; blocks begin where the leaf begins."""

  def mean(x):
    rows = [coded(int8(16), np.asarray(row, np.float32)) for row in x]
    return coded(int8(16), sum(rows[1:], rows[0]) * np.float32(1 / N))

  return jax.tree.map(lambda x: jnp.asarray(mean(x)).astype(x.dtype), tree)


@pytest.mark.parametrize(
  "bucket_size", [48, *(pytest.param(size, marks=pytest.mark.slow) for size in (10**6, 0))]
)
def test_every_leaf_has_blocks_of_its_own(bucket_size, on_devices, tree, coded):
  def local(t):
    return tree_compressed_pmean(t, AXIS, int8(16), bucket_size=bucket_size)

  got = on_devices(local, "unchecked" if bucket_size else "vmap", N)(tree)
  want = leafwise(tree, coded)
  jax.tree.map(lambda g, w: np.testing.assert_array_equal(g, np.stack([w] * N)), got, want)
  assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, tree)


@pytest.mark.slow
def test_one_hop_is_that_of_the_leaves(on_devices, tree):
  def local(t):
    ours = tree_compressed_pmean(t, AXIS, int4(16), algorithm="all_gather")
    return ours, jax.tree.map(lambda x: allgather_pmean(x, AXIS, int4(16)), t)

  jax.tree.map(np.testing.assert_array_equal, *on_devices(local, "checked", N)(tree))


def test_small_leaves_stay_exact_and_errors_account_for_the_rest(on_devices, tree):
  def local(t):
    return tree_compressed_pmean_with_error(t, AXIS, int4(16), min_size=10)

  mean, error = on_devices(local, "unchecked", N)(tree)
  for name, x in tree.items():
    exact = np.asarray(x, np.float64).mean(0)
    if x[0].size < 10:
      np.testing.assert_allclose(mean[name][0], exact, rtol=1e-6)
      assert not np.any(error[name])
    else:
      assert np.any(error[name])
      accounted = np.asarray(mean[name][0], np.float64) + np.asarray(error[name], np.float64).mean(
        0
      )
      np.testing.assert_allclose(accounted, exact, atol=1e-6)


@pytest.mark.parametrize(
  ("bucket_size", "messages"), [(10**6, 1), pytest.param(64, 3, marks=pytest.mark.slow)]
)
def test_messages_and_bytes(bucket_size, messages, on_devices, tree):
  options = {"min_size": 10, "bucket_size": bucket_size}

  def local(t):
    return tree_compressed_pmean(t, AXIS, int8(16), **options)

  del tree["empty"]
  tree |= {"wide": jnp.zeros((N, 2, 33)), "tall": jnp.zeros((N, 40))}
  ops = collective_bytes(on_devices(local, "checked", N).lower(tree).compile()).ops
  kinds = [(op.kind, op.dtype) for op in ops]
  assert kinds.count(("all-to-all", "u8")) == kinds.count(("all-gather", "u8")) == messages
  assert kinds.count(("all-reduce", "f32")) == 1
  local_tree = jax.tree.map(lambda a: a[0], tree)
  total = tree_compressed_pmean_bytes(local_tree, N, int8(16), **options)
  assert sum(op.bytes for op in ops) == total
  # tall, weight and wide take 48, 48 and 80 elements: 3 blocks in each of 4 chunks, or 1, 1, 2.
  padded = [192] if messages == 1 else [64, 64, 128]
  assert total == sum(compressed_pmean_bytes((d,), N, int8(16)) for d in padded) + (
    quantized_pmean_bytes((4,), N, bits=None)
  )


def test_derivative_is_that_of_the_mean(on_devices, tree):
  ct = jax.tree.map(lambda a: a + 1, tree)

  def local(args):
    _, pull = jax.vjp(lambda t: tree_compressed_pmean(t, AXIS, int8(16)), args[0])
    return pull(jax.tree.map(lambda a: jax.lax.pmean(a, AXIS), args[1]))[0]

  got = on_devices(local, "checked", N)((tree, ct))
  for name, value in got.items():
    want = np.asarray(ct[name], np.float32).mean(0) / N
    np.testing.assert_allclose(np.asarray(value[0], np.float32), want, rtol=1e-2, err_msg=name)


def test_a_rotation_stays_within_its_leaf():
  assert Hadamard(int8(16), 32).block_size == 32
  assert Hadamard(int8(64), 32).block_size == 64
  tree = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  sent = tree_compressed_pmean_bytes(tree, 1 + 1, Hadamard(int8(16), 32))
  assert sent == compressed_pmean_bytes((64,), 2, int8(16))


def test_an_empty_tree_needs_no_axis():
  assert tree_compressed_pmean({}, AXIS, int8()) == {}
  assert tree_compressed_pmean_bytes({}, 4, int8()) == 0


def test_rejects_bad_input(on_devices):
  def rejects(message, dtype="float32", compressor=None, **options):
    def local(v):
      return tree_compressed_pmean([v], AXIS, compressor or int8(), **options)

    with pytest.raises(ValueError, match=message):
      jax.eval_shape(on_devices(local, "checked", 2), jnp.zeros((2, 40), dtype))

  rejects("`compressor` must have a `block_size`", compressor=identity())
  rejects("`min_size` must be a number of elements >= 0, got -1", min_size=-1)
  rejects("`bucket_size` must be a number of elements >= 0, got -1", bucket_size=-1)
  rejects("`algorithm` must be 'two_hop' or 'all_gather', got 'ring'", algorithm="ring")
  rejects("`x` must have a floating-point dtype, got int32", dtype="int32")
