"""What decoders with a cache of keys and values share. Letters as in `models.llama_decode`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models import _llama_layers, rope
from parallel.sharding import call_with_auto_axes

RunLayers = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def decode(run_layers: RunLayers, params, tokens_BS, cache, cfg: Any, num_tokens_B) -> Any:
  """(logits, cache) of S more tokens.

  Args:
    run_layers: `(layers, x_BSD, cache, position_BS, cos_sin, mask)` to the stream behind the
      layers, and their new (keys, values); `mask` says which of the T places a token may see.
    params, tokens_BS, cache, cfg, num_tokens_B: as in `models.llama_decode.decode`.

  Raises:
    ValueError: an argument has the wrong shape or dtype.
  """
  _check(tokens_BS, cache, cfg, num_tokens_B)
  if num_tokens_B is None:
    num_tokens_B = jnp.full(tokens_BS.shape[:1], tokens_BS.shape[1], jnp.int32)
  forward = functools.partial(_forward, run_layers, cfg=cfg)
  return call_with_auto_axes(forward, params, tokens_BS, cache, num_tokens_B, out_spec=jax.P())


def _forward(run_layers: RunLayers, params, tokens_BS, cache, num_tokens_B, cfg: Any):
  room = cache.keys.shape[2]
  position_BS = cache.length[:, None] + jnp.arange(tokens_BS.shape[1])[None]
  inv_A = rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  cos_sin = rope.angles(position_BS, inv_A)
  mask = (jnp.arange(room)[None, None] <= position_BS[:, :, None])[:, None, None]
  x_BSD = _llama_layers.embed(params, tokens_BS, cfg)
  x_BSD, (keys, values) = run_layers(params["layers"], x_BSD, cache, position_BS, cos_sin, mask)
  logits_BSV = _llama_layers.logits(params, x_BSD, cfg)
  logits_BSV = jnp.where((position_BS < room)[:, :, None], logits_BSV, jnp.nan)
  return logits_BSV, type(cache)(keys, values, cache.length + num_tokens_B)


def write(cache_BTKC, new_BSKC, position_BS):
  """Tokens without room are dropped: their logits are NaN, so nobody takes them for a result."""
  row_B1 = jnp.arange(position_BS.shape[0])[:, None]
  return cache_BTKC.at[row_B1, position_BS].set(new_BSKC, mode="drop")


def _check(tokens, cache, cfg, num_tokens) -> None:
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"`tokens` must be integers [B, S], got {tokens.dtype}{list(tokens.shape)}.")
  want = (cfg.num_layers, len(tokens), cache.keys.shape[2], cfg.num_kv_heads, cfg.head_size)
  if cache.keys.shape != want:
    raise ValueError(f"`cache` must have keys of shape {want}, got {cache.keys.shape}.")
  if num_tokens is not None and num_tokens.shape != tokens.shape[:1]:
    raise ValueError(f"`num_tokens` must have shape {tokens.shape[:1]}, got {num_tokens.shape}.")
