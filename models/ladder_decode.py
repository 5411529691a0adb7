"""Ladder, parallel and hybrid models with a cache of keys and values, as `models.llama_decode`.

Letters as in `models.llama`; T is the room of the cache in tokens.
"""

import functools

import jax

from models import _attention, _decoding, _ladder_layers, ladder
from models.llama_decode import KVCache, init_cache

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
    >>> import jax, jax.numpy as jnp
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
  if cfg.residual == "desync":
    raise ValueError("`cfg.residual` must not be 'desync', for which there is no cached decode.")
  return _decoding.decode(
    functools.partial(_run_layers, cfg=cfg), params, tokens_BS, cache, cfg, num_tokens_B
  )


def _run_layers(layers, x_BSD, cache, position_BS, cos_sin, mask, cfg: ladder.LadderConfig):
  def attention(weights, x_BSD, cached):
    def attend(q_BSHC, k_BSKC, v_BSKC):
      k_BTKC = _decoding.write(cached[0], k_BSKC, position_BS)
      v_BTKC = _decoding.write(cached[1], v_BSKC, position_BS)
      return _attention.attention(q_BSHC, k_BTKC, v_BTKC, mask), (k_BTKC, v_BTKC)

    return _ladder_layers.attention_rows(weights, x_BSD, cos_sin, attend, cfg)

  cached = (cache.keys, cache.values)
  return _ladder_layers.run_layers(layers, x_BSD, attention, cfg, cached)
