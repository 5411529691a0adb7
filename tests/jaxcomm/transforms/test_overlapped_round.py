"""A round as one program: the numbers of the simulated delay, and a collective that can overlap."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import co2, diloco, pmean_over
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import TrainState
from jaxcomm.training._layout import make_layout
from jaxcomm.transforms import co2_outer, delayed, overlapped_round

REPLICAS, SIZE, PERIOD, ROUNDS = 4, 5, 3, 4
OPTIONS = {"sync_period": PERIOD, "outer_momentum": 0.6, "clip_threshold": 0.3}
INNER = optax.adam(0.1)
RNG = np.random.default_rng(6)
TARGETS = RNG.normal(size=(REPLICAS, ROUNDS * PERIOD, SIZE)).astype(np.float32)
PARAMS = {"w": jnp.asarray(RNG.normal(size=SIZE), jnp.float32)}


def loss_fn(params, target):
  return jnp.sum(jnp.sin(params["w"] - target) ** 2)


def make_round(outer, inner=INNER):
  value_and_grad = jax.value_and_grad(loss_fn)
  return overlapped_round(value_and_grad, inner, outer, sync_period=PERIOD)


def run_rounds(round_fn, layout, state, targets):
  """`(state, params after every round [R, rounds, ...], losses [R, rounds, τ])`."""

  def one(state, batches):
    params, opt_state, losses = round_fn(state.params, state.opt_state, batches)
    new = TrainState(state.step + PERIOD, params, opt_state)
    return new, {"params": params, "losses": losses}

  def roll_out(state, batches):
    return jax.lax.scan(one, state, batches.reshape(-1, PERIOD, SIZE))

  rows = jnp.asarray(targets).reshape(-1, SIZE)
  state, metrics = jax.jit(layout.over_replicas(roll_out))(state, rows)
  return jax.tree.map(np.asarray, (state, metrics["params"]["w"], metrics["losses"]))


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_the_numbers_are_those_of_the_simulated_delay(train, context):
  """And the state too: half of the rounds are simulated, the others overlap."""
  tx = co2(INNER, **OPTIONS)
  whole = train(tx, loss_fn, PARAMS, TARGETS, context=context)
  half = TARGETS.shape[1] // 2
  first = train(tx, loss_fn, PARAMS, TARGETS[:, :half], context=context)
  state, params, losses = run_rounds(
    make_round(co2_outer(**OPTIONS)), first.layout, first.state, TARGETS[:, half:]
  )
  # Two programs: XLA may fuse products and sums in one and not in the other.
  ends = whole.params["w"][:, half + PERIOD - 1 :: PERIOD]
  np.testing.assert_allclose(params, ends, atol=1e-6)
  np.testing.assert_allclose(losses.reshape(REPLICAS, -1), whole.loss[:, half:], atol=2e-6)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
    np.testing.assert_allclose(x, np.asarray(y), atol=2e-6)


@pytest.fixture(scope="module")
def one_round():
  """`(fun, arguments)`: one round over the devices of a mesh, to be traced or compiled."""
  tx = co2(INNER, **OPTIONS)
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((REPLICAS,), ("replica",), axis_types=auto, devices=jax.devices()[:REPLICAS])
  layout = make_layout(lambda key: PARAMS, tx, mesh, None, REPLICAS)
  round_fn = make_round(co2_outer(**OPTIONS))

  def one(state, batches):
    params, opt_state, losses = round_fn(state.params, state.opt_state, batches)
    return TrainState(state.step, params, opt_state), losses

  rows = jax.ShapeDtypeStruct((REPLICAS * PERIOD, SIZE), jnp.float32)
  return layout.over_replicas(one), (layout.shapes, rows)


def test_the_exchange_and_the_inner_steps_do_not_wait_for_each_other(one_round):
  """In the traced program the psum reads nothing of the loop, and the loop nothing of the psum."""
  fun, args = one_round
  (outside,) = [e for e in jax.make_jaxpr(fun)(*args).eqns if e.primitive.name == "shard_map"]
  region = outside.params["jaxpr"]
  (loop,) = [e for e in region.eqns if e.primitive.name == "scan"]
  (mean,) = [e for e in region.eqns if "psum" in e.primitive.name]
  assert id(mean) not in makers(region, loop.invars)
  assert id(loop) not in makers(region, mean.invars)
  assert {id(mean), id(loop)} <= makers(region, region.outvars)


def makers(region, variables):
  """The identities of the equations of `region` that `variables` are computed by."""
  made_by = {var: eqn for eqn in region.eqns for var in eqn.outvars}
  found, todo = set(), list(variables)
  while todo:
    var = todo.pop()
    eqn = None if isinstance(var, jax.extend.core.Literal) else made_by.get(var)
    if eqn is not None and id(eqn) not in found:
      found.add(id(eqn))
      todo += eqn.invars
  return found


@pytest.mark.slow
def test_a_compiled_round_holds_one_mean_outside_the_loop(one_round):
  fun, args = one_round
  report = collective_bytes(jax.jit(fun).lower(*args).compile(), args[0].step.sharding.mesh)
  (op,) = report.ops
  assert (op.kind, op.axis) == ("all-reduce", "replica")
  assert report.always == report.total == 2 * (REPLICAS - 1) / REPLICAS * 4 * SIZE


@pytest.mark.slow
def test_any_outer_chain_may_be_late(train):
  """`diloco(inner, delayed(outer))` with a Nesterov step, against the same round as one program."""
  outer = optax.chain(pmean_over("replica"), optax.sgd(0.5, momentum=0.5, nesterov=True))
  tx = diloco(INNER, delayed(outer), sync_period=PERIOD)
  whole = train(tx, loss_fn, PARAMS, TARGETS)
  layout = whole.layout
  first = layout.stack(TrainState(jnp.zeros((), jnp.int32), PARAMS, tx.init(PARAMS)))
  _, params, _ = run_rounds(make_round(outer), layout, first, TARGETS)
  np.testing.assert_array_equal(params, whole.params["w"][:, PERIOD - 1 :: PERIOD])


def test_delayed_hands_over_what_it_got_before():
  tx = delayed(optax.scale(2.0))
  state = tx.init(jnp.zeros(2, jnp.bfloat16))
  assert state.inflight.dtype == jnp.float32
  seen = []
  for value in (1.0, 2.0, 3.0):
    out, state = tx.update(jnp.full(2, value), state)
    seen.append(float(out[0]))
  assert seen == [0.0, 2.0, 4.0]


def test_rejects():
  value_and_grad = jax.value_and_grad(loss_fn)
  mean = pmean_over("replica")
  for bad in (0, 2.5, None):
    with pytest.raises(ValueError, match="`sync_period` must be an integer >= 1, got"):
      overlapped_round(value_and_grad, INNER, mean, sync_period=bad)
  with pytest.raises(ValueError, match="`inner` must be an optax transform"):
    overlapped_round(value_and_grad, 0.1, mean, sync_period=2)
  with pytest.raises(ValueError, match="`outer` must be an optax transform"):
    overlapped_round(value_and_grad, INNER, 0.1, sync_period=2)
  with pytest.raises(ValueError, match="`outer` must be an optax transform"):
    delayed(0.1)

  def run(tx, num_steps):
    round_fn = make_round(co2_outer(**OPTIONS))
    batches = jnp.zeros((2, num_steps, SIZE))
    return jax.eval_shape(
      jax.vmap(lambda b: round_fn(PARAMS, tx.init(PARAMS), b)[0], axis_name="replica"), batches
    )

  late = co2(INNER, **OPTIONS)
  assert run(late, PERIOD)["w"].shape == (2, SIZE)
  with pytest.raises(ValueError, match=r"`batches` must be .*`sync_period`=3 .*got .*\(2,\)"):
    run(late, 2)
  with pytest.raises(ValueError, match="`state` must be that of co2"):
    run(diloco(INNER, sync_period=PERIOD), PERIOD)
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    make_round(mean)(PARAMS, late.init(PARAMS), jnp.zeros((PERIOD, SIZE)))
