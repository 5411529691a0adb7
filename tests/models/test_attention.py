"""Attention: the XLA reference, when cuDNN is chosen, and what is then compiled.

cuDNN itself runs on a GPU only; here its calls are lowered, and the way to them is run with XLA's
kernel in its place.
"""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import _attention, llama
from parallel import make_mesh

B, S, H, K, C = 4, 16, 4, 2, 8
BF16 = dataclasses.replace(llama.nano(), dtype="bfloat16", scan_layers=True)


def inputs(dtype="float32", heads=H, kv_heads=K):
  rng = np.random.default_rng(0)
  shapes = [(B, S, heads, C), (B, S, kv_heads, C), (B, S, kv_heads, C)]
  return [jnp.asarray(rng.normal(size=s).astype(jnp.dtype(dtype))) for s in shapes]


@jax.jit
def causal(q, k, v):
  return _attention.attention(q, k, v, _attention.causal_mask(S))


def xla_kernel(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


# The reference.


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_agrees_with_jax_nn(kv_heads):
  arrays = inputs(kv_heads=kv_heads)
  np.testing.assert_allclose(causal(*arrays), jax.jit(xla_kernel)(*arrays), rtol=2e-5, atol=2e-6)


def test_bfloat16_is_as_near_as_its_inputs():
  """Scores and softmax are float32: the error is that of rounding inputs, weights and result."""
  got = causal(*inputs("bfloat16"))
  assert got.dtype == jnp.bfloat16
  want = causal(*(x.astype("float32") for x in inputs("bfloat16")))
  largest = float(jnp.abs(inputs("bfloat16")[2]).max())  # a result is a mean of values
  assert float(jnp.abs(got.astype("float32") - want).max()) < 2 * 2**-8 * largest


def test_segments_do_not_see_each_other():
  """Two documents packed in a row give what they give alone."""
  q, k, v = inputs()
  segments = jnp.asarray(np.repeat([[1, 2]], S // 2, axis=1).repeat(B, axis=0))
  packed = jax.jit(lambda *a: _attention.attention(*a, _attention.causal_mask(S, segments)))(
    q, k, v
  )
  half = jax.jit(lambda *a: _attention.attention(*a, _attention.causal_mask(S // 2)))
  alone = [half(*(x[:, part] for x in (q, k, v))) for part in (slice(S // 2), slice(S // 2, S))]
  np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-5, atol=1e-6)


# The choice.


@pytest.fixture
def gpu(monkeypatch):
  """Makes the process believe in an H100 with cuDNN."""
  monkeypatch.setattr(_attention, "_cuda_capability", lambda: (9, 0))
  _attention._warn_once.cache_clear()


def test_cudnn_where_it_applies(gpu):
  assert _attention.choose("auto", "bfloat16", 128, seq_len=128, packed=False) == "cudnn"
  assert _attention.choose("auto", "float16", 256, seq_len=128, packed=False) == "cudnn"
  assert _attention.choose("xla", "bfloat16", 128, seq_len=128, packed=False) == "xla"


def test_xla_without_a_word_where_there_is_no_gpu(caplog):
  assert _attention.choose("auto", "bfloat16", 128, seq_len=128, packed=False) == "xla"
  assert caplog.records == []


@pytest.mark.parametrize(
  ("capability", "dtype", "width", "packed", "reason"),
  [
    ((7, 5), "bfloat16", 128, False, "it needs a GPU of compute capability 8.0 or later"),
    ((8, 0), "bfloat16", 256, False, "divisible by 8 and at most 128, got 256"),
    ((9, 0), "bfloat16", 20, False, "divisible by 8 and at most 256, got 20"),
    ((9, 0), "float32", 128, False, "not in float32"),
    ((9, 0), "bfloat16", 128, True, "the batch is packed"),
  ],
)
def test_falls_back_with_one_warning(
  gpu, monkeypatch, caplog, capability, dtype, width, packed, reason
):
  monkeypatch.setattr(_attention, "_cuda_capability", lambda: capability)
  for _ in range(3):
    assert _attention.choose("auto", dtype, width, seq_len=128, packed=packed) == "xla"
  assert [r.levelno for r in caplog.records] == [logging.WARNING]
  assert reason in caplog.text
  with pytest.raises(ValueError, match=f"`attention` cannot be 'cudnn': .*{reason}"):
    _attention.choose("cudnn", dtype, width, seq_len=128, packed=packed)


def test_the_config_names_what_cannot_be_had():
  cfg = dataclasses.replace(BF16, attention="cudnn")
  tokens = jnp.zeros((2, 8), int)
  with pytest.raises(ValueError, match="`attention` cannot be 'cudnn': there is no NVIDIA GPU"):
    jax.eval_shape(lambda: llama.apply(llama.init(jax.random.key(0), cfg), tokens, cfg))
  with pytest.raises(ValueError, match="`attention` must be one of"):
    dataclasses.replace(BF16, attention="flash")


# What is compiled.


def gradients(params, batch):
  return jax.grad(lambda p: llama.loss(p, batch, BF16)[0])(params)


def custom_calls(batch, place=lambda fn: fn):
  params = jax.eval_shape(lambda: llama.init(jax.random.key(0), BF16))
  traced = jax.jit(place(gradients)).trace(params, batch)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  return set(re.findall(r"custom_call @(\w+\$\w+|CustomSPMDPartitioning)", text))


def rows(*names):
  return {name: jax.ShapeDtypeStruct((8, S), jnp.int32) for name in names}


def sharded(fn):
  """Manual over `replica`, as a training step is; `data` and `fsdp` are the compiler's."""
  mesh = make_mesh(replica=2, data=2, fsdp=2)
  P = jax.P
  return jax.shard_map(
    lambda p, b: jax.tree.map(lambda x: x[None], fn(jax.lax.pcast(p, "replica", to="varying"), b)),
    mesh=mesh, in_specs=(P(), P("replica")), out_specs=P("replica"), axis_names={"replica"},
  )  # fmt: skip


@pytest.fixture
def lowers(gpu, monkeypatch):
  """JAX asks the installed cuDNN for its version while it traces."""
  name = "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version"
  monkeypatch.setattr(name, lambda: 91000)


@pytest.mark.parametrize("place", [lambda fn: fn, sharded], ids=["one", "sharded"])
def test_both_passes_call_cudnn_on_a_gpu(lowers, place):
  """Directly, also under sharding: the compiler could not partition them."""
  calls = custom_calls(rows("tokens", "targets"), place)
  assert calls == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}


def test_packed_batches_do_not(lowers):
  assert custom_calls(rows("tokens", "targets", "segment_ids", "positions")) == set()


def test_the_way_to_the_kernel_changes_no_gradient(monkeypatch):
  """Under sharding both passes have a region of their own; XLA's kernel stands in for cuDNN's."""
  seen = []

  def kernel(q, k, v):
    seen.append((q.shape[0], k.shape[2]))
    return xla_kernel(q, k, v)

  monkeypatch.setattr(_attention, "_kernel", kernel)
  mesh = make_mesh(replica=2, data=2, tensor=2)
  arrays = inputs()

  def grads(fn):
    def loss(q, k, v):
      return (jnp.sin(jnp.arange(C)) * fn(q, k, v) ** 2).sum()

    manual = jax.shard_map(
      jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=jax.P("replica"),
      out_specs=jax.P("replica"), axis_names={"replica"},
    )  # fmt: skip
    return jax.jit(manual, in_shardings=jax.NamedSharding(mesh, jax.P(("replica", "data"))))(
      *arrays
    )

  with jax.numpy_rank_promotion("allow"):  # in jax.nn
    got, want = grads(_attention.cudnn_attention), grads(causal)
  for g, w in zip(got, want):
    np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)
  assert set(seen) == {(arrays[0].shape[0] // 4, arrays[1].shape[2] // 2)}  # a device's own
