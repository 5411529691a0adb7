"""Ring, Ulysses and all-gather attention against dense attention on one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxcomm.inspect import collective_bytes
from parallel import context_permutation, merge_partials
from parallel.allgather_attention import allgather_attention
from parallel.decode_attention import decode_attention
from parallel.ring_attention import ring_attention, ring_attention_bytes
from parallel.ulysses import ulysses_attention, ulysses_attention_bytes

B, N, C = 3, 48, 8
EVERY = pytest.mark.parametrize(
  "attend", [ring_attention, ulysses_attention, allgather_attention], ids=lambda f: f.__name__
)


@functools.partial(jax.jit, static_argnames="causal")
def dense(q, k, v, weight, ids=None, *, causal=True):
  """(output, gradients of sum(weight * output)) by softmax over all keys, padding with output 0."""

  def attend(q, k, v):
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    mask = jnp.ones((1, 1, q.shape[1], q.shape[1]), bool)
    if causal:
      mask &= jnp.tril(mask[0, 0])[None, None]
    if ids is not None:
      mask &= (ids[:, None, :, None] == ids[:, None, None]) & (ids != 0)[:, None, :, None]
    score = jnp.where(mask, jnp.einsum("bshc,bthc->bhst", q, k) * C**-0.5, -1e30)
    weights = jnp.where(mask, jax.nn.softmax(score), 0.0)
    return jnp.einsum("bhst,bthc->bshc", weights, v)

  out, pull = jax.vjp(attend, q, k, v)
  return out, *pull(weight)


def inputs(heads, kv_heads, *, seq_len=N, packed=False, dtype=np.float32, batch=B):
  rng = np.random.default_rng(0)
  shapes = [(batch, seq_len, h, C) for h in (heads, kv_heads, kv_heads, heads)]
  arrays = [rng.normal(size=shape).astype(dtype) for shape in shapes]
  if packed:  # one sequence begins with padding, one ends with it, one is nothing else
    ids = np.sort(rng.integers(0, 4, (batch, seq_len)), axis=1).astype(np.int32)
    arrays.append(np.concatenate((ids[:1], ids[1:2, ::-1], 0 * ids[2:])))
  return arrays


@dataclasses.dataclass(frozen=True)
class Case:
  """A program that returns output and gradients, [B, N, ...] in the order of a layout."""

  attend: object
  size: int
  layout: str = "zigzag"
  granularity: int = 1
  causal: bool = True
  block_size: int = 512
  kind: AxisType = AxisType.Auto
  check_vma: bool = True

  @property
  def mesh(self):
    return jax.make_mesh((self.size,), ("seq",), (self.kind,), devices=jax.devices()[: self.size])

  def local(self, q, k, v, weight, ids=None):
    def attend(q, k, v):
      return self.attend(
        q, k, v, "seq", layout=self.layout, granularity=self.granularity, segment_ids=ids,
        causal=self.causal, block_size=self.block_size,
      )  # fmt: skip

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(weight)

  def compile(self, *arrays):
    spec = jax.P(None, "seq")
    program = jax.shard_map(
      self.local, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=self.check_vma
    )
    sharding = jax.NamedSharding(self.mesh, spec)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in arrays]
    return jax.jit(program).lower(*shapes).compile()

  def check(self, *arrays):
    """The compiled program, once it has agreed with `dense`."""
    seq_len = arrays[0].shape[1]
    order, inverse = context_permutation(seq_len, self.size, self.layout, self.granularity)
    compiled = self.compile(*arrays)
    sharding = jax.NamedSharding(self.mesh, jax.P(None, "seq"))
    got = compiled(*(jax.device_put(x[:, order], sharding) for x in arrays))
    want = dense(*arrays, causal=self.causal)
    for g, w, atol in zip(got, want, (1e-5, 1e-4, 1e-4, 1e-4)):
      np.testing.assert_allclose(np.asarray(g)[:, inverse], w, rtol=0, atol=atol)
      if len(arrays) == 5:  # packed
        np.testing.assert_array_equal(g[2], 0.0)
    return compiled


def sent(compiled, case):
  report = collective_bytes(compiled, case.mesh)
  assert set(report.by_axis) <= {"seq"}
  return report


def shape_of(k, case):
  return (k.shape[0], k.shape[1] // case.size, *k.shape[2:])


# Exactness, and what crosses the wire.


@pytest.mark.parametrize(
  "case",
  [
    Case(ring_attention, 4, "zigzag", block_size=3),
    pytest.param(Case(ring_attention, 3, "striped", granularity=2), marks=pytest.mark.slow),
    pytest.param(Case(ring_attention, 1, "contiguous", block_size=16), marks=pytest.mark.slow),
  ],
  ids=lambda case: case.layout,
)
def test_ring_is_dense_attention_in_its_bytes(case):
  arrays = inputs(4, 2, packed=True)
  report = sent(case.check(*arrays), case)
  shape = shape_of(arrays[1], case)
  want = [ring_attention_bytes(shape, case.size, backward=b, packed=True) for b in (False, True)]
  assert report.total == sum(want)
  assert set(report.by_kind) <= {"collective-permute"}
  hops = sum(op.times for op in report.ops if op.dtype == "f32")
  assert hops == 3 * (case.size - 1)  # messages in each pass, and gradients in the second


@pytest.mark.parametrize(
  "case",
  [
    Case(ulysses_attention, 2, "zigzag", block_size=6),
    Case(allgather_attention, 2, "striped", kind=AxisType.Explicit),
  ],
  ids=lambda case: case.attend.__name__,
)
def test_ulysses_and_all_gather_are_dense_attention_in_their_bytes(case):
  arrays = q, k, *_ = inputs(4, 2, packed=True)
  report = sent(case.check(*arrays), case)
  shapes = shape_of(q, case), shape_of(k, case)
  if case.attend is ulysses_attention:
    assert report.total == sum(ulysses_attention_bytes(*shapes, 2, packed=p) for p in (True, False))
    return
  want = [ring_attention_bytes(shapes[1], 2, backward=b, packed=True) for b in (False, True)]
  # One program for both passes: XLA:CPU keeps what was gathered, in place of gathering it again.
  assert report.total == want[1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(
  ("layout", "heads"), [("contiguous", (8, 8)), ("zigzag", (8, 1)), ("striped", (8, 4))]
)
def test_ring_without_segments(size, layout, heads):
  case = Case(ring_attention, size, layout, causal=layout != "striped" or size == 8)
  arrays = inputs(*heads)
  report = sent(case.check(*arrays), case)
  shape = shape_of(arrays[1], case)
  want = [ring_attention_bytes(shape, size, backward=b) for b in (False, True)]
  # One program for both passes: with a single hop XLA:CPU keeps what was received.
  assert report.total == (want[1] if size == 2 else sum(want))


@pytest.mark.slow
@pytest.mark.parametrize("case", [
  Case(ulysses_attention, 8, "contiguous"),
  Case(allgather_attention, 8, "zigzag", kind=AxisType.Explicit),
  Case(ring_attention, 4, "zigzag", kind=AxisType.Explicit, check_vma=False),
], ids=lambda case: case.attend.__name__)  # fmt: skip
def test_more_ways(case):
  case.check(*inputs(8, 8, packed=True))


@pytest.mark.slow
@EVERY
def test_4096_tokens(attend):
  size = 2 if attend is ulysses_attention else 8
  Case(attend, size, "zigzag", block_size=128).check(*inputs(2, 2, seq_len=4096, batch=1))


@pytest.mark.slow
@EVERY
def test_stacked_by_vmap(attend):
  case = Case(attend, 4, "striped")
  arrays = inputs(4, 4, packed=True)
  order, inverse = context_permutation(N, 4, "striped")
  stacked = [np.stack(np.split(x[:, order], 4, axis=1)) for x in arrays]
  got = jax.jit(jax.vmap(case.local, axis_name="seq"))(*stacked)
  for g, w in zip(got, dense(*arrays)):
    np.testing.assert_allclose(np.concatenate(g, axis=1)[:, inverse], w, rtol=0, atol=1e-5)


# Numbers.


@pytest.mark.slow
def test_bfloat16_is_as_near_as_its_inputs():
  """Scores, sums and gradients on the wire are float32; only inputs and products are rounded."""
  case = Case(ring_attention, 4)
  arrays = inputs(4, 2, dtype=jnp.bfloat16)
  order, inverse = context_permutation(N, 4, "zigzag")
  compiled = case.compile(*arrays)
  sharding = jax.NamedSharding(case.mesh, jax.P(None, "seq"))
  got = compiled(*(jax.device_put(x[:, order], sharding) for x in arrays))
  want = dense(*(x.astype(np.float32) for x in arrays))
  for g, w in zip(got, want):
    assert g.dtype == jnp.bfloat16
    error = np.abs(np.asarray(g, np.float32)[:, inverse] - w).max()
    assert error < 2 * 2**-8 * np.abs(w).max()
  shape = shape_of(arrays[1], case)
  want = [ring_attention_bytes(shape, 4, dtype="bfloat16", backward=b) for b in (False, True)]
  assert sent(compiled, case).total == sum(want)


@pytest.mark.slow
def test_large_and_shifted_scores():
  """Adding a constant to all scores changes nothing, and scores of 1e4 stay finite."""
  case = Case(ring_attention, 2, "contiguous")
  q, k, v, weight = inputs(2, 2)
  compiled = case.compile(q, k, v, weight)
  sharding = jax.NamedSharding(case.mesh, jax.P(None, "seq"))
  run = lambda *x: [np.asarray(y) for y in compiled(*jax.device_put(x, sharding))]  # noqa: E731
  shift = np.zeros_like(k)
  shift[..., 0] = 1.0
  q[..., 0] = 3.0  # adds 3 C ** -0.5 to every score
  for g, w in zip(run(q, k + shift, v, weight), run(q, k, v, weight)):
    np.testing.assert_allclose(g, w, rtol=0, atol=2e-5)
  huge = run(100 * q, 100 * k, v, weight)
  assert all(np.isfinite(x).all() for x in huge)
  np.testing.assert_allclose(huge[0], dense(100 * q, 100 * k, v, weight)[0], rtol=0, atol=1e-5)


# Merging.

NORMAL = {"width": 32, "allow_subnormal": False}  # XLA flushes subnormal numbers to zero
PARTIAL = st.tuples(st.floats(-5, 5, **NORMAL), st.floats(-50, 50, **NORMAL) | st.just(-np.inf))


@jax.jit
def merge(a, b):
  return merge_partials(a[0][None], a[1], b[0][None], b[1])


def merged(a, b):
  out, lse = merge(*(tuple(np.float32(x) for x in part) for part in (a, b)))
  return float(out[0]), float(lse)


@given(PARTIAL, PARTIAL, PARTIAL)
@settings(max_examples=50, deadline=None)
def test_merging_is_a_commutative_monoid(a, b, c):
  np.testing.assert_allclose(merged(a, b), merged(b, a), rtol=1e-6, atol=1e-6)
  left, right = merged(merged(a, b), c), merged(a, merged(b, c))
  np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5)
  empty = (0.0, -np.inf)
  kept = merged(a, empty)
  assert kept == (a if a[1] > -np.inf else empty)


@pytest.mark.slow
def test_two_blocks_of_a_library_kernel_have_no_derivative_but_ours_has():
  """`jax.nn.dot_product_attention` returns a log-sum-exp whose gradient is silently zero.

  So partial results must not be merged under JAX's derivative; when this fails, they may be.
  """
  q, k, v, weight = inputs(2, 2, seq_len=16)

  def halves(q):
    parts = [
      jax.nn.dot_product_attention(q, k[:, i : i + 8], v[:, i : i + 8], return_residual=True)
      for i in (0, 8)
    ]
    (out_a, lse_a), (out_b, lse_b) = parts
    return merge_partials(out_a, lse_a, out_b, lse_b)[0]

  with jax.numpy_rank_promotion("allow"):  # in jax.nn
    out, grad = jax.jit(lambda q: (lambda o, pull: (o, pull(weight)[0]))(*jax.vjp(halves, q)))(q)
  want_out, want, *_ = dense(q, k, v, weight, causal=False)
  np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-5)
  assert np.linalg.norm(grad - want) > 0.1 * np.linalg.norm(want)


# Memory.


@pytest.mark.slow
def test_memory_follows_the_tokens_of_a_device():
  """N grows with W: the same bytes on each device. N alone grows: bytes in proportion."""

  def peak(size, seq_len):
    shapes = [jax.ShapeDtypeStruct((1, seq_len, h, C), jnp.float32) for h in (2, 1, 1, 2)]
    return Case(ring_attention, size, block_size=32).compile(*shapes).memory_analysis()

  four, eight, short = peak(4, 2048), peak(8, 4096), peak(8, 1024)
  assert eight.temp_size_in_bytes < 1.1 * four.temp_size_in_bytes
  assert eight.temp_size_in_bytes < 4.1 * short.temp_size_in_bytes
  dense_scores = 2 * 4096 * 4096 * 4
  assert eight.temp_size_in_bytes < dense_scores / 50


# One new token.


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_decoding_is_the_last_row_of_dense_attention(kind):
  q, k, v, weight = inputs(4, 2)
  mesh = jax.make_mesh((2,), ("seq",), (kind,), devices=jax.devices()[:2])
  valid = np.ones((B, N), bool)
  valid[1] = False  # no cache at all

  def local(q, k, v, valid):
    return decode_attention(q, k, v, "seq", valid=valid)

  cut = jax.P(None, "seq")
  program = jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), cut, cut, cut), out_specs=jax.P())
  arrays = jax.device_put((k, v, valid), jax.NamedSharding(mesh, cut))
  got = jax.jit(program)(jax.device_put(q[:, -1:], jax.NamedSharding(mesh, jax.P())), *arrays)
  want = dense(q, k, v, weight, valid.astype(np.int32))[0]
  np.testing.assert_allclose(got[0], want[0, -1:], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(got[1], 0.0)


# Bad input.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"q": jnp.zeros((B, 8, 2, C), int)}, "`q` must be floating point"),
    ({"k": jnp.zeros((B, 16, 2, C))}, "`k` must be .B, S, K, C. with B, S, C"),
    ({"v": jnp.zeros((B, 8, 2, C), jnp.bfloat16)}, "`v` must be .* got bfloat16"),
    ({"k": jnp.zeros((B, 8, 3, C)), "v": jnp.zeros((B, 8, 3, C))}, "divides the 2 of `q`, got 3"),
    ({"segment_ids": jnp.zeros((B, 4), int)}, "`segment_ids` must be integers .3, 8."),
    ({"layout": "ring"}, "`layout` must be one of"),
    ({"layout": "striped", "granularity": 3}, "`seq_len` must be a positive multiple of 6"),
    ({"block_size": 3}, "`block_size` must divide the 4 neighbouring tokens"),
    ({"block_size": 0}, "`block_size` must be at least 1, got 0"),
    ({"axis_name": "tensor"}, "axis `tensor` is unbound"),
  ],
)
def test_rejects(change, message):
  x = jnp.zeros((2, B, 8, 2, C))
  kept = {"axis_name": "seq", "layout": "zigzag"} | change

  def call(x):
    arrays = {name: kept.get(name, x) for name in "qkv"}
    return ring_attention(**(kept | arrays))

  with pytest.raises(ValueError, match=message):
    jax.eval_shape(jax.vmap(call, axis_name="seq"), x)


def test_ulysses_needs_heads_for_all():
  def call(x):
    return ulysses_attention(x, x[:, :, :1], x[:, :, :1], "seq", layout="zigzag")

  with pytest.raises(ValueError, match="`k` must have a number of heads that the 2 devices"):
    jax.eval_shape(jax.vmap(call, axis_name="seq"), jnp.zeros((2, B, 8, 2, C)))
  with pytest.raises(ValueError, match="`q` must have a number of heads that the 4 devices"):
    ulysses_attention_bytes((1, 8, 2, C), (1, 8, 4, C), 4)
