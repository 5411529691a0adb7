"""Llama with its sequence cut over devices trains like Llama on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm import _axes
from models import llama
from parallel import ContextParallel, context_permutation

pytestmark = pytest.mark.usefixtures("quickly_compiled")
CFG = dataclasses.replace(llama.nano(), vocab_size=96, intermediate_size=96, scan_layers=True)
ROWS, N = 4, 32


def make_batch():
  """Packed: documents of 7 and 20 tokens, then padding."""
  rng = np.random.default_rng(0)
  lengths = (7, 20, 5)
  ids = np.repeat(np.array([[1, 2, 0]], np.int32), lengths, axis=1)
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
  return {
    "tokens": rng.integers(0, CFG.vocab_size, (ROWS, N)).astype(np.int32),
    "targets": rng.integers(0, CFG.vocab_size, (ROWS, N)).astype(np.int32),
    "loss_mask": (ids.repeat(ROWS, 0) > 0) * rng.integers(0, 2, (ROWS, N)).astype(np.float32),
    "segment_ids": ids.repeat(ROWS, 0),
    "positions": positions[None].repeat(ROWS, 0),
  }


def step(params, batch, context=None):
  """(loss, its tokens, gradients)."""

  def loss(params):
    return llama.loss(params, batch, CFG, context=context, z_loss=1e-3)

  (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, aux["tokens"], grads


def make_params():
  """Without a generator, which would take longest to compile."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), CFG))
  return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def assert_close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


def permuted(batch, context, size):
  order, _ = context_permutation(N, size, context.layout, context.granularity)
  return jax.tree.map(lambda x: x[:, order], batch)


def test_manual_over_seq():
  batch, context = make_batch(), ContextParallel()
  mesh = jax.make_mesh((2,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:2])
  cut, whole = jax.P(None, "seq"), jax.P()
  program = jax.shard_map(
    lambda params, batch: step(params, batch, context),
    mesh=mesh, in_specs=(whole, cut), out_specs=whole,
  )  # fmt: skip
  params = make_params()
  sharded = jax.device_put(permuted(batch, context, 2), jax.NamedSharding(mesh, cut))
  got = jax.jit(program)(jax.device_put(params, jax.NamedSharding(mesh, whole)), sharded)
  assert_close(got, jax.jit(step)(params, batch))


@pytest.mark.slow
def test_logits_are_those_of_one_device():
  mesh = jax.make_mesh((4,), ("seq",), (AxisType.Auto,), devices=jax.devices()[:4])
  order, inverse = context_permutation(N, 4, "zigzag")
  tokens, params = make_batch()["tokens"], make_params()

  def logits(params, tokens, context=None):
    return llama.apply(params, tokens, CFG, context=context)[0]

  cut = jax.P(None, "seq")
  program = jax.shard_map(
    lambda p, t: logits(p, t, ContextParallel()), mesh=mesh, in_specs=(jax.P(), cut), out_specs=cut
  )
  got = jax.jit(program)(params, tokens[:, order])
  assert_close(np.asarray(got)[:, inverse], jax.jit(logits)(params, tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("context", "kind"),
  [
    (ContextParallel(), AxisType.Auto),
    (ContextParallel(method="ulysses"), AxisType.Explicit),
  ],
  ids=["ring-auto", "ulysses-explicit"],
)
def test_inside_a_region_of_replicas(context, kind):
  """As training does: manual over `replica`, the compiler's over `data` and `seq`."""
  sizes, names = (2, 2, 2), ("replica", "data", "seq")
  mesh = jax.make_mesh(sizes, names, (kind,) * 3)
  batch = permuted(make_batch(), context, 2)

  def local(params, batch):
    return jax.tree.map(lambda x: x[None], step(_axes.vary(params, "replica"), batch, context))

  program = jax.shard_map(
    local, mesh=mesh, in_specs=(jax.P(), jax.P("replica")), out_specs=jax.P("replica"),
    axis_names={"replica"},
  )  # fmt: skip
  params = make_params()
  cut = jax.NamedSharding(mesh, jax.P(("replica", "data"), "seq"))
  everywhere = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  got = jax.device_get(jax.jit(program)(everywhere, jax.device_put(batch, cut)))
  for i in range(2):
    half = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], make_batch())
    assert_close(jax.tree.map(lambda x, i=i: x[i], got), jax.jit(step)(params, half))


def test_rejects():
  cfg = dataclasses.replace(CFG, max_seq_len=31)
  params, tokens = make_params(), jnp.zeros((2, 1, 16), int)

  def apply(cfg):
    local = lambda t: llama.apply(params, t, cfg, context=ContextParallel())  # noqa: E731
    return jax.eval_shape(jax.vmap(local, axis_name="seq"), tokens)

  with pytest.raises(ValueError, match="`max_seq_len` = 31, got 32"):
    apply(cfg)
  with pytest.raises(ValueError, match=r"`cfg.attention` must be .* with a `context`, got 'cudnn'"):
    apply(dataclasses.replace(CFG, attention="cudnn"))
  with pytest.raises(ValueError, match=r"`method` must be one of .* got 'flash'"):
    ContextParallel(method="flash")  # type: ignore[arg-type]
