"""Ladder, parallel and hybrid models with a cache of keys and values, as `models.llama_decode`.

Letters as in `models.llama`; T is the room of the cache in tokens.
"""

import functools

import jax
import jax.numpy as jnp

from models import _attention, _ladder_layers, _llama_layers, ladder, llama_decode, rope
from models.llama_decode import KVCache, init_cache
from parallel.sharding import call_with_auto_axes

__all__ = ["KVCache", "decode", "init_cache"]


def decode(
  params: ladder.Params,
  tokens_BS: jax.Array,
  cache: KVCache,
  cfg: ladder.LadderConfig,
  *,
  num_tokens_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
  """Next-token logits after each of S more tokens, as of `ladder.apply` on all tokens so far.

  Keys and values are those of the stream that each attention reads, so the cache is a Llama's.

  Args: as in `llama_decode.decode`.

  Returns:
    (float32[B, S, V] logits, cache). Logits of tokens for which the cache has no room are NaN.

  Raises:
    ValueError: an argument has the wrong shape or dtype, or `cfg.residual` is "desync".

  Example:
    >>> from models import llama
    >>> params, cfg = ladder.convert_to_ladder(
    ...   llama.init(jax.random.key(0), llama.nano()), llama.nano()
    ... )
    >>> tokens = jnp.arange(6)[None]
    >>> _, cache = decode(params, tokens[:, :5], init_cache(cfg, 1, 8), cfg)
    >>> logits, _ = decode(params, tokens[:, 5:], cache, cfg)
    >>> bool(jnp.allclose(logits[0, 0], ladder.apply(params, tokens, cfg)[0][0, 5], atol=1e-5))
    True
  """
  llama_decode._check(tokens_BS, cache, cfg, num_tokens_B)
  if cfg.residual == "desync":
    raise ValueError("`cfg.residual` must not be 'desync', for which there is no cached decode.")
  if num_tokens_B is None:
    num_tokens_B = jnp.full(tokens_BS.shape[:1], tokens_BS.shape[1], jnp.int32)
  forward = functools.partial(_forward, cfg=cfg)
  return call_with_auto_axes(forward, params, tokens_BS, cache, num_tokens_B, out_spec=jax.P())


def _forward(params, tokens_BS, cache: KVCache, num_tokens_B, cfg: ladder.LadderConfig):
  room = cache.keys.shape[2]
  position_BS = cache.length[:, None] + jnp.arange(tokens_BS.shape[1])[None]
  cos_sin = rope.angles(
    position_BS, rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  )
  mask = jnp.arange(room)[None, None] <= position_BS[:, :, None]

  def attention(weights, x_BSD, cached):
    def attend(q_BSHC, k_BSKC, v_BSKC):
      k_BTKC = llama_decode._write(cached[0], k_BSKC, position_BS)
      v_BTKC = llama_decode._write(cached[1], v_BSKC, position_BS)
      return _attention.attention(q_BSHC, k_BTKC, v_BTKC, mask[:, None, None]), (k_BTKC, v_BTKC)

    return _ladder_layers.attention_rows(weights, x_BSD, cos_sin, attend, cfg)

  x_BSD = _llama_layers.embed(params, tokens_BS, cfg)
  cached = (cache.keys, cache.values)
  x_BSD, (k, v) = _ladder_layers.run_layers(params["layers"], x_BSD, attention, cfg, cached)
  logits_BSV = _llama_layers.logits(params, x_BSD, cfg)
  logits_BSV = jnp.where((position_BS < room)[:, :, None], logits_BSV, jnp.nan)
  return logits_BSV, KVCache(k, v, cache.length + num_tokens_B)
