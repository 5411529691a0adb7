"""FedZip as a transform: federated averaging, error feedback, and the bytes it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.compressors import fedzip_codec, fedzip_compress, fedzip_decompress, fedzip_finite
from jaxcomm.transforms import fedzip, pmean_over

CLIENTS, ROUNDS, SIZE = 4, 20, 60


def federated(tx_client, targets, rounds=ROUNDS):
  """Parameters [rounds, SIZE]: three local steps per round, the clients' mean change applied."""
  tx = optax.chain(tx_client, pmean_over("clients"))

  def client(target):
    def one_round(carry, _):
      params, state = carry
      local = params
      for _ in range(3):
        local = local - 0.02 * (local - target)
      mean, state = tx.update(local - params, state)
      params = params + mean
      return (params, state), params

    params = jnp.zeros(SIZE)
    return jax.lax.scan(one_round, (params, tx.init(params)), length=rounds)[1]

  out = jax.jit(jax.vmap(client, axis_name="clients"))(targets)
  for other in out[1:]:
    np.testing.assert_array_equal(out[0], other)
  return np.asarray(out[0])


@pytest.fixture(scope="module")
def targets():
  return np.random.default_rng(0).normal(size=(CLIENTS, SIZE)).astype(np.float32)


def test_everything_kept_is_federated_averaging(targets):
  plain = federated(optax.identity(), targets)
  np.testing.assert_allclose(federated(fedzip(1.0, SIZE), targets), plain, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_error_feedback_recovers_what_sparse_updates_lose(targets):
  mean = targets.mean(0)
  far = lambda params: np.abs(params[-1] - mean).max()  # noqa: E731
  without, with_feedback = (
    federated(fedzip(0.1, error_feedback=feedback), targets, 300) for feedback in (False, True)
  )
  assert far(with_feedback) < 0.5 * far(without)


def test_outputs_and_residual_add_up_to_the_inputs():
  rng = np.random.default_rng(1)
  updates = {
    "w": rng.normal(size=(30, 8, 9)).astype(np.float32),
    "h": jnp.asarray(rng.normal(size=(30, 20)), jnp.bfloat16),
  }
  tx = fedzip(0.2, error_feedback=True)

  def step(state, update):
    out, state = tx.update(update, state)
    return state, out

  first = tx.init(jax.tree.map(lambda x: x[0], updates))
  state, out = jax.jit(lambda u: jax.lax.scan(step, first, u))(updates)
  for name, want in updates.items():
    assert out[name].dtype == want.dtype
    assert state.residual[name].dtype == jnp.float32
    total = np.asarray(out[name], np.float64).sum(0) + np.asarray(state.residual[name])
    np.testing.assert_allclose(total, np.asarray(want, np.float64).sum(0), atol=2e-5)
  assert not np.array_equal(out["w"], updates["w"])


@pytest.mark.slow
def test_is_what_the_server_decodes():
  update = {"w": jnp.asarray(np.random.default_rng(2).normal(size=(8, 9)), jnp.float32)}
  tx = fedzip(0.2, pin_zero=False)
  out, state = jax.jit(tx.update)(update, tx.init(update))
  compress = jax.jit(lambda u: fedzip_compress(u, 0.2, pin_zero=False))
  data = fedzip_codec.encode(compress(update))
  np.testing.assert_array_equal(fedzip_codec.decode(data, update)["w"], out["w"])
  assert jax.tree.leaves(state) == []


@pytest.mark.slow
def test_a_client_that_diverged_has_no_weight(targets):
  """Zero weight for that client, not a lost round for all."""

  def mean(delta):
    small = fedzip_compress(delta, 1.0, SIZE)
    finite, out = fedzip_finite(small), fedzip_decompress(small)
    total = jax.lax.psum(jnp.where(finite, out, 0.0), "clients")
    return total / jax.lax.psum(jnp.where(finite, 1.0, 0.0), "clients")

  broken = targets.copy()
  broken[1, 7] = np.nan
  got = jax.jit(jax.vmap(mean, axis_name="clients"))(broken)
  np.testing.assert_allclose(got[0], targets[[0, 2, 3]].mean(0), rtol=0, atol=1e-6)


def test_bad_input():
  with pytest.raises(ValueError, match="`updates` must be floating-point arrays, got int32"):
    fedzip().update({"a": jnp.arange(3)}, optax.EmptyState())
  with pytest.raises(ValueError, match=r"`z` must be a number in \(0, 1\], got 2"):
    fedzip(2).update({"a": jnp.ones(30)}, optax.EmptyState())
