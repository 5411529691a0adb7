"""The computation of Llama: embedding, layers, output. Letters as in `models.llama`.

Weights may be whole, the compiler's to cut, or this device's part of a manual axis `tensor`
(`parallel.tensor_parallel`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import _attention, rope
from models._llama_config import LlamaConfig
from parallel.context import ContextParallel
from parallel.sharding import gather_fsdp, shard_batch
from parallel.tensor_parallel import (
  cut_by_compiler,
  from_rows,
  lookup,
  own_heads,
  to_columns,
  vary_beyond_tensor,
)

Partition = Callable[[Callable[..., Any]], Callable[..., Any]]
Attend = Callable[..., jax.Array]


def forward(
  params, tokens_BS, positions, segment_ids, cfg: LlamaConfig, partition: Partition, context
):
  """Logits [B, S, V]; manual over `tensor` those of this device's part of V."""
  if positions is None:
    places_S = jnp.arange(tokens_BS.shape[1]) if context is None else context.positions(tokens_BS)
    positions = places_S[None]
  inv_A = rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  cos_sin = rope.angles(positions, inv_A)
  attend, visible = kernel(tokens_BS.shape[1], segment_ids, cfg, context)

  embedding, output = (partition(functools.partial(fn, cfg=cfg)) for fn in (embed, logits))
  run_layer = partition(functools.partial(layer, cfg=cfg, attend=attend))

  def body(x_BSD, weights):
    return shard_batch(run_layer(weights, x_BSD, cos_sin, visible)), None

  if cfg.remat != "none":
    body = jax.checkpoint(body, policy=_REMAT_POLICY[cfg.remat], prevent_cse=False)
  x_BSD = embedding({"embed_VD": params["embed_VD"]}, tokens_BS)
  x_BSD = shard_batch(vary_beyond_tensor(x_BSD, (params, cos_sin, visible)))
  if cfg.scan_layers:
    x_BSD, _ = jax.lax.scan(body, x_BSD, params["layers"])
  else:
    for i in range(cfg.num_layers):
      x_BSD, _ = body(x_BSD, jax.tree.map(lambda p, i=i: p[i], params["layers"]))
  head = "embed_VD" if cfg.tie_embeddings else "head_DV"
  return output({name: params[name] for name in ("final_norm_D", head)}, x_BSD)


_REMAT_POLICY = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def kernel(seq_len, segment_ids, cfg: LlamaConfig, context: ContextParallel | None):
  """`attend(q, k, v, visible)`, and `visible`: segment ids, a mask, or None, as it takes them."""
  if context is not None:
    return context.attention, segment_ids
  packed = segment_ids is not None
  match _attention.choose(cfg.attention, cfg.dtype, cfg.head_size, seq_len=seq_len, packed=packed):
    case "cudnn":
      return lambda q, k, v, _: _attention.cudnn_attention(q, k, v), None
    case "splash":
      from models._splash_attention import splash_attention  # takes a second to import

      return splash_attention, segment_ids
  return _attention.attention, _attention.causal_mask(seq_len, segment_ids)


def embed(params, tokens_BS, cfg: LlamaConfig):
  table_VD = gather_fsdp(params["embed_VD"].astype(cfg.dtype), 1)
  return from_rows(lookup(table_VD, tokens_BS), table_VD, over_tokens=cfg.sequence_parallel)


def layer(weights, x_BSD, cos_sin, visible, cfg: LlamaConfig, attend: Attend):
  weights = with_own_heads(jax.tree.map(lambda p: p.astype(cfg.dtype), weights), x_BSD)
  q_BSHC, k_BSKC, v_BSKC = heads(
    rms_norm(x_BSD, weights["attn_norm_D"], cfg), weights, cos_sin, cfg
  )
  x_BSD = x_BSD + merge_heads(attend(q_BSHC, k_BSKC, v_BSKC, visible), weights, cfg)
  return x_BSD + feed_forward(rms_norm(x_BSD, weights["mlp_norm_D"], cfg), weights, cfg)


def with_own_heads(weights, x_BSD):
  """`weights`, key/value heads repeated where `tensor` has more devices than there are."""
  names = ("k_DKC", "v_DKC", "k_bias_KC", "v_bias_KC")
  queries = weights["q_DHC"]
  own = {n: own_heads(weights[n], x_BSD, queries) for n in names if n in weights}
  return weights | own


def heads(x_BSD, weights, cos_sin, cfg: LlamaConfig):
  """Queries, keys and values, the first two turned to their positions."""
  x_BSD = to_columns(x_BSD, weights["q_DHC"], over_tokens=cfg.sequence_parallel)
  if cut_by_compiler(x_BSD):
    q_BSHC, k_BSKC, v_BSKC = _joined_heads(x_BSD, weights)
  else:
    q_BSHC = jnp.einsum("bsd,dhc->bshc", x_BSD, weights["q_DHC"])
    k_BSKC = jnp.einsum("bsd,dkc->bskc", x_BSD, weights["k_DKC"])
    v_BSKC = jnp.einsum("bsd,dkc->bskc", x_BSD, weights["v_DKC"])
  if cfg.attention_bias:
    q_BSHC = q_BSHC + weights["q_bias_HC"][None, None]
    k_BSKC = k_BSKC + weights["k_bias_KC"][None, None]
    v_BSKC = v_BSKC + weights["v_bias_KC"][None, None]
  return rope.rotate(q_BSHC, *cos_sin), rope.rotate(k_BSKC, *cos_sin), v_BSKC


def _joined_heads(x_BSD, weights):
  """One product: of three the compiler would sum three gradients of `x` over `tensor`, not one.

  The R queries of a key/value head lie beside its key and its value, so that the cut along K stays.
  """
  q_DHC, k_DKC, v_DKC = (weights[name] for name in ("q_DHC", "k_DKC", "v_DKC"))
  D, K, C = k_DKC.shape
  groups = (q_DHC.reshape(D, K, -1, C), k_DKC[:, :, None], v_DKC[:, :, None])
  y_BSKGC = jnp.einsum("bsd,dkgc->bskgc", x_BSD, jnp.concatenate(groups, 2))
  q_BSHC = y_BSKGC[:, :, :, :-2].reshape(*x_BSD.shape[:2], -1, C)
  return q_BSHC, y_BSKGC[:, :, :, -2], y_BSKGC[:, :, :, -1]


def merge_heads(y_BSHC, weights, cfg: LlamaConfig):
  y_BSD = jnp.einsum("bshc,hcd->bsd", y_BSHC, weights["o_HCD"])
  y_BSD = from_rows(y_BSD, weights["o_HCD"], over_tokens=cfg.sequence_parallel)
  return y_BSD + weights["o_bias_D"][None, None] if cfg.attention_bias else y_BSD


def feed_forward(x_BSD, weights, cfg: LlamaConfig):
  x_BSD = to_columns(x_BSD, weights["gate_DF"], over_tokens=cfg.sequence_parallel)
  inner = _joined_inner if cut_by_compiler(x_BSD) else _inner
  y_BSD = from_rows(
    inner(x_BSD, weights, cfg), weights["down_FD"], over_tokens=cfg.sequence_parallel
  )
  return y_BSD + weights["down_bias_D"][None, None] if cfg.mlp_bias else y_BSD


def _inner(x_BSD, weights, cfg: LlamaConfig):
  x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])  # T = B S tokens: twice as fast as 3D on CPU
  gate_TF = x_TD @ weights["gate_DF"]
  up_TF = x_TD @ weights["up_DF"]
  if cfg.mlp_bias:
    gate_TF = gate_TF + weights["gate_bias_F"][None]
    up_TF = up_TF + weights["up_bias_F"][None]
  y_TD = (jax.nn.silu(gate_TF) * up_TF) @ weights["down_FD"]
  return y_TD.reshape(x_BSD.shape)


def _joined_inner(x_BSD, weights, cfg: LlamaConfig):
  """`_inner` with one product, as `_joined_heads`, and tokens that may be cut over `seq`."""
  joined_DGF = jnp.stack((weights["gate_DF"], weights["up_DF"]), 1)
  y_BSGF = jnp.einsum("bsd,dgf->bsgf", x_BSD, joined_DGF)
  if cfg.mlp_bias:
    y_BSGF = y_BSGF + jnp.stack((weights["gate_bias_F"], weights["up_bias_F"]))[None, None]
  y_BSF = jax.nn.silu(y_BSGF[:, :, 0]) * y_BSGF[:, :, 1]
  return jnp.einsum("bsf,fd->bsd", y_BSF, weights["down_FD"])


def rms_norm(x_BSD, gain_D, cfg: LlamaConfig):
  x32_BSD = x_BSD.astype(jnp.float32)
  scale_BS1 = jax.lax.rsqrt(jnp.square(x32_BSD).mean(-1, keepdims=True) + cfg.rms_norm_eps)
  # Cast before the gain, as the published weights were trained.
  return (x32_BSD * scale_BS1).astype(x_BSD.dtype) * gain_D[None, None].astype(x_BSD.dtype)


def logits(params, x_BSD, cfg: LlamaConfig):
  x_BSD = rms_norm(x_BSD, params["final_norm_D"], cfg)
  head_DV = params["embed_VD"].T if cfg.tie_embeddings else params["head_DV"]
  x_BSD = to_columns(x_BSD, head_DV, over_tokens=cfg.sequence_parallel)
  return jnp.matmul(x_BSD, head_DV.astype(cfg.dtype), preferred_element_type=jnp.float32)
