import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import losses


def make(seed=0, shape=(3, 5), vocab=11):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (*shape, vocab)).astype(np.float32)
  mask = rng.integers(0, 2, shape).astype(np.float32)
  mask[0, 0] = 1
  return logits, rng.integers(0, vocab, shape).astype(np.int32), mask


def test_equals_optax_in_value_and_gradient():
  logits, targets, mask = make()

  def reference(x):
    nll = optax.softmax_cross_entropy_with_integer_labels(x, targets)
    return (nll * mask).sum() / mask.sum()

  got = jax.jit(jax.value_and_grad(lambda x: losses.cross_entropy(x, targets, mask)[0]))(logits)
  want = jax.jit(jax.value_and_grad(reference))(logits)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(got[1], want[1], atol=1e-7)


def test_z_loss_adds_the_squared_log_partition():
  logits, targets, mask = make()
  plain, _ = losses.cross_entropy(logits, targets, mask)
  total, aux = losses.cross_entropy(logits, targets, mask, z_loss=0.1)
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1))
  want = (log_z**2 * mask).sum() / mask.sum()
  np.testing.assert_allclose(aux["z_loss"], want, rtol=1e-5)
  np.testing.assert_allclose(total, plain + 0.1 * want, rtol=1e-5)
  np.testing.assert_array_equal(aux["loss"], plain)


def test_masked_positions_get_no_gradient():
  logits, targets, mask = make()
  grad = jax.grad(lambda x: losses.cross_entropy(x, targets, mask, z_loss=0.1)[0])(logits)
  np.testing.assert_array_equal(grad[mask == 0], 0)
  assert np.all(np.abs(grad[mask == 1]).max(-1) > 0)


def test_all_masked_is_zero_and_finite():
  logits, targets, _ = make()
  mask = np.zeros_like(targets, np.float32)
  value, grad = jax.value_and_grad(lambda x: losses.cross_entropy(x, targets, mask)[0])(logits)
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_fractional_masks_weight_the_mean():
  logits, targets, mask = make()
  full, _ = losses.cross_entropy(logits, targets, mask)
  scaled, aux = losses.cross_entropy(logits, targets, 0.01 * mask)
  np.testing.assert_allclose(scaled, full, rtol=1e-5)
  np.testing.assert_allclose(aux["tokens"], 0.01 * mask.sum(), rtol=1e-6)


def test_large_logits_stay_finite():
  logits = jnp.array([[[1e4, 0.0, -1e4]]])
  for target, want in ((0, 0.0), (2, 2e4)):
    value, _ = losses.cross_entropy(logits, jnp.array([[target]]))
    np.testing.assert_allclose(value, want, rtol=1e-6)


def test_bfloat16_logits_are_reduced_in_float32():
  logits, targets, mask = make(vocab=300)
  low = jnp.asarray(logits, jnp.bfloat16)
  got, _ = losses.cross_entropy(low, targets, mask)
  want, _ = losses.cross_entropy(low.astype(jnp.float32), targets, mask)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, want)


def test_rejects_negative_z_loss():
  logits, targets, mask = make()
  with pytest.raises(ValueError, match="`z_loss` must not be negative, got -1"):
    losses.cross_entropy(logits, targets, mask, z_loss=-1.0)
