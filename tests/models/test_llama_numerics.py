"""The model against an independent float64 implementation that loops over everything."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import llama

BASE = llama.LlamaConfig(
  vocab_size=61,
  hidden_size=32,
  num_layers=2,
  intermediate_size=48,
  num_heads=4,
  num_kv_heads=2,
  rope_theta=10_000.0,
  dtype="float32",
)
SCALING = llama.Llama3RopeScaling(factor=8.0, original_max_position=64)
CONFIGS = {
  "gqa": {},
  "mha": {"num_kv_heads": 4},
  "mqa": {"num_kv_heads": 1},
  "tied": {"tie_embeddings": True},
  "biases": {"attention_bias": True, "mlp_bias": True},
  "wide_heads": {"head_dim": 20},
  "llama3_rope": {"rope_scaling": SCALING},
  "large_eps": {"rms_norm_eps": 0.1},
}


def reference_frequency(i, width, theta, scaling):
  inv = theta ** (-2 * i / width)
  if scaling is None:
    return inv
  wavelength = 2 * np.pi / inv
  old, low, high = scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor
  if wavelength < old / high:
    return inv
  if wavelength > old / low:
    return inv / scaling.factor
  s = (old / wavelength - low) / (high - low)
  return (1 - s) * inv / scaling.factor + s * inv


def reference_rope(x_C, position, cfg):
  half = len(x_C) // 2
  pairs = x_C[:half] + 1j * x_C[half:]
  for i in range(half):
    angle = position * reference_frequency(i, len(x_C), cfg.rope_theta, cfg.rope_scaling)
    pairs[i] *= np.exp(1j * angle)
  return np.concatenate([pairs.real, pairs.imag])


def reference_norm(x_D, gain_D, cfg):
  return gain_D * x_D / np.sqrt(np.mean(x_D**2) + cfg.rms_norm_eps)


def reference_attention(h_SD, p, cfg, positions_S, segments_S):
  width, group = cfg.head_size, cfg.num_heads // cfg.num_kv_heads
  out_SD = np.zeros_like(h_SD)
  for head in range(cfg.num_heads):
    kv = head // group
    q_SC = h_SD @ p["q_DHC"][:, head] + p.get("q_bias_HC", np.zeros((cfg.num_heads, 1)))[head]
    k_SC = h_SD @ p["k_DKC"][:, kv] + p.get("k_bias_KC", np.zeros((cfg.num_kv_heads, 1)))[kv]
    v_SC = h_SD @ p["v_DKC"][:, kv] + p.get("v_bias_KC", np.zeros((cfg.num_kv_heads, 1)))[kv]
    for s in range(len(h_SD)):
      q_C = reference_rope(q_SC[s], positions_S[s], cfg)
      seen = [t for t in range(s + 1) if segments_S[t] == segments_S[s]]
      score = [q_C @ reference_rope(k_SC[t], positions_S[t], cfg) / np.sqrt(width) for t in seen]
      weight = np.exp(score - np.max(score))
      mixed_C = weight / weight.sum() @ v_SC[seen]
      out_SD[s] += mixed_C @ p["o_HCD"][head]
  return out_SD + p.get("o_bias_D", 0.0)


def reference_logits(params, tokens_BS, cfg, positions_BS=None, segments_BS=None):
  head_DV = params["embed_VD"].T if cfg.tie_embeddings else params["head_DV"]
  rows = []
  for b, tokens_S in enumerate(tokens_BS):
    positions_S = np.arange(len(tokens_S)) if positions_BS is None else positions_BS[b]
    segments_S = np.zeros(len(tokens_S)) if segments_BS is None else segments_BS[b]
    x_SD = params["embed_VD"][tokens_S]
    for i in range(cfg.num_layers):
      p = {name: leaf[i] for name, leaf in params["layers"].items()}
      h_SD = np.stack([reference_norm(x_D, p["attn_norm_D"], cfg) for x_D in x_SD])
      x_SD = x_SD + reference_attention(h_SD, p, cfg, positions_S, segments_S)
      h_SD = np.stack([reference_norm(x_D, p["mlp_norm_D"], cfg) for x_D in x_SD])
      gate_SF = h_SD @ p["gate_DF"] + p.get("gate_bias_F", 0.0)
      up_SF = h_SD @ p["up_DF"] + p.get("up_bias_F", 0.0)
      x_SD = x_SD + (gate_SF / (1 + np.exp(-gate_SF)) * up_SF) @ p["down_FD"]
      x_SD = x_SD + p.get("down_bias_D", 0.0)
    final_SD = np.stack([reference_norm(x_D, params["final_norm_D"], cfg) for x_D in x_SD])
    rows.append(final_SD @ head_DV)
  return np.stack(rows)


def reference_loss(params, batch, cfg):
  logits = reference_logits(params, batch["tokens"], cfg, batch["positions"], batch["segment_ids"])
  total, count = 0.0, 0.0
  for index in np.ndindex(batch["tokens"].shape):
    nll = np.log(np.exp(logits[index]).sum()) - logits[index][batch["targets"][index]]
    total += nll * batch["loss_mask"][index]
    count += batch["loss_mask"][index]
  return total / count


def random_params(cfg, seed=0):
  """Every leaf far from its initial value, so that gains and biases matter."""
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def packed_batch(cfg, seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, cfg.vocab_size, (2, 9)).astype(np.int32)
  return {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, 1),
    "segment_ids": np.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2], np.int32),
    "positions": np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 0, 1]], np.int32),
    "loss_mask": np.array([[1, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 6 + [0, 1, 0]], np.float32),
  }


def in_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_match_the_reference(name):
  cfg = dataclasses.replace(BASE, **CONFIGS[name])
  params = random_params(cfg)
  tokens = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 40)).astype(np.int32)
  logits, aux = jax.jit(lambda p, t: llama.apply(p, t, cfg))(params, tokens)
  want = reference_logits(in_float64(params), tokens, cfg)
  assert logits.dtype == jnp.float32
  assert aux == {}
  assert np.abs(want).max() > 1  # the comparison below says something
  np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gqa", "biases"])
def test_packed_loss_and_gradient_match_the_reference(name):
  cfg = dataclasses.replace(BASE, **CONFIGS[name])
  params, batch = random_params(cfg), packed_batch(cfg)
  value_and_grad = jax.value_and_grad(lambda p: llama.loss(p, batch, cfg), has_aux=True)
  (value, aux), grads = jax.jit(value_and_grad)(params)
  exact = in_float64(params)
  np.testing.assert_allclose(value, reference_loss(exact, batch, cfg), rtol=1e-5)
  assert aux["tokens"] == batch["loss_mask"].sum()

  direction = in_float64(random_params(cfg, seed=7))
  ahead = jax.tree.map(lambda p, d: p + 1e-4 * d, exact, direction)
  behind = jax.tree.map(lambda p, d: p - 1e-4 * d, exact, direction)
  slope = (reference_loss(ahead, batch, cfg) - reference_loss(behind, batch, cfg)) / 2e-4
  got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.vdot(g, d), grads, direction)))
  np.testing.assert_allclose(got, slope, rtol=1e-4)
