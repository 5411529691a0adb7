"""Llama with weights cut over `tensor`: by the compiler and by hand, like one device."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxcomm.inspect import collective_bytes
from models import llama, losses
from parallel import make_mesh, mesh_specs, named_shardings

P = jax.P
B, S = 2, 16
CFG = llama.LlamaConfig(
  vocab_size=72, hidden_size=24, num_layers=2, intermediate_size=40, num_heads=16, num_kv_heads=8,
  head_dim=4, dtype="float32", attention_bias=True, mlp_bias=True,
)  # fmt: skip
TIED = dataclasses.replace(CFG, tie_embeddings=True, attention_bias=False, mlp_bias=False)
FEW = dataclasses.replace(CFG, num_kv_heads=2)  # each for several devices


def make_params(cfg):
  """Without a generator, which would take longest to compile; biases are not zero."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def make_batch():
  tokens, targets = np.random.default_rng(1).integers(0, CFG.vocab_size, (2, B, S)).astype(np.int32)
  mask = (np.arange(B * S).reshape(B, S) % 5 > 0).astype(np.float32)
  return {"tokens": tokens, "targets": targets, "loss_mask": mask}


def loss_and_grads(params, batch, cfg):
  def loss(params):
    return llama.loss(params, batch, cfg, z_loss=1e-3)

  (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
  return value, grads


@functools.cache
def on_one_device(cfg):
  program = jax.jit(functools.partial(loss_and_grads, cfg=cfg))
  return program(make_params(cfg), make_batch())


def compile_on(mesh, cfg, fn=loss_and_grads, *, manual=False, out_specs=None):
  """(`fn(params, batch, cfg)` compiled, its arguments)."""
  params, batch = make_params(cfg), make_batch()
  specs = mesh_specs(llama.specs(cfg), params, mesh)
  program = functools.partial(fn, cfg=cfg)
  if manual:
    out = (P(), specs) if out_specs is None else out_specs
    program = jax.shard_map(program, mesh=mesh, in_specs=(specs, P()), out_specs=out)
  shardings = named_shardings(mesh, specs)
  args = jax.device_put((params, batch), (shardings, jax.NamedSharding(mesh, P())))
  kept = (None, shardings) if out_specs is None else None
  return jax.jit(program, out_shardings=kept).lower(*args).compile(), args


def assert_close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


CASES = {
  "auto": (4, CFG, AxisType.Auto, False),
  "explicit": (2, TIED, AxisType.Explicit, False),
  "manual": (4, CFG, AxisType.Auto, True),
  "manual, tied": (2, TIED, AxisType.Auto, True),
  "auto, 8": (8, TIED, AxisType.Auto, False),
  "auto, 1": (1, CFG, AxisType.Auto, False),
  "manual, 8": (8, CFG, AxisType.Explicit, True),
  "manual, 1": (1, TIED, AxisType.Auto, True),
  "auto, few heads": (4, FEW, AxisType.Auto, False),
  "explicit, few heads, 8": (8, FEW, AxisType.Explicit, False),
  "manual, few heads": (4, FEW, AxisType.Auto, True),
}
FAST = ("auto",)


def numbers_of_shared_heads(cfg, size, manual):
  """Sent for gradients of keys' and values' weights and biases that several devices have.

  By hand a sum over all; the compiler sums among those of a head, and gathers the heads.
  """
  heads = cfg.num_kv_heads
  if size <= heads:
    return 0
  rows = cfg.num_layers * 2 * (cfg.hidden_size + cfg.attention_bias) * cfg.head_size
  share = size // heads
  return rows * (2 * (size - 1) / size * heads if manual else 2 * (share - 1) / share + heads - 1)


@pytest.mark.parametrize(
  "case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_two_sums_per_layer_and_pass(case):
  """Loss, gradients, and every byte on the wire; nowhere are the logits whole."""
  size, cfg, kind, manual = CASES[case]
  mesh = make_mesh(tensor=size, axis_types=kind)
  compiled, args = compile_on(mesh, cfg, manual=manual)
  assert_close(compiled(*args), on_one_device(cfg))
  if size == 1:
    return
  wire = collective_bytes(compiled, mesh)
  streams = 4 * cfg.num_layers + 2  # and one of the embedding, one of the output
  numbers = B * S * (streams * cfg.hidden_size + 3)
  gathers = size > cfg.num_kv_heads and not manual
  assert {op.kind for op in wire.ops} == {"all-reduce"} | ({"all-gather"} if gathers else set())
  sent = 2 * (size - 1) / size * numbers + numbers_of_shared_heads(cfg, size, manual)
  assert wire.by_axis == {"tensor": pytest.approx(4 * sent)}
  assert f"[{B},{S},{cfg.vocab_size}]" not in compiled.as_text()


@pytest.mark.parametrize(
  "manual", [pytest.param(False, marks=pytest.mark.slow), True], ids=["auto", "manual"]
)
def test_sequence_parallel(manual):
  """The stream is cut over tokens: gathered before columns, scattered after rows."""
  cfg, size = dataclasses.replace(CFG, sequence_parallel=True), 4
  mesh = make_mesh(tensor=size)
  compiled, args = compile_on(mesh, cfg, manual=manual)
  assert_close(compiled(*args), on_one_device(CFG))
  if not manual:
    return
  wire = collective_bytes(compiled, mesh)
  kinds = {op.kind for op in wire.ops}
  assert kinds == {"all-gather", "reduce-scatter", "all-reduce"}
  layers, streams = cfg.num_layers, 4 * cfg.num_layers + 2
  vectors = layers * 4 + 1  # gradients of gains and of biases behind the sums
  small = 2 * (vectors * cfg.hidden_size + 3 * B * S)
  numbers = 2 * streams * B * S * cfg.hidden_size + small
  assert wire.by_axis == {"tensor": pytest.approx((size - 1) / size * 4 * numbers)}


@pytest.mark.slow
def test_logits_of_each_part_of_the_vocabulary():
  mesh = make_mesh(tensor=2)

  def logits(params, batch, cfg):
    return llama.apply(params, batch["tokens"], cfg)[0]

  compiled, args = compile_on(mesh, CFG, logits, manual=True, out_specs=P(None, None, "tensor"))
  want = jax.jit(functools.partial(logits, cfg=CFG))(make_params(CFG), make_batch())
  assert_close(compiled(*args), want)
  kinds = [op.kind for op in collective_bytes(compiled, mesh).ops]
  assert kinds == ["all-reduce"] * len(kinds)


def test_cross_entropy_of_cut_logits():
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 30, (2, 5, 24)).astype(np.float32)
  logits[0, 0] += 1e4  # no overflow
  targets = rng.integers(0, 24, (2, 5)).astype(np.int32)
  mesh = make_mesh(tensor=4)

  def total(logits, weight):
    loss = losses.sharded_cross_entropy(logits, targets, "tensor")
    return (loss * weight).sum(), loss

  cut = P(None, None, "tensor")
  manual = jax.shard_map(
    jax.grad(total, has_aux=True), mesh=mesh, in_specs=(cut, P()), out_specs=(cut, P())
  )
  weight = rng.normal(size=(2, 5)).astype(np.float32)
  grad, loss = jax.jit(manual)(logits, weight)
  reference = optax.softmax_cross_entropy_with_integer_labels
  np.testing.assert_allclose(loss, jax.jit(reference)(logits, targets), rtol=1e-6, atol=1e-5)
  want = jax.jit(jax.grad(lambda x: (reference(x, targets) * weight).sum()))(logits)
  np.testing.assert_allclose(grad, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"vocab_size": 70}, r"embed_VD.*\('vocab'\) has size 70, which must be divisible by 4"),
    ({"num_heads": 12, "num_kv_heads": 3}, r"\('kv_heads'\) has size 3, .* by 4"),
    ({"num_heads": 6, "num_kv_heads": 2}, r"\('heads'\) has size 6, .* by 4"),
    ({"intermediate_size": 42}, r"\('mlp'\) has size 42, .* axis tensor"),
  ],
)
def test_rejects_sizes_that_the_devices_do_not_divide(changes, message):
  cfg = dataclasses.replace(CFG, attention_bias=False, mlp_bias=False, **changes)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  with pytest.raises(ValueError, match=message):
    mesh_specs(llama.specs(cfg), shapes, make_mesh(tensor=4))


def test_rejects_parts_without_types():
  mesh = make_mesh(tensor=4)
  specs = mesh_specs(llama.specs(CFG), make_params(CFG), mesh)
  program = jax.shard_map(
    lambda p, b: llama.loss(p, b, CFG)[0],
    mesh=mesh, in_specs=(specs, P()), out_specs=P(), check_vma=False,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"`check_vma`\): embed_VD has 18 of 72 rows"):
    jax.eval_shape(program, make_params(CFG), make_batch())


def test_rejects_tokens_that_the_devices_do_not_divide():
  cfg = dataclasses.replace(CFG, sequence_parallel=True)
  mesh = make_mesh(tensor=4)
  specs = mesh_specs(llama.specs(cfg), make_params(cfg), mesh)
  program = jax.shard_map(
    lambda p, b: llama.loss(p, b, cfg)[0], mesh=mesh, in_specs=(specs, P()), out_specs=P()
  )
  batch = jax.tree.map(lambda x: x[:, :14], make_batch())
  with pytest.raises(ValueError, match=r"`sequence_parallel` needs tokens .* 4 .* got 14"):
    jax.eval_shape(program, make_params(cfg), batch)
