"""What the loss of `examples/train_lm.py` makes of the documents in a row."""

import jax
import jax.numpy as jnp
import numpy as np

from models import llama


def test_documents_are_told_apart_unless_asked_not_to(script):
  """The second document of a row changes with the first only if they are one row of text."""
  model = llama.nano()
  params = llama.init(jax.random.key(0), model)
  tokens = jax.random.randint(jax.random.key(1), (1, 16), 0, 512)
  half = jnp.repeat(jnp.array([[1, 2]]), 8, axis=1)
  batch = {
    "tokens": tokens,
    "targets": jnp.roll(tokens, -1, axis=1),
    "segment_ids": half,
    "positions": jnp.arange(16)[None] % 8,
    "loss_mask": (half == 2).astype(jnp.float32),
  }
  other = {**batch, "tokens": jnp.where(half == 1, 7, tokens)}

  def losses(**flags):
    loss = jax.jit(script.build_loss(script.Config(**flags), model))
    return [float(loss(params, b)[0]) for b in (batch, other)]

  apart, together = losses(), losses(separate_documents=False)
  np.testing.assert_allclose(*apart, rtol=1e-6)
  assert abs(together[0] - together[1]) > 1e-3
  np.testing.assert_allclose(apart, np.log(512), rtol=0.1)
