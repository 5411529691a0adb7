"""Llama with a cache of keys and values: a few more tokens for each row, at the cost of those.

Letters as in `models.llama`; T is the room of the cache in tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models import _attention, _decoding, _llama_layers, llama


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
  return _decoding.decode(
    functools.partial(_run_layers, cfg=cfg), params, tokens_BS, cache, cfg, num_tokens_B
  )


def _run_layers(layers, x_BSD, cache, position_BS, cos_sin, mask, cfg: llama.LlamaConfig):
  def body(x_BSD, layer_and_cache):
    layer, k_BTKC, v_BTKC = layer_and_cache
    layer = jax.tree.map(lambda p: p.astype(cfg.dtype), layer)
    normed = _llama_layers.rms_norm(x_BSD, layer["attn_norm_D"], cfg)
    q_BSHC, k_BSKC, v_BSKC = _llama_layers.heads(normed, layer, cos_sin, cfg)
    k_BTKC = _decoding.write(k_BTKC, k_BSKC, position_BS)
    v_BTKC = _decoding.write(v_BTKC, v_BSKC, position_BS)
    y_BSHC = _attention.attention(q_BSHC, k_BTKC, v_BTKC, mask)
    x_BSD = x_BSD + _llama_layers.merge_heads(y_BSHC, layer, cfg)
    normed = _llama_layers.rms_norm(x_BSD, layer["mlp_norm_D"], cfg)
    return x_BSD + _llama_layers.feed_forward(normed, layer, cfg), (k_BTKC, v_BTKC)

  return jax.lax.scan(body, x_BSD, (layers, cache.keys, cache.values))
