"""What the loss of `examples/train_lm.py` makes of the documents in a row."""

import dataclasses

import jax
import numpy as np
import pytest

from models import llama
from tests.models.llama_params import llama_params

pytestmark = pytest.mark.usefixtures("with_llama")


def test_documents_are_told_apart_unless_asked_not_to(script):
  """The second document of a row changes with the first only if they are one row of text."""
  model = dataclasses.replace(llama.nano(), num_layers=1)
  params = llama_params(model)
  tokens = np.random.default_rng(1).integers(0, 512, (1, 16)).astype(np.int32)
  half = np.repeat(np.array([[1, 2]], np.int32), 8, axis=1)
  batch = {
    "tokens": tokens,
    "targets": np.roll(tokens, -1, axis=1),
    "segment_ids": half,
    "positions": np.arange(16, dtype=np.int32)[None] % 8,
    "loss_mask": (half == 2).astype(np.float32),
  }
  other = {**batch, "tokens": np.where(half == 1, np.int32(7), tokens)}

  def losses(**flags):
    loss = jax.jit(script.build_loss(script.Config(**flags), model))
    return [float(loss(params, b)[0]) for b in (batch, other)]

  apart, together = losses(), losses(separate_documents=False)
  np.testing.assert_allclose(*apart, rtol=1e-6)
  assert abs(together[0] - together[1]) > 1e-3
  np.testing.assert_allclose(apart, np.log(512), rtol=0.1)
