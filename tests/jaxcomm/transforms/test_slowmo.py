"""SlowMo against the paper's loop, and the methods that it equals in its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import diloco, local_sgd, pmean_over, slowmo
from jaxcomm.transforms import co2_outer

REPLICAS, STEPS, SIZE, PERIOD = 4, 12, 5, 3
CURVATURE = np.linspace(0.2, 1.0, SIZE)
RATES = np.linspace(0.4, 0.1, STEPS)  # of the inner steps


def schedule(count):
  return jnp.asarray(RATES, jnp.float32)[count]


def loss_fn(params, target):
  return 0.5 * jnp.sum(jnp.asarray(CURVATURE, jnp.float32) * (params["w"] - target) ** 2)


def make_problem():
  rng = np.random.default_rng(3)
  targets = rng.normal(size=(REPLICAS, STEPS, SIZE)).astype(np.float32)
  return {"w": jnp.asarray(rng.normal(size=SIZE), jnp.float32)}, targets


def paper_slowmo(start, targets, *, outer_lr, momentum):
  """SlowMo, https://arxiv.org/abs/1910.00643, algorithm 1, with an exact average; [R, T, d]."""
  outer, u = start.astype(np.float64), np.zeros(SIZE)
  x = [outer] * REPLICAS
  history = np.zeros(targets.shape)
  for t in range(STEPS):
    x = [x[i] - RATES[t] * CURVATURE * (x[i] - targets[i, t]) for i in range(REPLICAS)]
    if (t + 1) % PERIOD == 0:
      u = momentum * u + (outer - np.mean(x, axis=0)) / RATES[t]
      outer = outer - outer_lr * RATES[t] * u
      x = [outer] * REPLICAS
    history[:, t] = x
  return history


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_follows_the_papers_loop(train, context):
  params, targets = make_problem()
  tx = slowmo(
    optax.sgd(schedule), sync_period=PERIOD, outer_lr=0.8, outer_momentum=0.6, inner_lr=schedule
  )
  got = train(tx, loss_fn, params, targets, context=context)
  want = paper_slowmo(np.asarray(params["w"]), targets, outer_lr=0.8, momentum=0.6)
  np.testing.assert_allclose(got.params["w"], want, atol=2e-6)
  np.testing.assert_array_equal(got.params["w"][0, -1], got.params["w"][1, -1])


@pytest.mark.slow
def test_limits():
  """All in one program: what it equals, and what it does not."""
  params, targets = make_problem()
  inner = optax.sgd(0.3)
  heavy_ball = optax.chain(pmean_over("replica"), optax.sgd(0.8, momentum=0.6))
  undelayed_co2 = co2_outer(sync_period=PERIOD, outer_lr=0.8, outer_momentum=0.6, gap=1.0)
  options = {"sync_period": PERIOD, "outer_lr": 0.8, "outer_momentum": 0.6}
  txs = {
    "slowmo": slowmo(inner, **options),
    "diloco": diloco(inner, heavy_ball, sync_period=PERIOD),
    "undelayed_co2": diloco(inner, undelayed_co2, sync_period=PERIOD),
    "constant_rate": slowmo(inner, **options, inner_lr=0.3),
    "injected": optax.inject_hyperparams(slowmo, static_args=("inner", "sync_period"))(
      inner, **options
    ),
    "plain": slowmo(inner, sync_period=PERIOD, outer_momentum=0.0),
    "local_sgd": local_sgd(inner, sync_period=PERIOD),
  }

  def replica(targets):
    def roll_out(tx):
      def step(carry, target):
        p, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(p, target), state, p)
        p = jaxcomm.apply_updates(p, updates, state)
        return (p, state), p["w"]

      return jax.lax.scan(step, (params, tx.init(params)), targets)[1]

    return {name: roll_out(tx) for name, tx in txs.items()}

  got = jax.tree.map(np.asarray, jax.jit(jax.vmap(replica, axis_name="replica"))(targets))
  for name in ("diloco", "undelayed_co2", "constant_rate", "injected"):
    np.testing.assert_allclose(got[name], got["slowmo"], atol=1e-6, err_msg=name)
  np.testing.assert_allclose(got["plain"], got["local_sgd"], atol=1e-6)
  assert np.abs(got["slowmo"] - got["local_sgd"]).max() > 0.05


def test_a_schedule_that_has_ended_at_zero_does_no_harm():
  """γ = 0 after the first round: the rate of that round goes on dividing."""
  tx = slowmo(
    optax.sgd(1.0), sync_period=2, outer_momentum=0.0, inner_lr=lambda count: 0.5 * (count < 2)
  )

  @jax.jit
  def rounds(p):
    state = tx.init(p)
    for _ in range(4):
      updates, state = tx.update(jnp.ones(()), state, p)
      p = jaxcomm.apply_updates(p, updates, state)
    return p

  assert jax.vmap(rounds, axis_name="replica")(jnp.zeros(2)).tolist() == [-4.0, -4.0]


BAD = {
  "outer_lr": [0, -1.0, "fast", True],
  "outer_momentum": [1.0, -0.1],
  "inner_lr": [0.0, -0.3, lambda count: 0.1 * count],  # the last: 0 at the only step of round 1
  "sync_period": [0, 2.5],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_rejects(name, value):
  with pytest.raises(ValueError, match=f"`{name}` must be .*got"):
    slowmo(optax.sgd(0.1), **{"sync_period": 1, name: value})


def test_rejects_what_is_no_transform():
  with pytest.raises(ValueError, match="`mean` must be an optax transform"):
    slowmo(optax.sgd(0.1), sync_period=2, mean="exact")
  with pytest.raises(ValueError, match="`inner` must be an optax transform"):
    slowmo(0.1, sync_period=2)
