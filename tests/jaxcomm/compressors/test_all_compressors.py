"""The checks that every compressor must pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxcomm.compressors import (
  BlockInt,
  Compressor,
  bernoulli,
  blockwise,
  chain_compressors,
  contractive,
  e3m0,
  fp8,
  hadamard,
  identity,
  induced,
  int4,
  int8,
  natural,
  qsgd,
  rand_k,
  scaled_sign,
  top_k,
)

BLOCKS = [int8(16), int4(16), BlockInt(3, 16), e3m0(16), fp8("e4m3", 16), fp8("e5m2", 16)]
STOCHASTIC_BLOCKS = [
  *(dataclasses.replace(c, rounding="stochastic") for c in BLOCKS),
  qsgd(4, 16),
  qsgd(5, 16, "linf"),
]
DETERMINISTIC = [
  identity(),
  *BLOCKS,
  scaled_sign(),
  scaled_sign("rms"),
  top_k(ratio=0.25),
  top_k(ratio=0.25, index="plain", value_dtype="bfloat16"),
  chain_compressors(int8(16), top_k(ratio=0.25)),
  chain_compressors(top_k(ratio=0.25), int8(16)),
  blockwise(scaled_sign(), 24),
  hadamard(int4(16), 8),
]
UNBIASED = [
  *STOCHASTIC_BLOCKS,
  natural(),
  rand_k(ratio=0.25),
  rand_k(ratio=0.25, shared_support=True, value_dtype="bfloat16"),
  bernoulli(0.25),
  induced(top_k(ratio=0.25), natural()),
  blockwise(natural(), 24),
  hadamard(natural(), 8),
]
NO_CLOSED_FORM = [
  chain_compressors(qsgd(4, 16), rand_k(ratio=0.5, shared_support=True)),
  chain_compressors(natural(), int8(16, "stochastic")),
]
CONTRACTIVE = [
  rand_k(ratio=0.25, scaled=False),
  contractive(natural()),
  chain_compressors(contractive(qsgd(1, 16)), top_k(ratio=0.25)),
]
RANDOM = [*UNBIASED, *NO_CLOSED_FORM, *CONTRACTIVE]
ALL = [*DETERMINISTIC, *RANDOM]
SIZE = 80
NUM_KEYS = 2000
KEYS = jax.random.split(jax.random.key(0), NUM_KEYS)


@functools.cache
def _program(compressor):
  """The one program of a compressor: many keys, one array of SIZE elements."""

  def both(key, x):
    payload = compressor.compress(key, x)
    return payload, compressor.decompress(payload, x.shape, key=key), compressor.variance(x)

  def without_variance(key, x):
    payload = compressor.compress(key, x)
    return payload, compressor.decompress(payload, x.shape, key=key), 0.0

  both = without_variance if compressor in NO_CLOSED_FORM else both
  return jax.jit(jax.vmap(both, (0, None)) if compressor.needs_key else both)


def run(compressor, x):
  """(payload, decoded, variance) of x, with one row per key: one row if nothing is drawn."""
  x = np.asarray(x, np.float32).reshape(SIZE)
  if compressor.needs_key:
    payload, draws, variance = _program(compressor)(KEYS, x)
    return payload, np.asarray(draws), np.asarray(variance)[0]
  payload, draw, variance = _program(compressor)(None, x)
  return jax.tree.map(lambda a: a[None], payload), np.asarray(draw)[None], np.asarray(variance)


def square(x):
  return np.square(np.asarray(x, np.float64)).sum(-1)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_is_a_value(compressor):
  assert isinstance(compressor, Compressor)
  assert compressor == dataclasses.replace(compressor)
  assert hash(compressor) == hash(dataclasses.replace(compressor))
  field = next((f.name for f in dataclasses.fields(compressor)), "omega")
  with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
    setattr(compressor, field, 8)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_payload_bytes_shape_and_dtype(compressor):
  cases = [((), jnp.float32), ((0,), jnp.bfloat16), ((3, 11), jnp.float16)]
  for shape, dtype in cases:
    x = jax.ShapeDtypeStruct(shape, dtype)
    payload = jax.eval_shape(compressor.compress, KEYS[0], x)
    sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(payload)]
    assert compressor.payload_bytes(shape, dtype) == sum(sizes)
    decode = functools.partial(compressor.decompress, shape=shape, dtype=dtype)
    back = jax.eval_shape(lambda p, d=decode: d(p, key=KEYS[0]), payload)
    assert (back.shape, back.dtype) == (shape, dtype)


@pytest.mark.parametrize(
  ("compressor", "want"),
  [
    (identity(), 4 * 33),
    (int8(16), 33 + 4 * 3),
    (int4(16), 17 + 4 * 3),
    (BlockInt(3, 16), 5 + 9 + 4 * 3),
    (e3m0(16), 17 + 4 * 3),
    (fp8("e5m2", 16), 33 + 4 * 3),
    (qsgd(15, 16), 5 + 17 + 4 * 3),
    (natural(), 33 + 5),
    (scaled_sign(), 5 + 4),
    (rand_k(5), 5 * 4 + 2 + 3),  # indices of 6 bits: a 2-bit part and a 4-bit part
    (rand_k(5, shared_support=True), 5 * 4),
    (top_k(5, index="plain"), 5 * 4 + 5 * 4),
    (top_k(5, value_dtype="bfloat16"), 5 * 2 + 5),
    (bernoulli(0.25), (9 + 15 + 5) * 4 + 8 + 15 + 4),
    (blockwise(scaled_sign(), 16), 2 * (2 + 4) + 1 + 4),
    (chain_compressors(int8(16), top_k(5)), 5 + 4 + 5),
    (induced(scaled_sign(), natural()), 5 + 4 + 33 + 5),
    (hadamard(int8(16)), 64 + 4 * 4),
  ],
  ids=str,
)
def test_payload_bytes_by_hand(compressor, want):
  assert compressor.payload_bytes((3, 11)) == want


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_payload_bytes_of_a_run(compressor, normal):
  payload, draws, _ = run(compressor, normal(SIZE))
  num_bytes = sum(a.nbytes for a in jax.tree.leaves(payload)) // len(draws)
  assert num_bytes == compressor.payload_bytes((SIZE,))


@pytest.mark.parametrize("compressor", [*UNBIASED, *NO_CLOSED_FORM], ids=str)
def test_unbiased_with_the_stated_variance(compressor, normal):
  x = normal(SIZE, 3)
  _, draws, variance = run(compressor, x)
  lost = square(draws - x).mean()
  if compressor not in NO_CLOSED_FORM:
    assert lost == pytest.approx(variance, rel=0.05)
    assert variance <= compressor.omega_at(SIZE) * square(x) * (1 + 1e-6)
  assert lost <= 1.05 * compressor.omega_at(SIZE) * square(x)
  # The exact variance of an element where the sample has hardly any, for one, is unknown here:
  # then that of the mean element.
  sigma = np.sqrt(np.maximum(draws.var(0, dtype=np.float64), lost / SIZE) / NUM_KEYS)
  assert np.all(np.abs(draws.mean(0, dtype=np.float64) - x) <= 5 * sigma)
  assert compressor.unbiased


@pytest.mark.parametrize("compressor", CONTRACTIVE, ids=str)
def test_contractive_with_the_stated_error(compressor, normal):
  x = normal(SIZE, 3)
  _, draws, variance = run(compressor, x)
  assert square(draws - x).mean() == pytest.approx(variance, rel=0.05)
  assert variance <= (1 - compressor.alpha_at(SIZE)) * square(x) * (1 + 1e-5)
  assert not compressor.unbiased
  assert compressor.omega is None


@settings(max_examples=60, deadline=None)
@given(
  index=st.integers(0, len(DETERMINISTIC) - 1),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
  exponent=st.integers(-30, 30),
  outlier=st.sampled_from([1.0, 1e3, 1e6]),
  zeros=st.sampled_from([0, 40, SIZE - 1]),
  seed=st.integers(0, 9),
)
@example(index=1, dtype="float32", exponent=-30, outlier=1.0, zeros=0, seed=0)
@example(index=7, dtype="float32", exponent=30, outlier=1e6, zeros=79, seed=0)
def test_error_is_within_alpha(index, dtype, exponent, outlier, zeros, seed):
  compressor = DETERMINISTIC[index]
  if dtype == "float16":
    exponent, outlier = exponent / 10, min(outlier, 10.0)
  x = np.random.default_rng(seed).normal(size=SIZE) * 10.0**exponent
  x[:zeros] = 0
  x[-1 - seed % (SIZE - zeros)] *= outlier
  x = np.asarray(jnp.asarray(x.astype(np.float32), dtype), np.float32)
  _, got, _ = run(compressor, x)
  assert np.all(np.isfinite(got))
  if compressor.alpha_at(SIZE) is not None:
    assert square(got[0] - x) <= (1 - compressor.alpha_at(SIZE)) * square(x) * (1 + 1e-5)


@pytest.mark.parametrize("compressor", DETERMINISTIC, ids=str)
def test_variance_is_the_squared_error_where_nothing_is_drawn(compressor, normal):
  x = normal(SIZE, 4)
  _, got, variance = run(compressor, x)
  assert variance == pytest.approx(square(got[0] - x), rel=1e-5)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_follows_a_power_of_two(compressor, normal):
  """Bit for bit, from 1e-30 to 1e30, with one outlier."""
  x = normal(SIZE, 5)
  x[17] *= 1e5
  want = run(compressor, x)[1]
  for factor in (2.0**-100, 2.0**90):
    got = run(compressor, x * np.float32(factor))[1]
    np.testing.assert_array_equal(got, want * np.float32(factor))


@pytest.mark.parametrize("compressor", [*DETERMINISTIC[:7], top_k(ratio=0.25)], ids=str)
def test_compressing_again_changes_nothing(compressor, normal):
  once = run(compressor, normal(SIZE))[1]
  again = run(compressor, once[0])[1]
  np.testing.assert_array_equal(again.view(np.uint32), once.view(np.uint32))


@pytest.mark.parametrize("compressor", STOCHASTIC_BLOCKS[:6], ids=str)
def test_stochastic_rounding_keeps_what_is_on_the_grid(compressor, normal):
  once = run(compressor, normal(SIZE))[1][0]
  assert np.all(run(compressor, once)[1] == once)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_zeros_stay_zeros(compressor):
  payload, got, variance = run(compressor, [0.0, -0.0] * (SIZE // 2))
  assert not np.any(got)
  assert variance == 0
  if compressor in [*BLOCKS, *STOCHASTIC_BLOCKS, natural(), scaled_sign()]:
    assert all(not np.any(a) for a in jax.tree.leaves(payload))


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_bad_numbers_are_never_hidden(compressor, normal):
  for bad, place in ((np.nan, 0), (np.inf, 33), (-np.inf, 79)):
    x = normal(SIZE)
    x[place] = bad
    _, got, variance = run(compressor, x)
    assert not np.isfinite(got).all(axis=1).any()
    assert compressor in NO_CLOSED_FORM or not np.isfinite(variance)


@pytest.mark.parametrize("compressor", [*BLOCKS, *STOCHASTIC_BLOCKS], ids=str)
def test_bad_numbers_spoil_their_block_only(compressor, normal):
  x = normal(SIZE)
  clean = run(compressor, x)[1]
  for bad, place in ((np.nan, 0), (np.inf, 31), (-np.inf, 32)):
    spoiled = x.copy()
    spoiled[place] = bad
    got = run(compressor, spoiled)[1]
    block = np.arange(SIZE) // 16 == place // 16
    assert np.all(np.isnan(got[:, block]))
    np.testing.assert_array_equal(got[:, ~block], clean[:, ~block])


@pytest.mark.parametrize("compressor", RANDOM, ids=str)
def test_draws_depend_on_the_key_only(compressor, normal):
  x = normal(SIZE)
  draws = run(compressor, x)[1]
  np.testing.assert_array_equal(draws, run(compressor, x)[1])
  assert np.any(draws != draws[0])


@functools.cache
def _all_in_one(shape):
  """One program of all compressors: (key, x of `shape`) -> what each decodes."""

  def run_all(key, x):
    return [c.decompress(c.compress(key, x), shape, key=key) for c in ALL]

  return jax.jit(run_all)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
  shape=st.sampled_from([(0,), (1,), (3, 11)]),
  dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
  exponent=st.integers(-30, 30),
  outlier=st.sampled_from([1.0, 1e3]),
  bad=st.sampled_from([None, None, np.nan, np.inf, -np.inf]),
  seed=st.integers(0, 99),
)
@example(shape=(1,), dtype="float32", exponent=30, outlier=1e3, bad=None, seed=0)
@example(shape=(3, 11), dtype="float32", exponent=-30, outlier=1.0, bad=np.nan, seed=1)
def test_other_shapes(shape, dtype, exponent, outlier, bad, seed):
  """Within alpha where nothing is drawn, finite where the input is, and nowhere else."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape) * 10.0 ** (exponent / 10 if dtype == "float16" else exponent)
  if x.size:
    x.flat[rng.integers(x.size)] *= 10 if dtype == "float16" else outlier
    x.flat[rng.integers(x.size)] *= 1 if bad is None else bad
  x = np.asarray(jnp.asarray(x.astype(np.float32), dtype), np.float32)
  for compressor, got in zip(ALL, _all_in_one(shape)(KEYS[seed], x)):
    got = np.asarray(got)
    assert got.shape == shape
    assert np.isfinite(got).all() == np.isfinite(x).all(), compressor
    if np.isfinite(x).all() and compressor.alpha_at(x.size) and not compressor.needs_key:
      alpha, lost = compressor.alpha_at(x.size), square((got - x).reshape(-1))
      assert lost <= (1 - alpha) * square(x.reshape(-1)) * (1 + 1e-5), compressor


@pytest.mark.slow
@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_vmap_scan_and_shard_map_equal_one_row_at_a_time(compressor, normal, roundtrip):
  x, common = normal((2, 5, 7)), normal((5, 7), 1)

  def both(key, x):
    return compressor.decompress(compressor.compress(key, x), x.shape, key=key)

  want = np.stack([roundtrip(compressor, row, key) for key, row in zip(KEYS[:2], x)])
  np.testing.assert_array_equal(jax.jit(jax.vmap(both))(KEYS[:2], x), want)
  _, got = jax.jit(lambda k, x: jax.lax.scan(lambda c, kx: (c, both(*kx)), 0, (k, x)))(KEYS[:2], x)
  np.testing.assert_array_equal(got, want)

  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  specs = {"in_specs": (jax.P("data"), jax.P()), "out_specs": (jax.P("data"), jax.P())}

  def local(x, common):
    return both(KEYS[0], x[0])[None], both(KEYS[0], common)

  rows, one = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=True, **specs))(x, common)
  np.testing.assert_array_equal(rows, np.stack([roundtrip(compressor, row, KEYS[0]) for row in x]))
  np.testing.assert_array_equal(one, roundtrip(compressor, common, KEYS[0]))


def test_vmap_equals_one_row_at_a_time(normal, roundtrip):
  compressor, x = e3m0(16, "stochastic"), normal((3, SIZE))

  def both(key, x):
    return compressor.decompress(compressor.compress(key, x), x.shape)

  want = np.stack([roundtrip(compressor, row, key) for key, row in zip(KEYS[:3], x)])
  np.testing.assert_array_equal(jax.jit(jax.vmap(both))(KEYS[:3], x), want)


@pytest.mark.parametrize("compressor", [int8(16), top_k(ratio=0.25), scaled_sign()], ids=str)
def test_low_precision_in_and_out(compressor, normal, roundtrip):
  x = jnp.asarray(normal(SIZE), jnp.bfloat16)
  wide = run(compressor, x.astype(jnp.float32))[1][0]
  narrow = roundtrip(compressor, x, dtype=jnp.bfloat16)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_rejects_what_is_not_floating_point(dtype):
  for method in (lambda x: identity().compress(None, x), natural().variance):
    with pytest.raises(ValueError, match=f"`x` must have a floating-point dtype, got {dtype}"):
      method(jnp.zeros(3, dtype))


@pytest.mark.parametrize("compressor", RANDOM, ids=str)
def test_random_compressors_need_a_key(compressor):
  with pytest.raises(ValueError, match=r"`key` must be a jax\.random key for .*, got None"):
    compressor.compress(None, jnp.zeros(3))


@pytest.mark.parametrize("compressor", [c for c in ALL if c.shared_key], ids=str)
def test_a_shared_key_is_needed_to_decompress(compressor):
  payload = jax.eval_shape(compressor.compress, KEYS[0], jax.ShapeDtypeStruct((8,), jnp.float32))
  with pytest.raises(ValueError, match=r"`key` must be the key that .* compressed with, got None"):
    compressor.decompress(payload, (8,))


@pytest.mark.parametrize("make", [int8, int4, e3m0, fp8, functools.partial(blockwise, natural())])
def test_rejects_bad_block_sizes(make):
  for block_size in (7, 0, -8, 8.0, True, None):
    with pytest.raises(ValueError, match="`block_size` must be an integer of at least 8, got"):
      make(block_size=block_size)


@pytest.mark.parametrize("make", [int8, int4, e3m0, fp8])
def test_rejects_bad_rounding(make):
  with pytest.raises(ValueError, match="`rounding` must be 'nearest' or 'stochastic', got 'up'"):
    make(rounding="up")


@pytest.mark.parametrize("make", [int4, e3m0])
def test_nibbles_need_an_even_block(make):
  with pytest.raises(ValueError, match="`block_size` must be even for 4-bit codes, got 9"):
    make(9)
