"""DiLoCo against the paper's loop in float64, closed forms, and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import compressed_mean, diloco, int4, local_sgd, pmean_over

REPLICAS, STEPS, SIZE = 4, 12, 5
CURVATURE = np.linspace(0.2, 1.0, SIZE)
CONTEXTS = ("vmap", "shard_map")


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def make_problem(num_replicas=REPLICAS, num_steps=STEPS, seed=0):
  rng = np.random.default_rng(seed)
  targets = rng.normal(size=(num_replicas, num_steps, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


class Sgd:
  """theta - lr * gradient."""

  def __init__(self, learning_rate):
    self.learning_rate = learning_rate

  def step(self, theta, gradient):
    return theta - self.learning_rate * gradient


class Adam:
  """Kingma and Ba, https://arxiv.org/abs/1412.6980, algorithm 1."""

  def __init__(self, learning_rate, b1=0.9, b2=0.95, eps=1e-8):
    self.learning_rate, self.b1, self.b2, self.eps = learning_rate, b1, b2, eps
    self.t, self.m, self.v = 0, 0.0, 0.0

  def step(self, theta, gradient):
    self.t += 1
    self.m = self.b1 * self.m + (1 - self.b1) * gradient
    self.v = self.b2 * self.v + (1 - self.b2) * gradient**2
    m_hat = self.m / (1 - self.b1**self.t)
    v_hat = self.v / (1 - self.b2**self.t)
    return theta - self.learning_rate * m_hat / (np.sqrt(v_hat) + self.eps)


def paper_diloco(start, targets, optimizers, *, sync_period, outer_lr, momentum):
  """DiLoCo, https://arxiv.org/abs/2311.08105, algorithm 1, with the Nesterov outer optimizer.

  Returns float64[R, T, d]: the parameters of every replica after every step.
  """
  num_replicas, num_steps, _ = targets.shape
  outer = start.astype(np.float64)
  buffer = np.zeros_like(outer)
  theta = [outer.copy() for _ in range(num_replicas)]
  history = np.zeros(targets.shape)
  for t in range(num_steps):
    for i in range(num_replicas):  # in parallel, on worker i's own shard of the data
      gradient = CURVATURE * (theta[i] - targets[i, t])
      theta[i] = optimizers[i].step(theta[i], gradient)
    if (t + 1) % sync_period == 0:
      outer_gradient = sum(outer - theta[i] for i in range(num_replicas)) / num_replicas
      buffer = momentum * buffer + outer_gradient
      outer = outer - outer_lr * (outer_gradient + momentum * buffer)
      theta = [outer.copy() for _ in range(num_replicas)]
    history[:, t] = theta
  return history


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("inner", ["sgd", "adam"])
def test_follows_the_papers_loop(train, context, inner):
  params, targets = make_problem()
  ours, reference = {
    "sgd": (optax.sgd(0.3), Sgd),
    "adam": (optax.adam(0.3, b2=0.95), Adam),
  }[inner]
  tx = diloco(ours, sync_period=3)
  got = train(tx, loss_fn, params, targets, context=context)
  want = paper_diloco(
    np.asarray(params["w"]),
    targets,
    [reference(0.3) for _ in range(REPLICAS)],
    sync_period=3,
    outer_lr=0.7,
    momentum=0.9,
  )
  np.testing.assert_allclose(got.params["w"], want, atol=2e-6)
  assert np.abs(want[0, 1] - want[1, 1]).max() > 0.01  # replicas differ inside a round
  anchor = jaxcomm.outer_params(got.state.opt_state)["w"]
  np.testing.assert_array_equal(anchor, got.params["w"][0, -1])  # 12 steps end a round


def test_one_replica_with_outer_sgd_is_lookahead(train):
  slow_lr, period = 0.6, 4
  params, targets = make_problem(num_replicas=1)
  outer = optax.chain(pmean_over("replica"), optax.sgd(slow_lr))
  got = train(diloco(optax.adam(0.3), outer, sync_period=period), loss_fn, params, targets)

  tx = optax.lookahead(optax.adam(0.3), sync_period=period, slow_step_size=slow_lr)
  both = optax.LookaheadParams.init_synced(params)

  @jax.jit
  def roll_out(both, state):
    def step(carry, target):
      both, state = carry
      updates, state = tx.update(jax.grad(loss_fn)(both.fast, target), state, both)
      both = optax.apply_updates(both, updates)
      return (both, state), (both.slow["w"], both.fast["w"])

    return jax.lax.scan(step, (both, state), jnp.asarray(targets[0]))[1]

  slow, fast = roll_out(both, tx.init(both))
  np.testing.assert_allclose(got.params["w"][0], fast, atol=1e-6)
  np.testing.assert_allclose(got.params["w"][0, period - 1 :: period], slow[3::4], atol=1e-6)
  anchor = jaxcomm.outer_params(got.state.opt_state)["w"]
  np.testing.assert_allclose(anchor, slow[-1], atol=1e-6)


def test_identical_data_makes_the_number_of_replicas_irrelevant(train):
  params, targets = make_problem(num_replicas=1)
  tx = diloco(optax.adam(0.3), sync_period=3)
  alone = train(tx, loss_fn, params, targets).params["w"]
  for num_replicas, context in ((2, "vmap"), (8, "vmap"), (1, "shard_map"), (8, "shard_map")):
    same = np.broadcast_to(targets, (num_replicas, *targets.shape[1:]))
    together = train(tx, loss_fn, params, same, context=context).params["w"]
    np.testing.assert_allclose(together, np.broadcast_to(alone, together.shape), atol=1e-6)


def test_quadratic_closed_form(train):
  """One round on a quadratic: Θ' = Θ - ν (I - (I - ηA)^H) (Θ - θ*)."""
  rate, period, outer_lr = 0.5, 4, 0.6
  params, _ = make_problem()
  best = np.linspace(-1, 1, SIZE).astype(np.float32)
  targets = np.broadcast_to(best, (REPLICAS, 3 * period, SIZE))
  outer = optax.chain(pmean_over("replica"), optax.sgd(outer_lr))
  got = train(diloco(optax.sgd(rate), outer, sync_period=period), loss_fn, params, targets)

  theta = np.asarray(params["w"], np.float64)
  for round_ in range(3):
    theta = theta - outer_lr * (1 - (1 - rate * CURVATURE) ** period) * (theta - best)
    np.testing.assert_allclose(got.params["w"][0, (round_ + 1) * period - 1], theta, atol=2e-6)


@pytest.mark.parametrize("context", CONTEXTS)
def test_maxtext_linear_regression(train, context):
  """The hand-computed numbers in the comments of MaxText's two-replica DiLoCo test."""
  params = {"w": jnp.array([[2.0], [1.0]]), "b": jnp.array([1.0])}
  inputs = np.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]], np.float32)
  labels = np.array([[[1.0], [2.0]], [[2.0], [3.0]]], np.float32)
  batches = tuple(np.repeat(x[:, None], 4, axis=1) for x in (inputs, labels))

  def mean_squares(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)

  outer = optax.chain(pmean_over("replica"), optax.sgd(1.0, momentum=0.9, nesterov=True))
  tx = diloco(optax.sgd(0.1), outer, sync_period=3)
  got = train(tx, mean_squares, params, batches, context=context)
  np.testing.assert_allclose(got.loss[0, :3], [1.0, 0.49, 0.2401], rtol=1e-5)
  np.testing.assert_allclose(got.loss[0, 3], 0.2075, atol=5e-5)
  np.testing.assert_allclose(got.loss.mean(0), [1.0, 0.65, 0.4481, 0.574244], rtol=1e-5)
  for replica in range(2):
    np.testing.assert_allclose(got.params["w"][replica, 2, :, 0], [1.5345, 1.0494], atol=1e-4)
    np.testing.assert_allclose(got.params["b"][replica, 2], [0.5839], atol=1e-4)


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_resumes_in_the_middle_of_a_round(train, context):
  params, targets = make_problem(num_steps=14)  # halves of 7 are one program
  outer = optax.chain(
    compressed_mean("replica", int4(8), error_feedback=True),
    optax.sgd(0.7, momentum=0.9, nesterov=True),
  )
  tx = diloco(optax.adam(0.3), outer, sync_period=5)
  whole = train(tx, loss_fn, params, targets, context=context)
  first = train(tx, loss_fn, params, targets[:, :7], context=context)
  saved = jax.tree.map(np.asarray, first.state)  # what a checkpoint holds
  rest = train(tx, loss_fn, params, targets[:, 7:], context=context, state=saved)
  np.testing.assert_array_equal(rest.params["w"], whole.params["w"][:, 7:])
  jax.tree.map(np.testing.assert_array_equal, rest.state, whole.state)


@pytest.mark.parametrize("context", CONTEXTS)
def test_apply_updates_makes_replicas_bit_equal_after_a_sync(train, context):
  params, targets = make_problem()
  tx = diloco(optax.adam(0.3), sync_period=3)
  exact = train(tx, loss_fn, params, targets, context=context).params["w"]
  for step in range(2, STEPS, 3):
    np.testing.assert_array_equal(exact[:, step], np.broadcast_to(exact[0, step], (4, SIZE)))
  assert all((exact[0, s] != exact[1, s]).any() for s in range(STEPS) if s % 3 != 2)

  plain = train(
    tx,
    loss_fn,
    params,
    targets,
    context=context,
    apply_updates=lambda p, u, state: optax.apply_updates(p, u),
  ).params["w"]
  np.testing.assert_allclose(plain, exact, atol=1e-6)  # up to rounding


def test_outer_momentum_and_anchor_are_stored_once(train):
  params, targets = make_problem()
  got = train(diloco(optax.adam(0.3), sync_period=3), loss_fn, params, targets, context="shard_map")
  varying = got.layout.varying
  assert jax.tree.leaves(varying.params) == [True]
  assert not any(jax.tree.leaves(varying.opt_state.anchor))
  assert not any(jax.tree.leaves(varying.opt_state.outer_state))
  assert not varying.opt_state.count
  assert got.state.opt_state.anchor["w"].shape == (SIZE,)
  assert got.state.opt_state.anchor["w"].sharding.is_fully_replicated
  adam = varying.opt_state.inner_state[0]
  assert (adam.count, adam.mu["w"], adam.nu["w"]) == (False, True, True)


def test_bfloat16_parameters_have_a_float32_anchor(train):
  params, targets = make_problem()
  params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
  got = train(diloco(optax.sgd(0.3), sync_period=3), loss_fn, params, targets)
  anchor = jaxcomm.outer_params(got.state.opt_state)["w"]
  assert (got.state.params["w"].dtype, anchor.dtype) == (jnp.bfloat16, jnp.float32)
  rounded = np.asarray(anchor.astype(jnp.bfloat16), np.float32)
  np.testing.assert_array_equal(got.params["w"][:, -1], np.broadcast_to(rounded, (4, SIZE)))
  assert (rounded != anchor).any()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "5"])
def test_rejects_a_bad_period(bad):
  for method in (diloco, local_sgd):
    with pytest.raises(ValueError, match=r"`sync_period` must be an integer >= 1.*got"):
      method(optax.sgd(0.1), sync_period=bad)


def test_rejects_a_bad_injected_period():
  for bad in (0, 1.5):
    tx = optax.inject_hyperparams(diloco)(optax.sgd(0.1), sync_period=bad)
    with pytest.raises(ValueError, match=r"`sync_period` must be an integer >= 1"):
      tx.init({"w": jnp.zeros(2)})


def test_rejects_what_is_no_transform():
  with pytest.raises(ValueError, match=r"`outer` must be an optax transform, got 0\.7"):
    diloco(optax.sgd(0.1), 0.7)
  with pytest.raises(ValueError, match=r"`inner` must be an optax transform, got 0\.1"):
    diloco(0.1)
  with pytest.raises(ValueError, match="`mean` must be an optax transform, got BlockInt"):
    local_sgd(optax.sgd(0.1), sync_period=2, mean=int4())


def test_rejects_missing_params():
  tx = diloco(optax.sgd(0.1))
  grads = {"w": jnp.ones((2, 3))}
  with pytest.raises(ValueError, match="`params` must be given"):
    jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="replica")(grads)


def test_rejects_an_unbound_axis():
  params = {"w": jnp.ones(3)}
  for tx in (diloco(optax.sgd(0.1)), pmean_over("replica"), compressed_mean("replica", int4())):
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_rejects_parameters_that_are_not_floats(dtype):
  with pytest.raises(ValueError, match=r"`params` must be floating-point.*\['n'\].*optax.masked"):
    diloco(optax.sgd(0.1)).init({"w": jnp.ones(2), "n": jnp.ones(2, dtype)})


def test_rejects_an_outer_chain_without_a_mean(train):
  params, targets = make_problem()
  with pytest.raises(ValueError, match="`outer` must average over axis `replica`"):
    train(diloco(optax.sgd(0.1), optax.sgd(0.7), sync_period=2), loss_fn, params, targets)
