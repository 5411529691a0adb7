"""SGP against push-sum written with matrices, and what it conserves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import sgp
from jaxcomm.collectives import exponential, ring

N, STEPS, SIZE, RATE = 5, 50, 3, 0.1
MIXING = 12  # steps with masks and gradients, before steps of plain mixing
TOPOLOGY = exponential()  # directed: a mask makes rows unequal


def push_matrix(step, alive):
  """Column-stochastic: a message that is not delivered stays with its sender."""
  links = TOPOLOGY.phases(N)[0]
  matrix = np.eye(N)
  for link in links:
    for i, source in enumerate(link):
      if alive[i] and alive[source]:
        matrix[i, source] += 1 / (len(links) + 1)
        matrix[source, source] -= 1 / (len(links) + 1)
  return matrix


def make_run(seed=0):
  rng = np.random.default_rng(seed)
  start = rng.normal(size=(N, SIZE)).astype(np.float32)
  grads = rng.normal(size=(N, STEPS, SIZE)).astype(np.float32)
  grads[:, MIXING:] = 0
  alive = rng.random((STEPS, N)) < 0.7
  alive[MIXING:] = True
  return start, grads, alive


def paper_sgp(start, grads, alive, *, overlap):
  """Push-sum with stochastic gradients, https://arxiv.org/abs/1811.10792: z and w, [T, N, ...]."""
  share = 1 - 1 / (len(TOPOLOGY.phases(N)[0]) + 1)
  x, w = start.astype(np.float64), np.ones(N)
  sent_x, sent_w = np.zeros_like(x), np.zeros(N)  # under way
  z_history, w_history = [], []
  for t in range(STEPS):
    half = x - RATE * grads[:, t]  # the gradient is that at z = x / w
    push = push_matrix(t, alive[t])
    if overlap:
      arriving = push - (1 - share) * np.eye(N)  # all but what was kept at once
      x = (1 - share) * half + arriving @ sent_x
      sent_x, sent_w, w = half, w, (1 - share) * w + arriving @ sent_w
    else:
      x, w = push @ half, push @ w
    z_history.append(x / w[:, None])
    w_history.append(w)
  return np.stack(z_history), np.stack(w_history)


@pytest.fixture(scope="module")
def trained():
  """`trained(overlap)`: z [T, N, d], and the states of all steps."""

  def run(overlap):
    tx = sgp(optax.sgd(RATE), TOPOLOGY, overlap=overlap)

    def replica(start, grads, alive):
      def step(carry, x):
        z, state = carry
        updates, state = tx.update(x[0], state, z, alive=x[1])
        z = optax.apply_updates(z, updates)
        return (z, state), (z, state)

      return jax.lax.scan(step, (start, tx.init(start)), (grads, alive))[1]

    fun = jax.jit(jax.vmap(replica, in_axes=(0, 0, None), out_axes=1, axis_name="replica"))
    return jax.tree.map(np.asarray, fun(*make_run()))

  return run


@pytest.mark.parametrize("overlap", [False, True])
def test_follows_push_sum_and_conserves_its_sums(trained, overlap):
  start, grads, alive = make_run()
  z, state = trained(overlap)
  want_z, want_w = paper_sgp(start, grads, alive, overlap=overlap)
  np.testing.assert_allclose(z, want_z, atol=1e-5)
  np.testing.assert_allclose(state.weight, want_w, atol=1e-6)
  assert np.ptp(state.weight[MIXING - 1]) > 0.03  # the masks made them differ

  share = 1 - 1 / (len(TOPOLOGY.phases(N)[0]) + 1)
  x_sum = (state.weight[..., None] * z).sum(1, dtype=np.float64)
  w_sum = state.weight.sum(1, dtype=np.float64)
  if overlap:
    x_sum += share * state.message.sum(1, dtype=np.float64)
    w_sum += share * state.message_weight.sum(1, dtype=np.float64)
  moved = RATE * np.cumsum(grads.sum(0, dtype=np.float64), 0)
  np.testing.assert_allclose(x_sum, start.sum(0, dtype=np.float64) - moved, atol=1e-5)
  np.testing.assert_allclose(w_sum, N, atol=1e-5)
  # After the gradients stop, every z tends to the mean of x.
  limit = np.broadcast_to(x_sum[-1] / N, (N, SIZE))
  np.testing.assert_allclose(z[-1], limit, atol=1e-4)
  assert np.abs(z[MIXING - 1] - limit).max() > 0.05


@pytest.mark.parametrize("overlap", [False, True])
def test_weights_stay_equal_while_all_are_alive(overlap):
  tx = sgp(optax.sgd(0.1), ring(), overlap=overlap)

  def weights(z):
    def step(carry, _):
      z, state = carry
      updates, state = tx.update(z, state, z)
      return (optax.apply_updates(z, updates), state), state.weight

    return jax.lax.scan(step, (z, tx.init(z)), length=60)[1]

  got = np.asarray(jax.jit(jax.vmap(weights, axis_name="replica"))(jnp.arange(7.0)))
  if not overlap:
    np.testing.assert_array_equal(got, 1)  # every bit, though no third is a binary number
  else:  # a third is kept at once, and two thirds of what was sent arrive: w = w/3 + 2w'/3 ...
    np.testing.assert_allclose(got[:, :2], [[1 / 3, 7 / 9]] * 7, atol=1e-6)
    np.testing.assert_allclose(got[:, -1], 1 / (1 + 2 / 3), atol=1e-6)  # ... and w + 2w/3 = 1


def test_overlapped_messages_do_not_wait_for_the_gradient():
  """What arrives in a step is the same whatever the others' gradients are in it."""
  start = np.linspace(-1, 1, 4).astype(np.float32)
  grads = np.zeros((2, 4), np.float32)
  grads[1, 0] = 1.0

  def after_two_steps(overlap):
    tx = sgp(optax.sgd(1.0), overlap=overlap)

    def replica(z, grad):
      state = tx.init(z)
      for g in (jnp.zeros_like(grad), grad):
        updates, state = tx.update(g, state, z)
        z = optax.apply_updates(z, updates)
      return z

    fun = jax.jit(jax.vmap(jax.vmap(replica, axis_name="replica"), in_axes=(None, 0)))
    return np.asarray(fun(start, grads))

  calm, pushed = after_two_steps(overlap=True)
  np.testing.assert_array_equal(calm != pushed, [True, False, False, False])
  calm, pushed = after_two_steps(overlap=False)
  assert (calm != pushed).sum() == 2  # itself and the one it sends to


def test_rejects_what_is_no_topology():
  with pytest.raises(
    ValueError, match=r"`topology` must be a topology such as ring\(\).*got 'ring'"
  ):
    sgp(optax.sgd(0.1), "ring")
  with pytest.raises(ValueError, match="`inner` must be an optax transform"):
    sgp(0.1)
