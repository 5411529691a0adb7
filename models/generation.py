"""Text from a model: prompts are read at once, then every step adds a token to each row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import llama
from models.llama_decode import KVCache, decode, init_cache


def generate(
  params: llama.Params,
  prompts: Sequence[Sequence[int]],
  cfg: llama.LlamaConfig,
  *,
  max_new_tokens: int,
  temperature: float = 0.0,
  top_k: int | None = None,
  eos_id: int | None = None,
  key: jax.Array | None = None,
) -> list[list[int]]:
  """Continues each prompt; one compiled program per shape of the prompts.

  Args:
    params: from `init` or `load_hf`.
    prompts: token ids, of different lengths if need be; none may be empty.
    cfg: the config of `params`.
    max_new_tokens: most tokens added to a prompt.
    temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
    top_k: draw among this many likeliest tokens; default all.
    eos_id: a row ends after this token, which is kept.
    key: for `temperature` > 0; folded by step and row, so a row does not depend on the others.

  Returns:
    The new tokens of each prompt.

  Raises:
    ValueError: a prompt is empty or has ids outside [0, V), prompt and new tokens exceed
      `cfg.max_seq_len`, or an option is out of range.

  Example:
    >>> params = llama.init(jax.random.key(0), llama.nano())
    >>> [len(row) for row in generate(params, [[1, 2], [3]], llama.nano(), max_new_tokens=4)]
    [4, 4]
  """
  _check(prompts, cfg, max_new_tokens, temperature, top_k, eos_id, key)
  longest = max(map(len, prompts))
  tokens = np.zeros((len(prompts), longest), np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt)] = prompt
  lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
  new = _generate(
    params,
    tokens,
    lengths,
    jax.random.key(0) if key is None else key,
    jnp.float32(temperature),
    cfg=cfg,
    max_new_tokens=max_new_tokens,
    top_k=None if temperature == 0 else top_k or cfg.vocab_size,
    eos_id=eos_id,
  )
  return [_until(row.tolist(), eos_id) for row in np.asarray(new)]


def _until(row: list[int], eos_id: int | None) -> list[int]:
  return row[: row.index(eos_id) + 1] if eos_id in row else row


@functools.partial(jax.jit, static_argnames=("cfg", "max_new_tokens", "top_k", "eos_id"))
def _generate(
  params, tokens_BS, length_B, key, temperature, *, cfg, max_new_tokens, top_k, eos_id
) -> jax.Array:
  """int32[B, N] new tokens; `top_k` None takes the likeliest."""
  batch, longest = tokens_BS.shape
  cache = init_cache(cfg, batch, longest + max_new_tokens)
  logits_BSV, cache = decode(params, tokens_BS, cache, cfg, num_tokens_B=length_B)
  logits_BV = jnp.take_along_axis(logits_BSV, length_B[:, None, None] - 1, axis=1)[:, 0]
  new_BN = jnp.zeros((batch, max_new_tokens), jnp.int32)

  def choose(logits_BV, step):
    if top_k is None:
      return logits_BV.argmax(-1).astype(jnp.int32)
    best_BK, index_BK = jax.lax.top_k(logits_BV, top_k)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(batch))
    drawn_B = jax.vmap(jax.random.categorical)(keys, best_BK / temperature)
    return jnp.take_along_axis(index_BK, drawn_B[:, None], axis=1)[:, 0]

  def more(carry):
    step, _, _, _, done_B = carry
    return (step < max_new_tokens) & ~done_B.all()

  def add(carry: tuple[jax.Array, jax.Array, jax.Array, KVCache, jax.Array]) -> Any:
    step, logits_BV, new_BN, cache, done_B = carry
    token_B = choose(logits_BV, step)
    new_BN = new_BN.at[:, step].set(token_B)
    done_B = done_B if eos_id is None else done_B | (token_B == eos_id)
    logits_B1V, cache = decode(params, token_B[:, None], cache, cfg)
    return step + 1, logits_B1V[:, 0], new_BN, cache, done_B

  start = (jnp.int32(0), logits_BV, new_BN, cache, jnp.zeros(batch, bool))
  return jax.lax.while_loop(more, add, start)[2]


def _check(prompts, cfg, max_new_tokens, temperature, top_k, eos_id, key) -> None:
  if not prompts or not all(len(prompt) for prompt in prompts):
    raise ValueError(f"`prompts` must be rows of at least one token, got {prompts!r}.")
  ids = np.concatenate([np.asarray(prompt) for prompt in prompts])
  if not np.issubdtype(ids.dtype, np.integer) or ids.min() < 0 or ids.max() >= cfg.vocab_size:
    bad = ids.max() if ids.max() >= cfg.vocab_size else ids.min()
    raise ValueError(f"`prompts` must be integers in [0, {cfg.vocab_size}), got {bad}.")
  if max_new_tokens < 1:
    raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
  total = max(map(len, prompts)) + max_new_tokens
  if total > cfg.max_seq_len:
    raise ValueError(
      f"`prompts` and `max_new_tokens` must fit `max_seq_len` = {cfg.max_seq_len}, got {total}."
    )
  if not 0 <= temperature < float("inf"):
    raise ValueError(f"`temperature` must be finite and at least 0, got {temperature}.")
  if temperature > 0 and key is None:
    raise ValueError(f"`key` is needed with `temperature` above 0, got {temperature} and no key.")
  for name, value in (("top_k", top_k), ("eos_id", eos_id)):
    if value is not None and not (name == "top_k") <= value <= cfg.vocab_size - (name == "eos_id"):
      raise ValueError(f"`{name}` must be of the vocabulary of {cfg.vocab_size}, got {value}.")
  if top_k is not None and temperature == 0:
    raise ValueError(f"`top_k` has no effect with `temperature` 0, got {top_k}.")
