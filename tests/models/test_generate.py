"""Decoding with a cache, and generation: equal to the whole model run again for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import generate, llama
from models.llama_decode import decode, init_cache
from parallel import make_mesh

CFG = dataclasses.replace(
  llama.nano(), num_heads=4, num_kv_heads=1, attention_bias=True, mlp_bias=True, max_seq_len=64,
  rope_scaling=llama.Llama3RopeScaling(factor=8.0, original_max_position=16),
)  # fmt: skip
PARAMS = jax.jit(llama.init, static_argnums=1)(jax.random.key(0), CFG)
PARAMS = jax.tree.map(lambda p: p * 4, PARAMS)  # else all tokens are about as likely
APPLY = jax.jit(lambda tokens: llama.apply(PARAMS, tokens, CFG)[0])
DECODE = jax.jit(
  lambda tokens, cache, num=None: decode(PARAMS, tokens, cache, CFG, num_tokens_B=num)
)


def tokens_of(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, CFG.vocab_size, shape), jnp.int32)


def test_every_position_equals_the_whole_model():
  tokens = tokens_of(2, 12)
  want = APPLY(tokens)
  cache = init_cache(CFG, 2, 12)
  got, cache = DECODE(tokens[:, :5], cache)
  parts = [got]
  for i in range(5, 12):
    got, cache = DECODE(tokens[:, i : i + 1], cache)
    parts.append(got)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), want, atol=1e-5)
  np.testing.assert_array_equal(cache.length, 12)


def test_padding_changes_no_row():
  tokens, lengths = tokens_of(2, 12), jnp.asarray([7, 3], jnp.int32)
  _, cache = DECODE(tokens[:, :7], init_cache(CFG, 2, 12), lengths)
  got, _ = DECODE(tokens[:, 7:8], cache)
  for row, length in enumerate([7, 3]):
    whole = jnp.concatenate([tokens[row, :length], tokens[row, 7:8]])[None]
    np.testing.assert_allclose(got[row, 0], APPLY(whole)[0, -1], atol=1e-5)


def test_tokens_without_room_are_nan_and_change_nothing():
  tokens = tokens_of(1, 6)
  got, cache = DECODE(tokens, init_cache(CFG, 1, 4))
  np.testing.assert_allclose(got[0, :4], APPLY(tokens[:, :4])[0], atol=1e-5)
  assert np.isnan(got[0, 4:]).all()
  _, want = DECODE(tokens[:, :4], init_cache(CFG, 1, 4))
  np.testing.assert_allclose(cache.keys, want.keys, atol=1e-5)
  np.testing.assert_allclose(cache.values, want.values, atol=1e-5)


def greedy(prompt, count):
  row = list(prompt)
  for _ in range(count):
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(row)] = row
    row.append(int(APPLY(padded)[0, len(row) - 1].argmax()))
  return row[len(prompt) :]


def test_greedy_text_is_that_of_the_model_run_again():
  prompts = [tokens_of(9).tolist(), tokens_of(4, seed=1).tolist()]
  want = [greedy(prompt, 8) for prompt in prompts]
  assert generate(PARAMS, prompts, CFG, max_new_tokens=8) == want
  assert len(set(want[0] + want[1])) > 4
  ended = generate(PARAMS, prompts, CFG, max_new_tokens=8, eos_id=want[0][2])
  assert ended[0] == want[0][: want[0].index(want[0][2]) + 1]


def test_draws_from_the_softmax():
  """The first token of 4000 equal rows, against its probabilities among the likeliest."""
  prompt, rows, temperature = tokens_of(4).tolist(), 4000, 2.0
  options = {"max_new_tokens": 1, "temperature": temperature, "top_k": 5}
  drawn = generate(PARAMS, [prompt] * rows, CFG, key=jax.random.key(1), **options)
  logits = np.asarray(APPLY(jnp.asarray([prompt]))[0, -1], np.float64) / temperature
  best = np.argsort(logits)[-5:]
  prob = np.exp(logits[best] - logits[best].max())
  prob /= prob.sum()
  share = np.asarray([np.mean(np.asarray(drawn)[:, 0] == token) for token in best])
  assert share.sum() == 1
  assert np.abs(share - prob).max() < 5 * 0.5 / np.sqrt(rows)
  assert drawn[0] == generate(PARAMS, [prompt], CFG, key=jax.random.key(1), **options)[0]


def test_sharded_cache_gives_the_same_text():
  mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  place = jax.NamedSharding(mesh, jax.P())
  params = jax.device_put(PARAMS, place)
  cache = init_cache(CFG, 4, 8)
  by_row = jax.NamedSharding(mesh, jax.P(None, "data"))
  cache = cache._replace(
    keys=jax.device_put(cache.keys, by_row), values=jax.device_put(cache.values, by_row)
  )
  tokens = tokens_of(4, 6)
  run = jax.jit(lambda p, t, c: decode(p, t, c, CFG))
  got, cache = run(params, tokens, cache)
  np.testing.assert_allclose(got, APPLY(tokens), atol=1e-5)
  assert cache.keys.sharding.is_equivalent_to(by_row, 5)


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "`prompts` must be rows of at least one token"),
    ([[1], []], {}, "`prompts` must be rows of at least one token"),
    ([[1, 512]], {}, r"`prompts` must be integers in \[0, 512\), got 512"),
    ([[-1]], {}, "got -1"),
    ([[1]], {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1, got 0"),
    ([[1]], {"max_new_tokens": 64}, "fit `max_seq_len` = 64, got 65"),
    ([[1]], {"temperature": -1.0}, "`temperature`"),
    ([[1]], {"temperature": 1.0}, "`key` is needed"),
    ([[1]], {"top_k": 2}, "`top_k` has no effect"),
    ([[1]], {"eos_id": 512}, "`eos_id` must be of the vocabulary of 512, got 512"),
    ([[1]], {"top_k": 0, "temperature": 1.0, "key": jax.random.key(0)}, "`top_k`.*got 0"),
  ],
)
def test_refuses(prompts, options, message):
  with pytest.raises(ValueError, match=message):
    generate(PARAMS, prompts, CFG, **({"max_new_tokens": 4} | options))


def test_cache_refuses_other_shapes():
  with pytest.raises(ValueError, match="`max_tokens` must be between 1 and `max_seq_len` = 64"):
    init_cache(CFG, 2, 65)
  with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
    init_cache(CFG, 0, 8)
  with pytest.raises(ValueError, match="`cache` must have keys of shape"):
    decode(PARAMS, tokens_of(3, 1), init_cache(CFG, 2, 8), CFG)
  with pytest.raises(ValueError, match="`tokens` must be integers"):
    decode(PARAMS, jnp.zeros((2, 1)), init_cache(CFG, 2, 8), CFG)
  with pytest.raises(ValueError, match="`num_tokens` must have shape"):
    decode(PARAMS, tokens_of(2, 1), init_cache(CFG, 2, 8), CFG, num_tokens_B=jnp.ones(3))
