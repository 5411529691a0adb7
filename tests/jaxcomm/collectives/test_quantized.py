"""What each quantized collective computes: plain NumPy loops, equal bits, layouts, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcomm.collectives import (
  _linear,
  hierarchical_psum_scatter,
  loco_init,
  loco_psum_scatter,
  quantized_all_gather,
  quantized_all_to_all,
  quantized_pmean,
  quantized_psum,
  quantized_psum_scatter,
)
from jaxcomm.collectives._options import Wire, compressor_of
from jaxcomm.compressors import rand_k

AXIS, N, BLOCK = "replica", 4, 16
KEY = jax.random.key(5)
ROWS, COLUMNS = 9, 5  # four devices own 3, 3, 3 and no rows; a block ends inside of a row
FORMATS = [8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, "fp8"))]


def all_ops(bits, hadamard=None):
  """name -> collective of a local float[ROWS, COLUMNS]."""
  options = {"bits": bits, "block_size": BLOCK, "hadamard": hadamard}
  return {
    "all_gather": lambda v: quantized_all_gather(v, AXIS, **options),
    "psum_scatter": lambda v: quantized_psum_scatter(v, AXIS, **options),
    "ring": lambda v: quantized_psum_scatter(v, AXIS, algorithm="ring", **options),
    "psum": lambda v: quantized_psum(v, AXIS, **options),
    "pmean": lambda v: quantized_pmean(v, AXIS, **options),
    "all_to_all": lambda v: quantized_all_to_all(v[:8], AXIS, 0, 1, **options),
  }


@functools.cache
def program(on_devices, mode, bits, hadamard=None):
  """One program of all collectives: x -> {name: result}."""

  def local(v):
    return {name: op(v) for name, op in all_ops(bits, hadamard).items()}

  return on_devices(local, mode, N)


@pytest.fixture
def x(stacked):
  """Contributions of unlike scale, so that the order of summation shows."""
  scale = 10.0 ** np.arange(-2, 2).reshape(N, 1, 1)
  return np.asarray(stacked(N, (ROWS, COLUMNS)) * scale, np.float32)


def reference(name, compressor, x, coded):
  """Stacked results, by loops over devices; float32 sums in the order of the ranks."""
  if name == "all_gather":
    return np.stack([np.concatenate([coded(compressor, row) for row in x])] * N)
  if name == "all_to_all":
    sent = [
      [[coded(compressor, token) for token in part] for part in np.split(v[:8], N)] for v in x
    ]
    return np.stack([np.concatenate([sent[i][j] for i in range(N)], 1) for j in range(N)])
  if name in ("psum", "pmean"):
    flat = np.pad(x.reshape(N, -1), ((0, 0), (0, -ROWS * COLUMNS % N))).reshape(N, N, -1)
    scale = np.float32(1 / N if name == "pmean" else 1)
    owned = [coded(compressor, in_order(compressor, flat[:, j], coded) * scale) for j in range(N)]
    return np.stack([np.concatenate(owned)[: ROWS * COLUMNS].reshape(ROWS, COLUMNS)] * N)
  chunks = np.pad(x, ((0, 0), (0, -ROWS % N), (0, 0))).reshape(N, N, -1, COLUMNS)
  if name == "psum_scatter":
    return np.stack([in_order(compressor, chunks[:, j], coded) for j in range(N)])
  partial = [chunks[(j + 1) % N, j] for j in range(N)]  # ring
  for hop in range(2, N + 1):
    partial = [coded(compressor, partial[j]) + chunks[(j + hop) % N, j] for j in range(N)]
  return np.stack(partial)


def in_order(compressor, rows, coded):
  sent = [coded(compressor, row) for row in rows]
  return sum(sent[1:], sent[0])


@pytest.mark.parametrize("bits", FORMATS)
def test_equals_the_reference_bit_for_bit(bits, on_devices, x, coded, bits_of):
  got = program(on_devices, "vmap", bits)(x)
  for name in got:
    want = reference(name, compressor_of(bits, BLOCK), x, coded)
    np.testing.assert_array_equal(bits_of(got[name]), bits_of(want), err_msg=name)


@pytest.mark.slow
def test_hadamard_is_a_rotation_of_every_message(on_devices, x, coded, bits_of):
  got = program(on_devices, "vmap", 4, 32)(x)
  for name in got:
    want = reference(name, compressor_of(4, BLOCK, hadamard=32), x, coded)
    np.testing.assert_array_equal(bits_of(got[name]), bits_of(want), err_msg=name)


@pytest.mark.parametrize("mode", ["checked", pytest.param("unchecked", marks=pytest.mark.slow)])
def test_modes_agree_bit_for_bit(mode, on_devices, x, bits_of):
  want = bits_of(program(on_devices, "vmap", 8)(x))
  got = bits_of(program(on_devices, mode, 8)(x))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("bits", FORMATS)
def test_nan_and_inf_spoil_their_block_and_no_other(bits, on_devices, x):
  fn = program(on_devices, "vmap", bits)
  bad = x.copy()
  bad[2, 4, 1] = np.nan  # row 4: chunk 1 of a reduce-scatter; element 21 of 45, chunk 1 of a sum
  bad[1, 7, 3] = -np.inf  # row 7: chunk 2; element 38, chunk 3
  clean, got = fn(x), fn(bad)
  spoilt = {name: ~np.isfinite(value) for name, value in got.items()}
  for name, where in spoilt.items():
    kept = np.where(where, 0, got[name])
    np.testing.assert_array_equal(kept, np.where(where, 0, clean[name]), name)
  gathered = spoilt["all_gather"][0].reshape(N, -1)
  assert np.flatnonzero(gathered[2]).tolist() == list(range(16, 32))
  assert np.flatnonzero(gathered[1]).tolist() == list(range(32, 45))
  assert spoilt["psum_scatter"].reshape(N, -1).sum(1).tolist() == [0, 15, 15, 0]
  assert spoilt["psum"][0].sum() == 12 + 9
  assert spoilt["all_to_all"].sum() == 2 * COLUMNS


@pytest.mark.parametrize(
  "axes", [(1, 2), *(pytest.param(a, marks=pytest.mark.slow) for a in ((0, 1), (1, 0)))]
)
def test_layouts_are_those_of_lax(axes, on_devices):
  """Values that every block represents exactly, so that only the order of elements is tested."""
  x = np.random.default_rng(0).integers(-1, 2, (N, N, 2 * N, 3 * N)) * np.float32(127)
  split, concat = axes
  options = {"block_size": 8}

  def local(v):
    ours, lax = {}, {}
    for tiled in (True, False):
      part = v if tiled else jax.lax.slice_in_dim(v, 0, N, axis=split)
      kw = {"scatter_dimension": split, "tiled": tiled}
      ours["gather", tiled] = quantized_all_gather(v, AXIS, axis=concat, tiled=tiled, **options)
      lax["gather", tiled] = jax.lax.all_gather(v, AXIS, axis=concat, tiled=tiled)
      ours["scatter", tiled] = quantized_psum_scatter(part, AXIS, **kw, **options)
      lax["scatter", tiled] = jax.lax.psum_scatter(part, AXIS, **kw)
      ours["a2a", tiled] = quantized_all_to_all(part, AXIS, split, concat, tiled=tiled, **options)
      lax["a2a", tiled] = jax.lax.all_to_all(part, AXIS, split, concat, tiled=tiled)
    return ours, lax

  ours, lax = on_devices(local, "vmap", N)(x)
  jax.tree.map(np.testing.assert_array_equal, ours, lax)


def test_exact_on_the_grid(on_devices):
  """Integers with a full-scale element in every block: nothing is lost in one rounding."""
  x = np.random.default_rng(0).integers(-127, 128, (N, N * 2, BLOCK)).astype(np.float32)
  x[..., 5] = 127

  def local(v):
    options = {"block_size": BLOCK}
    return quantized_all_gather(v, AXIS, **options), quantized_psum_scatter(v, AXIS, **options)

  gathered, scattered = on_devices(local, "vmap", N)(x)
  np.testing.assert_array_equal(gathered, np.stack([x.reshape(-1, BLOCK)] * N))
  np.testing.assert_array_equal(scattered, x.sum(0).reshape(N, 2, BLOCK))


@pytest.mark.parametrize("mode", ["vmap", pytest.param("unchecked", marks=pytest.mark.slow)])
def test_without_bits_it_is_the_lax_collective(mode, on_devices, stacked, bits_of):
  x = stacked(N, (8, 3))

  def local(v):
    ours = {
      "gather": quantized_all_gather(v, AXIS, bits=None),
      "scatter": quantized_psum_scatter(v, AXIS, bits=None),
      "ring": quantized_psum_scatter(v, AXIS, bits=None, algorithm="ring"),
      "psum": quantized_psum(v, AXIS, bits=None),
      "pmean": quantized_pmean(v, AXIS, bits=None),
      "a2a": quantized_all_to_all(v, AXIS, 0, 1, bits=None),
    }
    scattered = jax.lax.psum_scatter(v, AXIS, tiled=True)
    lax = {
      "gather": jax.lax.all_gather(v, AXIS, tiled=True),
      "scatter": scattered,
      "ring": scattered,
      "psum": jax.lax.psum(v, AXIS),
      "pmean": jax.lax.pmean(v, AXIS),
      "a2a": jax.lax.all_to_all(v, AXIS, 0, 1, tiled=True),
    }
    return ours, lax

  ours, lax = bits_of(on_devices(local, mode, N)(x))
  jax.tree.map(np.testing.assert_array_equal, ours, lax)


@pytest.mark.slow
def test_low_precision_is_widened_before_and_narrowed_after(on_devices, stacked):
  x = stacked(N, (ROWS, COLUMNS), dtype="bfloat16")

  def local(v):
    ops = {"psum_scatter": all_ops(8)["psum_scatter"], "all_gather": all_ops(8)["all_gather"]}
    wide = {name: op(v.astype(jnp.float32)).astype(v.dtype) for name, op in ops.items()}
    return {name: op(v) for name, op in ops.items()}, wide

  narrow, wide = on_devices(local, "vmap", N)(x)
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)
  assert {a.dtype for a in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_shapes_of_empty_and_single_arrays(dtype, on_devices):
  def shapes(shape, n, *fns):
    x = jax.ShapeDtypeStruct((n, *shape), dtype)
    out = jax.eval_shape(on_devices(lambda v: [fn(v) for fn in fns], "checked", n), x)
    assert {a.dtype for a in out} == {jnp.dtype(dtype)}
    return [a.shape[1:] for a in out]

  stack = functools.partial(quantized_all_gather, axis_name=AXIS, tiled=False)
  for shape in ((), (0,), (1,), (3, 0)):
    assert shapes(shape, 4, stack, functools.partial(quantized_psum, axis_name=AXIS)) == [
      (4, *shape),
      shape,
    ]
  scatter = functools.partial(quantized_psum_scatter, axis_name=AXIS)
  ring = functools.partial(scatter, algorithm="ring")
  assert shapes((1,), 4, scatter, ring) == [(1,)] * 2
  assert shapes((0, 3), 4, scatter, ring) == [(0, 3)] * 2
  exchange = functools.partial(quantized_all_to_all, axis_name=AXIS, split_axis=0, concat_axis=1)
  assert shapes((4, 0), 4, exchange) == [(1, 0)]


def test_one_device_and_no_elements_send_and_round_nothing(on_devices, stacked):
  x = stacked(1, (8, 5))
  got = on_devices(lambda v: {k: op(v) for k, op in all_ops(4).items()}, "checked", 1)(x)
  for name, value in got.items():
    np.testing.assert_array_equal(value, x, err_msg=name)
  empty = on_devices(lambda v: [op(v) for op in all_ops(4).values()], "checked", N)
  text = empty.lower(jnp.zeros((N, 8, 0))).compile().as_text()
  assert "u8[" not in text


@functools.cache
def scatter(on_devices):
  def local(v):
    return quantized_psum_scatter(v, AXIS, bits=8, block_size=8)

  return on_devices(local, "vmap", N)


@settings(
  max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  shape=st.sampled_from([(37,), (1,), (5, 3)]),
  seed=st.integers(0, 2**16),
  magnitude=st.integers(-30, 30),
  spread=st.integers(0, 3),
  outlier=st.sampled_from([1.0, 1e4]),
)
def test_error_per_element_is_bounded(on_devices, shape, seed, magnitude, spread, outlier):
  """Each contribution errs by half of its block's step, float32 sums by their rounding."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(N, *shape)) * 10.0 ** (magnitude + rng.integers(0, spread + 1, (N, *shape)))
  x.flat[rng.integers(x.size)] *= outlier
  x = x.astype(np.float32)
  rows = -(-shape[0] // N)  # of a chunk
  got = np.asarray(scatter(on_devices)(x), np.float64).reshape(N * rows, *shape[1:])
  wide = np.zeros((N, *got.shape))
  wide[:, : shape[0]] = x
  chunks = np.abs(wide).reshape(N, N, -1)
  steps = np.zeros_like(chunks)
  for start in range(0, chunks.shape[2], 8):  # the blocks of a chunk
    block = slice(start, start + 8)
    steps[..., block] = chunks[..., block].max(-1, keepdims=True) / 127 * (1 + 2**-16)
  bound = steps.sum(0).reshape(got.shape) / 2 + N * 2.0**-24 * np.abs(wide).sum(0) * 1.01
  assert np.all(np.abs(got - wide.sum(0)) <= bound)


@pytest.mark.slow
def test_stochastic_sum_is_unbiased_with_the_exact_variance(on_devices, stacked):
  """2000 keys: within five sigma of the exact sum, sigma from the fractions; and bounded."""
  num_keys, x = 2000, np.asarray(stacked(N, (40,)))
  compressor = compressor_of(4, 10, "stochastic")

  def local(v):
    options = {"bits": 4, "block_size": 10, "rounding": "stochastic"}
    scatter = lambda key: quantized_psum_scatter(v, AXIS, key=key, **options)  # noqa: E731
    return jax.lax.map(scatter, jax.random.split(KEY, num_keys))

  draws = np.asarray(on_devices(local, "vmap", N)(x), np.float64)  # [owner, key, element]
  draws = np.moveaxis(draws, 1, 0).reshape(num_keys, 40)
  scale = np.repeat(np.asarray(compressor.compress(KEY, x)["scales"], np.float64), 10).reshape(
    N, 40
  )
  fraction = x / scale - np.floor(x / scale)
  variance = (scale**2 * fraction * (1 - fraction)).sum(0)
  exact = x.astype(np.float64).sum(0)
  assert np.all(np.abs(draws.mean(0) - exact) <= 5 * np.sqrt(variance / num_keys) + 1e-6)
  assert draws.var(0, ddof=1).sum() == pytest.approx(variance.sum(), rel=0.05)
  assert np.all(np.abs(draws - exact) <= scale.sum(0) + 1e-6)


@pytest.mark.slow
def test_ring_errs_more_by_half_the_steps(on_devices, stacked):
  """(W - 1) / 2 times the squared error of one shot on independent data: step h carries h terms."""
  n = 8
  x = stacked(n, (n * 2048,))
  options = {"bits": 4, "block_size": 128, "rounding": "stochastic", "key": KEY}

  def local(v):
    return [
      quantized_psum_scatter(v, AXIS, algorithm=algorithm, **options)
      for algorithm in ("one_shot", "ring")
    ]

  exact = np.asarray(x, np.float64).sum(0)
  power = [
    ((np.asarray(got, np.float64).reshape(-1) - exact) ** 2).sum() / (exact**2).sum()
    for got in on_devices(local, "unchecked", n)(x)
  ]
  assert power[0] == pytest.approx(2.8e-2, rel=0.15)
  assert power[1] / power[0] == pytest.approx((n - 1) / 2, rel=0.15)


BAD = [
  ({"bits": 16}, "`bits` must be 4, 8, 'fp8' or None, got 16"),
  ({"bits": "8"}, "`bits` must be 4, 8, 'fp8' or None, got '8'"),
  ({"backward_bits": 2}, "`backward_bits` must be 4, 8, 'fp8', None or 'same', got 2"),
  ({"bits": 4, "block_size": 9}, "`block_size` must be even for 4-bit codes, got 9"),
  ({"block_size": 4}, "`block_size` must be an integer of at least 8, got 4"),
  ({"rounding": "up"}, "`rounding` must be 'nearest' or 'stochastic', got 'up'"),
  ({"rounding": "stochastic"}, r"`key` must be a jax\.random key"),
  ({"hadamard": 12}, "Hadamard transform must be 2, 4, 8, ..., got 12"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:24] for _, m in BAD])
def test_rejects_bad_options(options, message, on_devices):
  for op in (
    quantized_all_gather,
    quantized_psum_scatter,
    functools.partial(quantized_psum_scatter, algorithm="ring"),
    quantized_psum,
    quantized_pmean,
    functools.partial(quantized_all_to_all, split_axis=0, concat_axis=0),
    lambda v, axis_name, **kw: loco_psum_scatter(v, loco_init(v), axis_name, **kw),
  ):
    for n in (1, 2):  # also where nothing would be rounded
      run = on_devices(lambda v, op=op: op(v, axis_name=AXIS, **options), "unchecked", n)
      with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, jnp.zeros((n, 4)))


def test_rejects_bad_input(on_devices):
  for op in (quantized_all_gather, quantized_psum_scatter, quantized_psum, quantized_pmean):
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      op(jnp.zeros(4), AXIS)
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      op(jnp.zeros(4), AXIS, bits=None)
    run = on_devices(lambda v, op=op: op(v, AXIS), "checked", 2)
    with pytest.raises(ValueError, match="`x` must have a floating-point dtype, got int8"):
      run(jnp.zeros((2, 4), jnp.int8))
    with pytest.raises(ValueError, match="`axis_name` must be the name of one axis"):
      op(jnp.zeros(4), (AXIS, "data"))


def test_exchange_of_rows_refuses_a_shared_key(on_devices):
  """Sender and receiver number their rows differently: the decoder would draw other places."""
  wire = Wire(rand_k(2, shared_support=True), None)

  def exchange(v):
    options = {"split_axis": 0, "concat_axis": 0, "tiled": True}
    return _linear.all_to_all(v, AXIS, wire, KEY, **options)

  for n in (1, 2):
    with pytest.raises(ValueError, match="`compressor` of an all_to_all must not need a shared ke"):
      jax.eval_shape(on_devices(exchange, "unchecked", n), jnp.zeros((n, 4, 3)))


def test_rejects_bad_axes(on_devices):
  def rejects(fn, message, n=2, shape=(4, 3)):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(on_devices(fn, "checked", n), jnp.zeros((n, *shape)))

  rejects(lambda v: quantized_all_gather(v, AXIS, axis=2), r"`axis` must be in \[-2, 2\)")
  rejects(lambda v: quantized_all_gather(v, AXIS, to="reduced"), "`to` must be 'varying' or")
  rejects(
    lambda v: quantized_psum_scatter(v, AXIS, algorithm="tree"), "`algorithm` must be 'one_sh"
  )
  rejects(
    lambda v: quantized_psum_scatter(v, AXIS, tiled=False),
    r"`scatter_dimension` must name an axis of size 2 \(the devices\) without `tiled`, got size 4",
  )
  rejects(lambda v: quantized_psum_scatter(v[0, 0], AXIS), "`scatter_dimension` must be in")
  rejects(
    lambda v: quantized_all_to_all(v, AXIS, 1, 0),
    "`split_axis` must name an axis whose size is divisible by the 2 devices, got size 3",
  )
  rejects(lambda v: hierarchical_psum_scatter(v, (AXIS, AXIS)), "`axes` must be two or more differ")
  rejects(lambda v: hierarchical_psum_scatter(v, AXIS), "`axes` must be two or more different axis")
  rejects(lambda v: hierarchical_psum_scatter(v, (AXIS, "node")), "axis `node` is unbound")
  rejects(
    lambda v: hierarchical_psum_scatter(v, (AXIS, "node"), bits={"gpu": 8}),
    r"`bits` must name the axes \['replica', 'node'\], got \['gpu'\]",
  )
