"""Eager DiLoCo against the paper's loop in float64, its identities, and DiLoCo."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import compressed_mean, diloco, eager_diloco, int8, pmean_over
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step

REPLICAS, STEPS, SIZE, PERIOD = 4, 12, 5, 3
CURVATURE = np.linspace(0.2, 1.0, SIZE).astype(np.float32)


def loss_fn(params, target):
  return 0.5 * jnp.sum(CURVATURE * (params["w"] - target) ** 2)


def make_problem(num_replicas=REPLICAS):
  rng = np.random.default_rng(7)
  targets = rng.normal(size=(num_replicas, STEPS, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


def paper_eager(theta, targets, *, rate, lr, momentum):
  """https://arxiv.org/abs/2502.12996, every replica with its own outer parameters and momentum.

  Returns theta float64[R, T, d] after every step, and the outer gradients float64[R, rounds, d]
  with the pseudo-gradients that they are made of.
  """
  n = len(targets)
  outer = np.tile(theta, (n, 1))
  theta, buffer, late = outer.copy(), np.zeros_like(outer), np.zeros_like(outer)
  history, eager, own = [], [], []
  for t in range(targets.shape[1]):
    theta -= rate * CURVATURE * (theta - targets[:, t])
    if (t + 1) % PERIOD == 0:
      delta = outer - theta
      g = delta / n + late  # of the others, a round ago
      late = delta.mean(0) - delta / n
      buffer = momentum * buffer + g
      outer = outer - lr * (g + momentum * buffer)
      theta = outer.copy()
      eager.append(g)
      own.append(delta)
    history.append(theta.copy())
  return np.stack(history, 1), np.stack(eager, 1), np.stack(own, 1)


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_a_replica_that_broke_takes_the_others_part_and_is_back(train, context):
  """Replica 1 meets an infinity in round 2, which is then worth nothing to anybody."""
  params, targets = make_problem()
  targets[1, PERIOD, 0] = np.inf
  mean = pmean_over("replica", skip_nonfinite=True)
  tx = eager_diloco(optax.sgd(0.3), optax.sgd(0.7), sync_period=PERIOD, mean=mean)
  got = train(tx, loss_fn, params, targets, context=context)

  outer = np.tile(np.asarray(params["w"], np.float64), (REPLICAS, 1))
  late = np.zeros_like(outer)
  for round_ in range(STEPS // PERIOD):
    theta = outer.copy()
    with np.errstate(invalid="ignore"):
      for t in range(round_ * PERIOD, (round_ + 1) * PERIOD):
        theta -= 0.3 * CURVATURE * (theta - targets[:, t])
    delta = outer - theta
    healthy = np.isfinite(delta).all(-1, keepdims=True)
    assert healthy.sum() == (3 if round_ == 1 else 4)
    own = np.where(healthy, delta, 0) / REPLICAS
    outer = outer - 0.7 * (own + late)
    late = delta[healthy[:, 0]].mean(0) - own
    np.testing.assert_allclose(got.params["w"][:, (round_ + 1) * PERIOD - 1], outer, atol=2e-5)
  assert optax.tree.get(got.state.opt_state, "total_left_out").max() == 1


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_follows_the_papers_loop(train, context):
  params, targets = make_problem()
  tx = eager_diloco(optax.sgd(0.3), sync_period=PERIOD)
  got = train(tx, loss_fn, params, targets, context=context)
  want, eager, own = paper_eager(
    np.asarray(params["w"], np.float64), targets, rate=0.3, lr=0.7, momentum=0.9
  )
  np.testing.assert_allclose(got.params["w"], want, atol=3e-6)
  assert np.abs(want[0, -1] - want[1, -1]).max() > 0.01  # outer parameters differ
  means = own.mean(0)
  late = np.concatenate([np.zeros((1, SIZE)), means[:-1]])
  np.testing.assert_allclose(eager.sum(0), means + (REPLICAS - 1) * late, atol=1e-12)
  if context == "shard_map":
    varying = got.layout.varying.opt_state
    assert (varying.count, varying.anchor["w"]) == (False, True)


@pytest.mark.parametrize("case", ["alone", "repeated"])
def test_is_diloco_where_nothing_is_late(case):
  """One replica; or pseudo-gradients that repeat, from the second round on."""
  n = 1 if case == "alone" else 3
  grads = jnp.asarray(np.random.default_rng(8).normal(size=(n, SIZE)), jnp.float32)
  outer = optax.sgd(0.5)
  txs = [
    eager_diloco(optax.sgd(1.0), outer, sync_period=1),
    diloco(optax.sgd(1.0), optax.chain(jaxcomm.pmean_over("replica"), outer), sync_period=1),
  ]

  def train(tx, grad):
    def step(carry, _):
      p, state = carry
      updates, state = tx.update(grad, state, p)
      return (optax.apply_updates(p, updates), state), updates

    return jax.lax.scan(step, (jnp.zeros(SIZE), tx.init(jnp.zeros(SIZE))), length=4)[1]

  roll_out = jax.vmap(lambda g: [train(tx, g) for tx in txs], axis_name="replica")
  eager, plain = jax.jit(roll_out)(grads)
  if case == "alone":
    np.testing.assert_array_equal(eager, plain)
  else:
    np.testing.assert_allclose(eager[:, 1:], plain[:, 1:], atol=1e-6)
    assert np.abs(np.asarray(eager[:, 0] - plain[:, 0])).max() > 0.05


@pytest.mark.parametrize("outer", [(0.7, 0.9), (1.0, 0.0)])
def test_a_late_mean_bears_less_outer_momentum_than_a_prompt_one(outer):
  """Where a round reaches its minimum, the outer steps of both methods are linear recursions."""
  lr, momentum = outer
  sgd = optax.sgd(lr, momentum=momentum, nesterov=True)
  prompt = optax.chain(jaxcomm.pmean_over("replica"), sgd)
  methods = (diloco(optax.sgd(1.0), prompt, sync_period=1),
             eager_diloco(optax.sgd(1.0), sgd, sync_period=1))  # fmt: skip

  def after_rounds(tx, start):
    def step(carry, _):
      theta, state = carry
      updates, state = tx.update(theta, state, theta)
      return (optax.apply_updates(theta, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), length=100)[0][0]

  start = jnp.ones(REPLICAS)
  ends = [jax.jit(jax.vmap(lambda x, tx=tx: after_rounds(tx, x), axis_name="replica"))(start)
          for tx in methods]  # fmt: skip

  # Equal replicas: Theta' = Theta - lr (g + momentum b'), b' = momentum b + g, and g is Theta, or a
  # share 1/N of it and the rest of the one before.
  def radius(share):
    g = np.array([share, 1 - share, 0.0])
    buffer = g + np.array([0, 0, momentum])
    theta = np.array([1.0, 0, 0]) - lr * (g + momentum * buffer)
    return max(abs(np.linalg.eigvals(np.stack([theta, [1, 0, 0], buffer]))))

  radii = radius(1.0), radius(1 / REPLICAS)
  assert radii[0] < 1
  assert (radii[1] > 1) == (momentum > 0)
  for end, r in zip(ends, radii):
    assert (np.abs(end) > 1e3).all() if r > 1 else (np.abs(end) < 1e-2).all()


def test_one_compressed_mean_per_round():
  mesh = jax.make_mesh(
    (4,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4]
  )
  mean = compressed_mean("replica", int8(8), error_feedback=True)
  tx = eager_diloco(optax.sgd(0.1), sync_period=2, mean=mean)
  loss = lambda p, b: (jnp.sum((p["w"] - b[0]) ** 2), {})  # noqa: E731
  step = make_train_step(loss, lambda key: {"w": jnp.zeros(64)}, tx, mesh)
  batch = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=step.batch_sharding)
  report = collective_bytes(step.compile(batch), mesh)
  assert report.always == 0
  assert {(op.axis, op.dtype) for op in report.ops} <= {("replica", "s8"), ("replica", "u8")}
  assert len({op.branch for op in report.ops}) == 1


def test_rejects_bad_input():
  for bad in ({"outer": 0.7}, {"mean": int8()}, {"inner": 0.1}):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"`{name}` must be an optax transform"):
      eager_diloco(**{"inner": optax.sgd(0.1), "sync_period": 2, **bad})
  with pytest.raises(ValueError, match="`sync_period` must be an integer >= 1"):
    eager_diloco(optax.sgd(0.1), sync_period=0)
  tx = eager_diloco(optax.sgd(0.1), sync_period=2)
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
