"""The Ladder Transformer and its relatives: their equations, on one device and on several."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm.inspect import collective_bytes
from models import _llama_layers, ladder, ladder_decode, llama, rope
from parallel.mesh import TENSOR
from parallel.sharding import DEFAULT_RULES, mesh_specs

pytestmark = pytest.mark.usefixtures("quickly_compiled")
BASE = llama.LlamaConfig(
  vocab_size=64, hidden_size=16, num_layers=3, intermediate_size=32, num_heads=8, num_kv_heads=8,
  dtype="float32", max_seq_len=64, scan_layers=False,
)  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, 64, (2, 12)).astype(np.int32)


def variant(residual, **changes):
  fields = {f.name: getattr(BASE, f.name) for f in dataclasses.fields(BASE)}
  return ladder.LadderConfig(**fields | {"residual": residual} | changes)


def desync(every, size, **changes):
  pattern = ladder.desync_pattern(BASE.num_layers, every)
  return variant("desync", reduce_pattern=pattern, tensor_parallel_size=size, **changes)


def make_params(cfg):
  """Random numbers, also in gains."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: ladder.init(jax.random.key(0), cfg))
  return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def logits(params, cfg):
  return jax.jit(lambda p, t: ladder.apply(p, t, cfg)[0])(params, TOKENS)


def blocks(params, cfg):
  """h_0, h_1, ...: attention and feed-forward in turn, each with its norm."""
  inv_A = rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  cos_sin = rope.angles(jnp.arange(TOKENS.shape[1])[None], inv_A)
  attend, visible = _llama_layers.kernel(TOKENS.shape[1], None, cfg, None)

  def attention(w, x):
    normed = _llama_layers.rms_norm(x, w["attn_norm_D"], cfg)
    q, k, v = _llama_layers.heads(normed, w, cos_sin, cfg)
    return _llama_layers.merge_heads(attend(q, k, v, visible), w, cfg)

  def feed_forward(w, x):
    return _llama_layers.feed_forward(_llama_layers.rms_norm(x, w["mlp_norm_D"], cfg), w, cfg)

  for i in range(cfg.num_layers):
    weights = jax.tree.map(lambda p, i=i: p[i], params["layers"])
    yield functools.partial(attention, weights)
    yield functools.partial(feed_forward, weights)


def recurrence(params, cfg):
  """x_{j+1} = x_j + h_j(x_{j-1})."""
  old = new = _llama_layers.embed(params, TOKENS, cfg)
  for block in blocks(params, cfg):
    old, new = new, new + block(old)
  return _llama_layers.logits(params, new, cfg)


def two_streams(params, cfg):
  """After attention and after feed-forward, as transformers' port has it; the hybrid too."""
  a = h = _llama_layers.embed(params, TOKENS, cfg)
  steps = list(blocks(params, cfg))
  for i, kind in enumerate(cfg.kinds):
    attention, feed_forward = steps[2 * i : 2 * i + 2]
    new = h + attention(a if kind == "ladder" else h)
    a, h = new, new + feed_forward(h if kind == "ladder" else new)
  return _llama_layers.logits(params, h, cfg)


def test_three_forms_of_a_ladder_are_equal_to_the_bit():
  cfg = variant("ladder")
  params = make_params(cfg)
  got = logits(params, cfg)
  np.testing.assert_array_equal(got, jax.jit(lambda p: recurrence(p, cfg))(params))
  np.testing.assert_array_equal(got, jax.jit(lambda p: two_streams(p, cfg))(params))
  scanned = dataclasses.replace(cfg, scan_layers=True)
  np.testing.assert_allclose(logits(params, scanned), got, rtol=0, atol=1e-5)


def test_a_hybrid_between_llama_and_a_ladder():
  params, whole = make_params(variant("ladder")), variant("ladder")
  same, none = ladder.convert_to_ladder(params, BASE, 0)
  assert same is params
  want = jax.jit(lambda p: llama.apply(p, TOKENS, BASE)[0])(params)
  np.testing.assert_array_equal(logits(params, none), want)
  _, some = ladder.convert_to_ladder(params, BASE, [2])
  assert some == ladder.convert_to_ladder(params, BASE, 1)[1]
  got = logits(params, some)
  np.testing.assert_array_equal(got, jax.jit(lambda p: two_streams(p, some))(params))
  assert np.abs(got - want).max() > 1e-2
  assert ladder.convert_to_ladder(params, BASE)[1] == whole


@pytest.mark.slow
def test_without_outputs_every_variant_passes_the_embedding_on():
  for cfg in (variant("parallel"), variant("ladder"), desync(4, 2)):
    params = make_params(cfg)
    for name in ("o_HCD", "down_FD"):
      params["layers"][name] = np.zeros_like(params["layers"][name])
    x = _llama_layers.embed(params, TOKENS, cfg)
    want = _llama_layers.logits(params, x, cfg)
    np.testing.assert_allclose(logits(params, cfg), want, rtol=0, atol=1e-6)


def test_the_parallel_layer_has_one_norm_and_one_sum():
  cfg = dataclasses.replace(variant("parallel"), num_layers=1)
  params = make_params(cfg)
  assert "mlp_norm_D" not in params["layers"]
  assert jax.tree.structure(ladder.specs(cfg)) == jax.tree.structure(params)
  two = {**params["layers"], "mlp_norm_D": params["layers"]["attn_norm_D"]}

  def want(params):
    x = _llama_layers.embed(params, TOKENS, cfg)
    attention, feed_forward = blocks({**params, "layers": two}, cfg)
    return _llama_layers.logits(params, x + (attention(x) + feed_forward(x)), cfg)

  np.testing.assert_array_equal(logits(params, cfg), jax.jit(want)(params))


def as_desync(params, size):
  layers = dict(params["layers"])
  for name in ("attn_norm_D", "mlp_norm_D"):
    layers[name] = np.repeat(layers[name][:, None], size, 1)
  return {**params, "layers": layers}


@pytest.mark.slow
def test_desync_is_the_standard_model_where_all_blocks_sum():
  params = make_params(variant("standard"))
  want = logits(params, variant("standard"))
  for cfg in (desync(4, 1), desync(1, 4)):
    got = logits(as_desync(params, cfg.tensor_parallel_size), cfg)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  apart = [logits(as_desync(params, 4), desync(every, 4)) for every in (2, 4)]
  assert min(np.abs(got - want).max() for got in apart) > 1e-2
  assert np.abs(apart[0] - apart[1]).max() > 1e-2


def on_devices(cfg, size, call):
  """`call(params, tokens)` as a program that is manual over `tensor`, and its arguments."""
  mesh = jax.make_mesh((size,), (TENSOR,), (AxisType.Auto,), devices=jax.devices()[:size])
  params = make_params(cfg)
  specs = mesh_specs(ladder.specs(cfg), params, mesh, DEFAULT_RULES)
  program = jax.shard_map(
    lambda p, t: call(p, t, cfg), mesh=mesh, in_specs=(specs, jax.P()),
    out_specs=jax.P(None, None, TENSOR),
  )  # fmt: skip
  placed = jax.tree.map(lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), params, specs)
  tokens = jax.device_put(TOKENS, jax.NamedSharding(mesh, jax.P()))
  return jax.jit(program), (placed, tokens), mesh, params


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("residual", ["standard", "ladder", "parallel", "desync"])
def test_several_devices_compute_what_one_does(residual, size):
  cfg = desync(4, size) if residual == "desync" else variant(residual, scan_layers=size == 2)
  run, args, _, params = on_devices(cfg, size, lambda p, t, cfg: ladder.apply(p, t, cfg)[0])
  np.testing.assert_allclose(run(*args), logits(params, cfg), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_programs_send_the_bytes_of_the_formula(scan):
  for cfg in (variant("ladder", scan_layers=scan), variant("parallel", scan_layers=scan)):
    run, args, mesh, _ = on_devices(cfg, 4, lambda p, t, cfg: ladder.apply(p, t, cfg)[0])
    apart = {"xla_disable_hlo_passes": "cpu-all-reduce-combiner"}
    compiled = run.lower(*args).compile(compiler_options=apart)
    each = 2 * 3 / 4 * TOKENS.size * cfg.hidden_size * 4
    want = ladder.tensor_bytes(cfg, *TOKENS.shape, 4) + each * (1 + scan)  # the embedding; zeros
    assert collective_bytes(compiled, mesh).by_axis == {TENSOR: want}
    count = ladder.num_all_reduces(cfg)
    in_loop = 2 if cfg.residual == "ladder" else 1
    assert compiled.as_text().count(" all-reduce(") == (in_loop + 2 if scan else count + 1)


@pytest.mark.slow
def test_gradients_are_those_of_the_recurrence():
  cfg = variant("ladder", scan_layers=True, remat="dots")
  params, targets = make_params(cfg), np.roll(TOKENS, -1, 1)
  batch = {"tokens": TOKENS, "targets": targets}

  def want(params):
    return ladder.losses.cross_entropy(recurrence(params, cfg), targets)[0]

  got = jax.jit(jax.grad(lambda p: ladder.loss(p, batch, cfg)[0]))(params)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5),
    got,
    jax.jit(jax.grad(want))(params),
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: variant("ladder", ladder_layers=4), r"`ladder_layers` must be in \[0, 3\], got 4"),
    (lambda: variant("ladder", ladder_layers=[1, 1]), "none twice"),
    (lambda: variant("ladder", ladder_layers=[-1]), "must be indices in"),
    (lambda: variant("parallel", ladder_layers=1), "`ladder_layers` is for `residual` 'ladder'"),
    (lambda: variant("none"), "`residual` must be one of"),
    (lambda: variant("ladder", tensor_parallel_size=2), "is for `residual` 'desync'"),
    (lambda: variant("desync"), "`reduce_pattern` must have a pair for each of the 3 layers"),
    (lambda: desync(2, 3), "`num_heads` must be divisible by `tensor_parallel_size` = 3, got 8"),
    (lambda: ladder.desync_pattern(2, 3), "`every` must be 1 or even, got 3"),
    (
      lambda: variant("desync", reduce_pattern=((True, False),) * 3),
      "must sum the last feed-forward",
    ),
    (lambda: variant("ladder", sequence_parallel=True), "`sequence_parallel` must be False"),
    (
      lambda: ladder.apply(make_params(desync(2, 4)), TOKENS, desync(2, 2)),
      "`tensor_parallel_size` is part of a desync model: `params` have 4, got 2",
    ),
    (
      lambda: ladder.convert_to_ladder(make_params(variant("parallel")), BASE),
      "`params` must have two norms a layer",
    ),
  ],
)
def test_bad_input(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_cached_decode_is_the_full_forward(scan):
  """Of a hybrid: a prompt of 7 tokens, then one at a time."""
  cfg = variant("ladder", ladder_layers=2, scan_layers=scan)
  params = make_params(cfg)
  want = logits(params, cfg)
  step = jax.jit(lambda p, t, cache: ladder_decode.decode(p, t, cache, cfg))
  got, cache = step(params, TOKENS[:, :7], ladder_decode.init_cache(cfg, *TOKENS.shape))
  found = [got]
  for i in range(7, TOKENS.shape[1]):
    got, cache = step(params, TOKENS[:, i : i + 1], cache)
    found.append(got)
  np.testing.assert_allclose(np.concatenate(found, 1), want, rtol=0, atol=1e-5)
