import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import llama

CFG = dataclasses.replace(llama.nano(), vocab_size=97, intermediate_size=96)


def make_params(cfg=CFG, seed=0):
  """Compiled once for all `cfg` that differ only in what `apply` does."""
  cfg = dataclasses.replace(cfg, dtype="float32", remat="none", scan_layers=False)
  return jax.jit(llama.init, static_argnums=1)(jax.random.key(seed), cfg)


def make_batch(cfg=CFG, shape=(4, 16), seed=0):
  stream = np.random.default_rng(seed).integers(0, cfg.vocab_size, (shape[0], shape[1] + 1))
  return {"tokens": stream[:, :-1].astype(np.int32), "targets": stream[:, 1:].astype(np.int32)}


@functools.partial(jax.jit, static_argnums=2)
def loss_and_grads(params, batch, cfg):
  step = jax.value_and_grad(lambda p: llama.loss(p, batch, cfg), has_aux=True)
  (value, _), grads = step(params)
  return value, grads


@functools.partial(jax.jit, static_argnums=2)
def loss_of(params, batch, cfg):
  return llama.loss(params, batch, cfg)


@functools.partial(jax.jit, static_argnums=2)
def logits_of(params, tokens, cfg=CFG, **kwargs):
  return llama.apply(params, tokens, cfg, **kwargs)[0]


def assert_trees_close(got, want, atol):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


# ---- init, specs, counts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_specs_have_the_structure_and_rank_of_the_parameters(bias, tied):
  cfg = dataclasses.replace(CFG, attention_bias=bias, mlp_bias=bias, tie_embeddings=tied)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  specs = llama.specs(cfg)
  assert jax.tree.structure(specs) == jax.tree.structure(shapes)
  jax.tree.map(lambda spec, leaf: np.testing.assert_equal(len(spec), leaf.ndim), specs, shapes)
  assert llama.num_params(cfg) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  ("preset", "count"),
  [
    (llama.llama3_2_1b, 1_235_814_400),
    (llama.llama3_2_3b, 3_212_749_824),
    (llama.llama3_8b, 8_030_261_248),
    (llama.llama3_70b, 70_553_706_496),
    (llama.llama3_405b, 405_853_388_800),
  ],
)
def test_published_sizes(preset, count):
  cfg = preset()
  D, L, C = cfg.hidden_size, cfg.num_layers, cfg.head_size
  layer = 2 * D * cfg.num_heads * C + 2 * D * cfg.num_kv_heads * C
  layer += 3 * D * cfg.intermediate_size + 2 * D
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
  assert cfg.vocab_size * D * (1 if cfg.tie_embeddings else 2) + L * layer + D == count
  assert llama.num_params(cfg) == count


def test_flops_follow_the_closed_form():
  cfg = llama.llama3_8b()
  inner = 8_030_261_248 - 2 * 128_256 * 4096
  want = 6 * inner + 6 * 4096 * 128_256 + 12 * 32 * 2048 * 32 * 128 / 2
  assert llama.flops_per_token(cfg, 2048) == want


def test_small_presets_are_small():
  assert llama.num_params(llama.tiny()) <= 1_000_000
  assert llama.num_params(llama.nano()) <= 150_000


DEEP = dataclasses.replace(CFG, num_layers=8)


@pytest.mark.slow
def test_init_statistics_and_dtypes():
  params = make_params(DEEP)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  layers = params["layers"]
  assert np.std(layers["q_DHC"]) == pytest.approx(0.02, rel=0.02)
  assert np.std(layers["o_HCD"]) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
  assert np.std(layers["down_FD"]) == pytest.approx(0.02 / math.sqrt(16), rel=0.02)
  for gain in (layers["attn_norm_D"], layers["mlp_norm_D"], params["final_norm_D"]):
    np.testing.assert_array_equal(gain, 1.0)
  flat = [np.ravel(leaf)[:64] for leaf in jax.tree.leaves(params) if np.std(leaf) > 0]
  normed = np.stack([x / x.std() for x in flat])
  assert np.abs(np.triu(np.corrcoef(normed), 1)).max() < 0.7  # no two leaves share draws


@pytest.mark.slow
def test_draws_of_a_layer_do_not_depend_on_depth():
  few, many = make_params(), make_params(DEEP)
  np.testing.assert_array_equal(few["embed_VD"], many["embed_VD"])
  for name in ("q_DHC", "gate_DF"):
    np.testing.assert_array_equal(few["layers"][name], many["layers"][name][:2])
  np.testing.assert_allclose(
    few["layers"]["o_HCD"] * math.sqrt(4), many["layers"]["o_HCD"][:2] * math.sqrt(16), rtol=1e-5
  )
  assert not np.array_equal(few["layers"]["q_DHC"][0], few["layers"]["q_DHC"][1])
  assert not np.array_equal(few["layers"]["q_DHC"], make_params(seed=1)["layers"]["q_DHC"])


def test_param_dtype():
  cfg = dataclasses.replace(CFG, param_dtype="bfloat16")
  params = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


# ---- numerics


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_initial_loss_is_that_of_a_uniform_guess(tied):
  cfg = dataclasses.replace(CFG, tie_embeddings=tied)
  value, _ = loss_of(make_params(cfg), make_batch(cfg, (8, 64)), cfg)
  assert abs(value - math.log(cfg.vocab_size)) < 0.1


def test_scanned_and_unrolled_layers_agree():
  params, batch = make_params(), make_batch()
  scanned = loss_and_grads(params, batch, dataclasses.replace(CFG, scan_layers=True))
  unrolled = loss_and_grads(params, batch, dataclasses.replace(CFG, scan_layers=False))
  assert_trees_close(scanned, unrolled, 1e-6)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_no_value(remat, scan):
  cfg = dataclasses.replace(CFG, scan_layers=scan)
  params, batch = make_params(), make_batch()
  plain = loss_and_grads(params, batch, cfg)
  recomputed = loss_and_grads(params, batch, dataclasses.replace(cfg, remat=remat))
  np.testing.assert_array_equal(recomputed[0], plain[0])
  assert_trees_close(recomputed[1], plain[1], 1e-6)


@pytest.mark.slow
def test_remat_saves_memory():
  def temp_bytes(remat):
    cfg = dataclasses.replace(DEEP, remat=remat, scan_layers=True)
    shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
    step = jax.jit(jax.grad(lambda p, b: llama.loss(p, b, cfg)[0]))
    compiled = step.lower(shapes, make_batch(shape=(16, 64))).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  none, dots, full = map(temp_bytes, ("none", "dots", "full"))
  assert full < dots < none


def test_a_later_token_changes_no_earlier_logit():
  params, tokens = make_params(), make_batch()["tokens"]
  changed = tokens.copy()
  changed[:, 9] = (changed[:, 9] + 1) % CFG.vocab_size
  before, after = logits_of(params, tokens), logits_of(params, changed)
  np.testing.assert_array_equal(before[:, :9], after[:, :9])
  assert np.abs(before[:, 9:] - after[:, 9:]).max(-1).min() > 1e-6  # and reaches all later ones


def test_packed_documents_equal_separate_ones():
  params = make_params(seed=3)
  first, second = make_batch(shape=(2, 7))["tokens"], make_batch(shape=(2, 9), seed=1)["tokens"]
  packed = logits_of(
    params,
    np.concatenate([first, second], 1),
    segment_ids=jnp.asarray([[1] * 7 + [2] * 9] * 2),
    positions=jnp.asarray([[*range(7), *range(9)]] * 2),
  )
  np.testing.assert_allclose(packed[:, :7], logits_of(params, first), rtol=0, atol=1e-5)
  np.testing.assert_allclose(packed[:, 7:], logits_of(params, second), rtol=0, atol=1e-5)


def test_default_positions_and_segments():
  params, tokens = make_params(), make_batch()["tokens"]
  explicit = logits_of(
    params,
    tokens,
    positions=jnp.tile(jnp.arange(16)[None], (4, 1)),
    segment_ids=jnp.ones((4, 16), jnp.int32),
  )
  np.testing.assert_allclose(logits_of(params, tokens), explicit, rtol=0, atol=1e-6)


def test_loss_equals_cross_entropy_of_the_logits():
  params, batch = make_params(), make_batch()
  log_p = jax.nn.log_softmax(logits_of(params, batch["tokens"]))
  want = -np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1).mean()
  value, aux = loss_of(params, batch, CFG)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert set(aux) == {"loss", "tokens"}
  assert aux["tokens"] == 64


# ---- dtype policy


def test_bfloat16_policy():
  cfg = dataclasses.replace(CFG, dtype="bfloat16")
  params, batch = make_params(), make_batch()
  value, grads = loss_and_grads(params, batch, cfg)
  assert value.dtype == jnp.float32
  assert logits_of(params, batch["tokens"], cfg).dtype == jnp.float32
  assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  exact, exact_grads = loss_and_grads(params, batch, CFG)
  assert abs(value - exact) < 1e-2
  error = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), grads, exact_grads)
  assert max(jax.tree.leaves(error)) < 0.05

  text = jax.jit(lambda p, t: llama.apply(p, t, cfg)).lower(params, batch["tokens"]).as_text()
  operands = re.findall(r"dot_general.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\)", text)
  assert len(operands) == text.count("stablehlo.dot_general")
  assert {dtype for pair in operands for dtype in pair} == {"bf16"}
  found = re.findall(r"stablehlo\.(exponential|rsqrt|cosine|sine) .*tensor<(?:\d+x)*(\w+)>", text)
  assert {name for name, dtype in found if dtype == "bf16"} == {"exponential"}  # SiLU's, only
  in_bf16 = re.findall(r"exponential .*tensor<(.*)xbf16>", text)
  assert set(in_bf16) == {"64x96"}


# ---- transformations


def test_learns_a_batch_with_donated_state():
  batch = make_batch()

  def step(params):
    (value, _), grads = jax.value_and_grad(lambda p: llama.loss(p, batch, CFG), has_aux=True)(
      params
    )
    return jax.tree.map(lambda p, g: p - 1.0 * g, params, grads), value

  step = jax.jit(step, donate_argnums=0)
  params, first = step(make_params())
  for _ in range(60):
    params, last = step(params)
  assert last < first - 1.0
  assert step._cache_size() == 1


@pytest.mark.slow
def test_replicas_stacked_by_vmap_equal_separate_ones():
  replicas = [make_params(seed=i) for i in range(2)]
  stacked = jax.tree.map(lambda *x: np.stack(x), *replicas)
  batches = [make_batch(seed=i) for i in range(2)]
  batch = jax.tree.map(lambda *x: np.stack(x), *batches)
  for scan in (False, True):
    cfg = dataclasses.replace(CFG, scan_layers=scan)
    grad = jax.value_and_grad(lambda p, b, cfg=cfg: llama.loss(p, b, cfg)[0])
    got = jax.device_get(jax.jit(jax.vmap(grad, axis_name="replica"))(stacked, batch))
    for i in range(2):
      want = loss_and_grads(replicas[i], batches[i], cfg)
      assert_trees_close(jax.tree.map(lambda x, i=i: x[i], got), want, 1e-5)


# ---- bad input


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"hidden_size": 0}, "`hidden_size` must be positive, got 0"),
    ({"num_layers": -1}, "`num_layers` must be positive, got -1"),
    ({"num_kv_heads": 3}, "`num_kv_heads` must divide `num_heads` = 4, got 3"),
    ({"hidden_size": 66}, "`num_heads` must divide `hidden_size` = 66"),
    ({"head_dim": 7}, "`head_dim` must be even for RoPE, got 7"),
    ({"rope_theta": math.inf}, "`rope_theta` must be positive"),
    ({"dtype": "float16"}, "`dtype` must be one of .* got 'float16'"),
    ({"param_dtype": "int8"}, "`param_dtype` must be one of"),
    ({"remat": "some"}, "`remat` must be one of .* got 'some'"),
  ],
)
def test_rejects_bad_config(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CFG, **change)


@pytest.mark.parametrize(
  ("batch", "message"),
  [
    ({"tokens": jnp.zeros((2, 4), int)}, r"`batch` must have .* missing \['targets'\]"),
    ({"labels": jnp.zeros((2, 4), int)}, r"unknown \['labels'\]"),
    ({"tokens": jnp.zeros((2, 4))}, r"`tokens` must be integers \[B, S\], got float32\[2, 4\]"),
    ({"tokens": jnp.zeros(4, int)}, r"`tokens` must be integers \[B, S\], got int32\[4\]"),
    ({"tokens": jnp.zeros((1, 4096), int)}, "`tokens` must not be longer .* 2048, got 4096"),
    ({"positions": jnp.zeros((1, 4), int)}, r"`positions` must have the shape .*got \(1, 4\)"),
    ({"segment_ids": jnp.zeros((2, 5), int)}, "`segment_ids` must have the shape"),
    ({"targets": jnp.zeros((2, 5), int)}, "`targets` must have the shape"),
    ({"targets": jnp.zeros((2, 4))}, "`targets` must be integers, got float32"),
    ({"loss_mask": jnp.ones((2, 1))}, "`loss_mask` must have shape"),
  ],
)
def test_rejects_bad_batch(batch, message):
  good = {"tokens": jnp.zeros((2, 4), int), "targets": jnp.zeros((2, 4), int)}
  full = batch if set(batch) == {"tokens"} and "missing" in message else good | batch
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), CFG))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda p: llama.loss(p, full, CFG), shapes)
