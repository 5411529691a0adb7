"""Llama with a cache of keys and values: a few more tokens for each row, at the cost of those.

Letters as in `models.llama`; T is the room of the cache in tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import _attention, _llama_layers, llama, rope
from parallel.sharding import call_with_auto_axes


class KVCache(NamedTuple):
  """Keys, turned to their positions, and values of the tokens so far.

  Attributes:
    keys: [L, B, T, K, C] in `cfg.dtype`; those from `length` on mean nothing.
    values: likewise.
    length: int32[B], tokens of each row.
  """

  keys: jax.Array
  values: jax.Array
  length: jax.Array


def init_cache(cfg: llama.LlamaConfig, batch_size: int, max_tokens: int) -> KVCache:
  """An empty cache: `2 L B T K C` numbers of `cfg.dtype`.

  Raises:
    ValueError: a size is below 1, or `max_tokens` exceeds `cfg.max_seq_len`.

  Example:
    >>> init_cache(llama.nano(), 3, 10).keys.shape
    (2, 3, 10, 2, 16)
  """
  if batch_size < 1:
    raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
  if not 1 <= max_tokens <= cfg.max_seq_len:
    raise ValueError(
      f"`max_tokens` must be between 1 and `max_seq_len` = {cfg.max_seq_len}, got {max_tokens}."
    )
  shape = (cfg.num_layers, batch_size, max_tokens, cfg.num_kv_heads, cfg.head_size)
  k, v = jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)
  return KVCache(k, v, jnp.zeros(batch_size, jnp.int32))


def decode(
  params: llama.Params,
  tokens_BS: jax.Array,
  cache: KVCache,
  cfg: llama.LlamaConfig,
  *,
  num_tokens_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
  """Next-token logits after each of S more tokens, as of `apply` on all tokens so far.

  With many tokens and an empty cache this reads prompts, with one it is a step of generation.
  Donate the cache: it is then changed in place. Attention is plain XLA's, which for few queries is
  as fast as a kernel.

  Args:
    params: from `init`.
    tokens_BS: int ids in [0, V), the next tokens of each row.
    cache: from `init_cache` or the last call.
    cfg: the config of `params`.
    num_tokens_B: int32[B], how many of the S tokens of each row count, the first ones; the logits
      of the others mean nothing. Default all.

  Returns:
    (float32[B, S, V] logits, cache). Logits of tokens for which the cache has no room are NaN.

  Raises:
    ValueError: an argument has the wrong shape or dtype.

  Example:
    >>> cfg = llama.nano()
    >>> params = llama.init(jax.random.key(0), cfg)
    >>> tokens = jnp.arange(6)[None]
    >>> _, cache = decode(params, tokens[:, :5], init_cache(cfg, 1, 8), cfg)
    >>> logits, cache = decode(params, tokens[:, 5:], cache, cfg)
    >>> bool(jnp.allclose(logits[0, 0], llama.apply(params, tokens, cfg)[0][0, 5], atol=1e-5))
    True
  """
  _check(tokens_BS, cache, cfg, num_tokens_B)
  if num_tokens_B is None:
    num_tokens_B = jnp.full(tokens_BS.shape[:1], tokens_BS.shape[1], jnp.int32)
  forward = functools.partial(_forward, cfg=cfg)
  return call_with_auto_axes(forward, params, tokens_BS, cache, num_tokens_B, out_spec=jax.P())


def _forward(params, tokens_BS, cache: KVCache, num_tokens_B, cfg: llama.LlamaConfig):
  room = cache.keys.shape[2]
  position_BS = cache.length[:, None] + jnp.arange(tokens_BS.shape[1])[None]
  inv_A = rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  cos_sin = rope.angles(position_BS, inv_A)
  mask = jnp.arange(room)[None, None] <= position_BS[:, :, None]

  def body(x_BSD, layer_and_cache):
    layer, k_BTKC, v_BTKC = layer_and_cache
    layer = jax.tree.map(lambda p: p.astype(cfg.dtype), layer)
    normed = _llama_layers.rms_norm(x_BSD, layer["attn_norm_D"], cfg)
    q_BSHC, k_BSKC, v_BSKC = _llama_layers.heads(normed, layer, cos_sin, cfg)
    k_BTKC, v_BTKC = _write(k_BTKC, k_BSKC, position_BS), _write(v_BTKC, v_BSKC, position_BS)
    y_BSHC = _attention.attention(q_BSHC, k_BTKC, v_BTKC, mask[:, None, None])
    x_BSD = x_BSD + _llama_layers.merge_heads(y_BSHC, layer, cfg)
    normed = _llama_layers.rms_norm(x_BSD, layer["mlp_norm_D"], cfg)
    return x_BSD + _llama_layers.feed_forward(normed, layer, cfg), (k_BTKC, v_BTKC)

  x_BSD = _llama_layers.embed(params, tokens_BS, cfg)
  x_BSD, (k, v) = jax.lax.scan(body, x_BSD, (params["layers"], cache.keys, cache.values))
  logits_BSV = _llama_layers.logits(params, x_BSD, cfg)
  logits_BSV = jnp.where((position_BS < room)[:, :, None], logits_BSV, jnp.nan)
  return logits_BSV, KVCache(k, v, cache.length + num_tokens_B)


def _write(cache_BTKC, new_BSKC, position_BS):
  """Tokens without room are dropped: their logits are NaN, so nobody takes them for a result."""
  row_B1 = jnp.arange(position_BS.shape[0])[:, None]
  return cache_BTKC.at[row_B1, position_BS].set(new_BSKC, mode="drop")


def _check(tokens, cache: KVCache, cfg, num_tokens) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"`tokens` must be integers [B, S], got {tokens.dtype}{list(tokens.shape)}.")
  want = (cfg.num_layers, len(tokens), cache.keys.shape[2], cfg.num_kv_heads, cfg.head_size)
  if cache.keys.shape != want:
    raise ValueError(f"`cache` must have keys of shape {want}, got {cache.keys.shape}.")
  if num_tokens is not None and num_tokens.shape != tokens.shape[:1]:
    raise ValueError(f"`num_tokens` must have shape {tokens.shape[:1]}, got {num_tokens.shape}.")
