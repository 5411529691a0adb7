"""The vote, its ties and zeros."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import sign_majority

GRADS = np.random.default_rng(7).normal(size=(4, 3, 5, 7)).astype(np.float32)
GRADS[:, :, 0] = 0
GRADS[0, :, 1], GRADS[1, :, 1], GRADS[2:, :, 1] = np.nan, np.inf, -1.0
TIE = np.asarray([1, -1, 1])[:, None, None]  # at even and odd votes


@pytest.mark.parametrize(
  ("context", "num_replicas"),
  [("shard_map", 4), *(pytest.param("vmap", n, marks=pytest.mark.slow) for n in (4, 3, 1))],
)
def test_equals_the_vote_of_numpy(roll_out, context, num_replicas):
  grads = GRADS[:num_replicas]
  signs = np.where(np.isnan(grads) | (grads == 0), TIE, np.sign(grads))
  votes = signs.sum(0)
  want = np.where(votes == 0, TIE, np.sign(votes))
  got, state = roll_out(sign_majority("replica"), grads, context=context)
  np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))
  assert state.count.tolist() == [3] * num_replicas
  if num_replicas == 4:
    assert (votes == 0).mean() > 0.1
  np.testing.assert_array_equal(want[:, 0], np.broadcast_to(TIE[:, 0], want[:, 0].shape))


@pytest.mark.slow
def test_keeps_the_dtype(roll_out):
  got, _ = roll_out(sign_majority("replica"), jnp.asarray(GRADS, jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  assert set(np.unique(got.astype(np.float32))) == {-1.0, 1.0}
