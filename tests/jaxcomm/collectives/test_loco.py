"""LoCo's error: its recurrence, its limits, its resets, how it is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import loco_init, loco_psum_scatter, quantized_psum_scatter
from jaxcomm.compressors import int4, int8

AXIS, N, STEPS, SHAPE = "replica", 4, 6, (9, 5)
BITS = {"bits": 4, "block_size": 16}


def run(on_devices, g, mode="unchecked", error_bits=None, **options):
  """(sums of every step, errors after every step, last state) from gradients [N, STEPS, ...]."""

  def local(g):
    def body(state, g):
      y, state = loco_psum_scatter(g, state, AXIS, error_bits=error_bits, **BITS, **options)
      return state, (y, state.error)

    state = loco_init(g[0], error_bits=error_bits, block_size=16)
    state, (sums, errors) = jax.lax.scan(body, state, g)
    return sums, errors, state.error, jax.lax.pmax(state.count, AXIS)

  return on_devices(local, mode, N)(g)


@pytest.fixture
def g(stacked):
  return np.asarray(stacked(N, (STEPS, *SHAPE)))


def recurrence(g, err_beta, reset_every, coded):
  """(sums, errors) by loops; float32 like the method."""
  error, sums, errors = np.zeros((N, *SHAPE), np.float32), [], []
  for step in range(STEPS):
    h = g[:, step] + error
    rows = np.pad(h, ((0, 0), (0, 3), (0, 0))).reshape(N, N, 3, 5)
    sent = np.stack([[coded(int4(16), row) for row in device] for device in rows])
    sums.append(sum(sent[1:], sent[0]))
    lost = (rows - sent).reshape(N, 12, 5)[:, :9]
    error = np.float32(err_beta) * error + np.float32(1 - err_beta) * lost
    error *= (step + 1) % reset_every != 0
    errors.append(error)
  return np.stack(sums, 1), np.stack(errors, 1)


def test_without_memory_of_old_errors_it_is_ef14(on_devices, g, coded):
  """err_beta = 0: e' = h - D(C(h)), with no other operation."""
  sums, errors, last, count = run(on_devices, g, err_beta=0.0, reset_every=None)
  want_sums, want_errors = recurrence(g, 0, STEPS + 1, coded)
  np.testing.assert_array_equal(sums, want_sums)
  np.testing.assert_array_equal(np.reshape(errors["values"], want_errors.shape), want_errors)
  np.testing.assert_array_equal(last["values"], errors["values"][:, -1])
  assert count.tolist() == [STEPS] * N
  # Nothing is lost: all sums and the last errors make up all gradients.
  total = np.asarray(sums, np.float64).sum(1).reshape(12, 5)[:9] + want_errors[:, -1].sum(0)
  np.testing.assert_allclose(total, g.astype(np.float64).sum((0, 1)), atol=1e-5)


def test_moving_average_and_resets(on_devices, g, coded):
  sums, errors, _, _ = run(on_devices, g, "checked", err_beta=0.8, reset_every=4)
  want_sums, want_errors = recurrence(g, 0.8, 4, coded)
  assert not np.any(want_errors[:, 3])
  assert np.all(np.abs(want_errors[:, [2, 4]]).max((0, 2, 3)) > 0.01)
  np.testing.assert_allclose(
    np.reshape(errors["values"], want_errors.shape), want_errors, atol=1e-6
  )
  np.testing.assert_allclose(sums, want_sums, atol=1e-5)


@pytest.mark.slow
def test_full_memory_keeps_no_error(on_devices, g):
  """err_beta = 1: the error stays zero and every step is a plain reduce-scatter."""
  sums, errors, _, _ = run(on_devices, g, "vmap", error_bits=8, err_beta=1.0)
  assert errors["codes"].dtype == np.int8
  assert not np.any(errors["codes"])
  assert not np.any(errors["scales"])
  plain = on_devices(lambda v: quantized_psum_scatter(v, AXIS, **BITS), "vmap", N)
  np.testing.assert_array_equal(sums[:, 2], plain(g[:, 2]))


@pytest.mark.slow
def test_error_is_stored_in_one_byte(on_devices, g, coded):
  """After one step: what int8 blocks make of the exact error."""
  _, errors, _, _ = run(on_devices, g, error_bits=8, err_beta=0.0)
  _, exact = recurrence(g, 0, STEPS, coded)
  first = {name: jnp.asarray(leaf[2, 0]) for name, leaf in errors.items()}
  got = int8(16).decompress(first, SHAPE)
  np.testing.assert_array_equal(got, coded(int8(16), exact[2, 0]))


def test_derivative_is_that_of_the_sum(on_devices, stacked):
  ct = stacked(N, (3, 5), seed=1)

  def local(xs):
    x, ct = xs

    def scatter(x):
      state = loco_init(x, error_bits=None)
      y, state = loco_psum_scatter(x, state, AXIS, error_bits=None, backward_bits=None)
      return y, state.error

    (_, error), pull = jax.vjp(scatter, x)
    return pull((ct, jax.tree.map(jnp.ones_like, error)))[0]

  got = on_devices(local, "checked", N)((stacked(N, SHAPE), ct))
  np.testing.assert_array_equal(got, np.broadcast_to(np.reshape(ct, (12, 5))[:9], (N, *SHAPE)))


def test_rejects_bad_input(on_devices):
  def rejects(message, init=None, **options):
    def local(v):
      return loco_psum_scatter(v, loco_init(v, **(init or {})), AXIS, **options)[0]

    with pytest.raises(ValueError, match=message):
      jax.eval_shape(on_devices(local, "checked", 2), jnp.zeros((2, 40)))

  rejects(r"`err_beta` must be in \[0, 1\], got 1.5", err_beta=1.5)
  rejects("`err_beta` must be in", err_beta=float("nan"))
  rejects("`reset_every` must be a number of steps >= 1 or None, got 0", reset_every=0)
  rejects("`error_bits` must be 4, 8, 'fp8' or None, got 16", error_bits=16)
  rejects(r"`state` must come from loco_init for the shape \(40,\)", {"error_bits": None})
  rejects(r"`state` must come from loco_init .* got the error", {"block_size": 8})
