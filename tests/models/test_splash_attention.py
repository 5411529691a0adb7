"""Splash attention: in interpret mode like the reference, through sharding, compiled for a TPU."""

import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.inspect import target
from models import _attention, _splash_attention
from models._splash_attention import splash_attention
from parallel import make_mesh

P = jax.P


def inputs(batch, seq_len, heads, kv_heads, width):
  rng = np.random.default_rng(0)
  shapes = [(batch, seq_len, n, width) for n in (heads, kv_heads, kv_heads)]
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


def segments(batch, seq_len):
  """Two documents of unequal length, and padding."""
  third = seq_len // 3
  ids = np.repeat(np.array([1, 2, 0], np.int32), [third - 5, third, seq_len - 2 * third + 5])
  return np.tile(ids, (batch, 1))


def reference(q, k, v, ids=None):
  return _attention.attention(q, k, v, _attention.causal_mask(q.shape[1], ids))


def value_and_grads(fn, arrays, ids):
  def loss(q, k, v):
    y = fn(q, k, v, ids)
    return (jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape) * y).sum(), y

  return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)


@pytest.mark.slow
def test_like_the_reference():
  """Values and gradients over three blocks, two query heads on a key/value head."""
  arrays = inputs(1, 384, 2, 1, 128)
  ids = segments(1, 384)

  def splash(*args):
    return splash_attention(*args, interpret=True)

  got, want = (
    jax.jit(lambda a, f=f: value_and_grads(f, a, ids))(arrays) for f in (splash, reference)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), got, want)


def test_the_way_to_the_kernel_changes_no_gradient(monkeypatch):
  """Where types are not checked, too; the reference stands in for the kernel."""
  seen = []

  def kernel(q, k, v, ids, *, interpret):
    assert not interpret
    seen.append((q.shape[0], q.shape[2], k.shape[2], ids.shape))
    return reference(q, k, v, ids)

  monkeypatch.setattr(_splash_attention, "_kernel", kernel)
  mesh = make_mesh(replica=2, data=2, tensor=2)
  arrays, ids = inputs(4, 16, 4, 2, 8), segments(4, 16)

  def grads(fn):
    manual = jax.shard_map(
      lambda a, ids: value_and_grads(fn, a, ids), mesh=mesh, in_specs=P("replica"),
      out_specs=P("replica"), axis_names={"replica"},
    )  # fmt: skip
    rows = jax.NamedSharding(mesh, P(("replica", "data")))
    return jax.jit(manual, in_shardings=rows)(arrays, ids)

  got, want = grads(splash_attention), grads(reference)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
  assert set(seen) == {(1, 2, 1, (1, 16))}  # a device's own


# The choice.


@pytest.fixture
def tpu(monkeypatch):
  """Makes the process believe in a TPU."""
  monkeypatch.setattr(_attention, "_is_tpu", lambda: True)
  _attention._warn_once.cache_clear()


def choose(wanted="auto", dtype="bfloat16", width=128, seq_len=256, packed=True):
  return _attention.choose(wanted, dtype, width, seq_len=seq_len, packed=packed)


def test_splash_where_it_applies(tpu):
  assert choose() == choose("splash", "float32", 256, packed=False) == "splash"
  assert choose("xla") == "xla"


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"width": 64}, "its head width must be divisible by 128, got 64"),
    ({"seq_len": 200}, "its sequences must have a multiple of 128 tokens, got 200"),
  ],
)
def test_falls_back_with_one_warning(tpu, caplog, changes, reason):
  for _ in range(3):
    assert choose(**changes) == "xla"
  assert [r.levelno for r in caplog.records] == [logging.WARNING]
  assert f"attention without splash, which is slower: {reason}" in caplog.text
  with pytest.raises(ValueError, match=f"`attention` cannot be 'splash': {reason}"):
    choose("splash", **changes)


def test_not_where_all_axes_are_manual(tpu):
  region = jax.shard_map(
    lambda x: (seen.append(choose()), x)[1], mesh=make_mesh(tensor=2), in_specs=P(), out_specs=P()
  )
  seen = []
  jax.eval_shape(region, jnp.zeros(2))
  assert seen == ["xla"]


def test_not_without_a_tpu():
  with pytest.raises(ValueError, match="`attention` cannot be 'splash': there is no TPU"):
    choose("splash")


@pytest.mark.aot
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_for_a_tpu(packed):
  """Manual over `replica`, rows and heads cut: three kernels, and never scores or a mask."""
  try:
    devices = list(target("tpu:v5e:2x4").devices)
  except ImportError as e:
    pytest.skip(str(e))
  mesh, seq_len = make_mesh(replica=2, data=2, tensor=2, devices=devices), 384

  def of_replica(arrays, ids):
    return value_and_grads(splash_attention, arrays, ids)[0]

  program = jax.shard_map(
    of_replica, mesh=mesh, in_specs=P("replica"), out_specs=P("replica"), axis_names={"replica"}
  )
  rows = jax.NamedSharding(mesh, P(("replica", "data")))

  def abstract(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

  arrays = [abstract(8, seq_len, n, 128, dtype=jnp.bfloat16) for n in (4, 2, 2)]
  ids = abstract(8, seq_len, dtype=jnp.int32) if packed else None
  text = jax.jit(program).lower(arrays, ids).compile().as_text()
  assert set(re.findall(r"splash_mha_(fwd|dq|dkv)", text)) == {"fwd", "dq", "dkv"}
  assert not re.search(r"(f32|bf16|pred)\[[\d,]*384,384\]", text)
