"""Means without the replicas that have NaN, or that a mask takes out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import (
  co2,
  compressed_mean,
  diloco,
  eager_diloco,
  int8,
  local_sgd,
  pmean_over,
  sgp,
  slowmo,
  streaming_diloco,
)
from jaxcomm.training import CheckpointError, Checkpoints, make_train_step
from jaxcomm.transforms import HealthyMeanState, healthy_mean

REPLICAS, SIZE = 4, 5
RNG = np.random.default_rng(0)
GRADS = {
  "a": RNG.normal(size=(REPLICAS, SIZE)).astype(np.float32),
  "b": RNG.normal(size=(REPLICAS, 2)).astype(jnp.bfloat16),
}


def broken(*where):
  """`GRADS` with these entries: (leaf, replica, value)."""
  grads = jax.tree.map(np.array, GRADS)
  for leaf, replica, value in where:
    grads[leaf][replica, 1] = value
  return grads


GIVEN = {
  "healthy": broken(),
  "one_nan": broken(("a", 2, np.nan)),
  "two_bad": broken(("b", 0, np.inf), ("a", 3, -np.inf)),
  "none": broken(*(("a", i, np.nan) for i in range(REPLICAS))),
}
LEFT_OUT = {"healthy": [], "one_nan": [2], "two_bad": [0, 3], "none": [0, 1, 2, 3]}
MASK = np.array([True, False, True, True])
TXS = {
  "plain": pmean_over("replica"),
  "skip": pmean_over("replica", skip_nonfinite=True),
  "skip_masked": pmean_over("replica", skip_nonfinite=True, alive=MASK),
  "masked": pmean_over("replica", alive=MASK),
  "int8": healthy_mean(compressed_mean("replica", int8(8)), "replica"),
}


@pytest.fixture(scope="module")
def results():
  """[transform][case] -> (means [R, ...], state), all from one program."""

  def replica(given):
    return {
      name: {case: tx.update(g, tx.init(g)) for case, g in given.items()}
      for name, tx in TXS.items()
    }

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(replica, axis_name="replica"))(GIVEN))


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("name", ["skip", "skip_masked", "int8"])
def test_the_mean_is_that_of_the_others(results, name, case):
  means, state = results[name][case]
  out = set(LEFT_OUT[case]) | ({1} if name == "skip_masked" else set())
  used = [i for i in range(REPLICAS) if i not in out]
  assert state.left_out.tolist() == [len(out)] * REPLICAS
  assert state.total_left_out.tolist() == [len(out)] * REPLICAS
  for leaf, rows in GIVEN[case].items():
    assert means[leaf].dtype == rows.dtype
    rows = rows.astype(np.float64)
    want = rows[used].mean(0) if used else np.zeros(rows.shape[1:])
    # Two hops of 8-bit codes: half a step of each row, and of their mean; times N / healthy.
    step = {"int8": 4 * np.abs(rows[used]).max(initial=0) / 127}.get(name, 0)
    tolerance = step + (2**-7 if leaf == "b" else 1e-6)
    np.testing.assert_allclose(means[leaf], np.broadcast_to(want, rows.shape), atol=tolerance)


def test_nothing_changes_where_all_are_healthy(results):
  plain, _ = results["plain"]["healthy"]
  jax.tree.map(np.testing.assert_array_equal, results["skip"]["healthy"][0], plain)
  assert np.isnan(results["plain"]["one_nan"][0]["a"]).any()  # what it is for


def test_a_mask_alone_lets_nan_through(results):
  means, state = results["masked"]["one_nan"]
  assert np.isnan(means["a"][:, 1]).all()
  assert state.left_out.tolist() == [1] * REPLICAS
  np.testing.assert_allclose(
    results["masked"]["healthy"][0]["a"][0], GRADS["a"][MASK].mean(0), atol=1e-6
  )


def test_a_run_goes_on_without_the_replica_that_broke(train):
  """Replica 1 meets an infinity in round 2; it is left out, and is back in round 3."""
  steps, period, rate = 6, 2, 0.3
  targets = RNG.normal(size=(REPLICAS, steps, SIZE)).astype(np.float32)
  targets[1, 2, 0] = np.inf
  start = np.ones(SIZE, np.float32)
  tx = local_sgd(
    optax.sgd(rate), sync_period=period, mean=pmean_over("replica", skip_nonfinite=True)
  )
  loss_fn = lambda p, target: 0.5 * jnp.sum((p - target) ** 2)  # noqa: E731
  got = train(tx, loss_fn, jnp.asarray(start), targets, context="shard_map")

  theta = start.astype(np.float64)
  for round_ in range(3):
    ends = [theta] * REPLICAS
    for t in range(round_ * period, (round_ + 1) * period):
      with np.errstate(invalid="ignore"):
        ends = [x - rate * (x - targets[i, t]) for i, x in enumerate(ends)]
    healthy = [x for x in ends if np.isfinite(x).all()]
    assert len(healthy) == (3 if round_ == 1 else 4)
    theta = np.mean(healthy, axis=0)
    for row in got.params[:, (round_ + 1) * period - 1]:
      np.testing.assert_allclose(row, theta, atol=1e-6)
  assert optax.tree.get(got.state.opt_state, "total_left_out") == 1
  assert optax.tree.get(got.state.opt_state, "left_out") == 0


@pytest.mark.slow
def test_the_mask_may_change_between_steps():
  """In the state, so that the compiled step of `make_train_step` sees it; and as an argument."""
  mesh = jax.make_mesh((4,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:4])  # fmt: skip
  mean = pmean_over("replica", alive=np.ones(4, bool))
  loss_fn = lambda p, batch: (0.5 * jnp.mean((p["w"] - batch["x"]) ** 2), {})  # noqa: E731
  step = make_train_step(
    loss_fn, lambda key: {"w": jnp.zeros(())}, optax.chain(mean, optax.sgd(1.0)), mesh
  )
  batch = {"x": np.arange(4, dtype=np.float32)}
  state, _ = step.step(step.init(jax.random.key(0)), batch)
  assert float(state.params["w"]) == 1.5
  mask = np.array([False, True, False, True])
  opt_state = jax.device_put(
    optax.tree.set(state.opt_state, alive=jnp.array(mask)), step.layout.shardings.opt_state
  )
  state, metrics = step.step(state.replace(opt_state=opt_state), batch)
  assert float(state.params["w"]) == 2.0
  assert metrics["total_left_out"].tolist() == [2.0] * 4
  assert step.step._cache_size() == 1
  assert (optax.tree.get(state.opt_state, "alive") == mask).all()

  by_argument = lambda g: mean.update(g, mean.init(g), alive=mask)[0]  # noqa: E731
  assert jax.vmap(by_argument, axis_name="replica")(jnp.arange(4.0)).tolist() == [2.0] * 4


ALL = np.ones(REPLICAS, bool)
SUM = optax.chain(pmean_over("replica", alive=ALL), optax.sgd(1.0))
# An outer step that is the mean, after every inner step, which goes to the target at once.
ROUNDS = {
  "local_sgd": local_sgd(optax.sgd(1.0), sync_period=1, mean=pmean_over("replica", alive=ALL)),
  "diloco": diloco(optax.sgd(1.0), SUM, sync_period=1),
  "slowmo": slowmo(
    optax.sgd(1.0), sync_period=1, outer_momentum=0.0, mean=pmean_over("replica", alive=ALL)
  ),
  "streaming_diloco": streaming_diloco(
    optax.sgd(1.0), SUM, sync_period=1, fragments=1, alpha=0.0
  ),
  "co2": co2(
    optax.sgd(1.0), sync_period=1, outer_momentum=0.0, gap=1.0,
    mean=pmean_over("replica", alive=ALL),
  ),
}  # fmt: skip


def test_a_mask_reaches_the_mean_of_every_method_with_rounds():
  """As an argument of update; what the dead replica learnt is in no mean."""

  def two_steps(target, alive):
    def run(tx):
      p, state = jnp.zeros(2), tx.init(jnp.zeros(2))
      for _ in range(2):  # co2 is one round late
        updates, state = tx.update(p - target, state, p, alive=alive)
        p = jaxcomm.apply_updates(p, updates, state)
      return p, optax.tree.get(state, "left_out")

    return {name: run(tx) for name, tx in ROUNDS.items()}

  targets = RNG.normal(size=(REPLICAS, 2)).astype(np.float32)
  got = jax.jit(jax.vmap(two_steps, in_axes=(0, None), axis_name="replica"))(targets, MASK)
  for name, (params, left_out) in got.items():
    want = np.broadcast_to(targets[MASK].mean(0), targets.shape)
    np.testing.assert_allclose(params, want, atol=1e-6, err_msg=name)
    assert left_out.tolist() == [1] * REPLICAS


@pytest.mark.parametrize("method", [diloco, streaming_diloco, eager_diloco])
def test_rejects_a_mask_that_no_mean_takes(method):
  tx = method(optax.sgd(1.0), sync_period=4)
  with pytest.raises(ValueError, match="`alive` needs a mean that can leave replicas out"):
    jax.vmap(lambda g: tx.update(g, tx.init(g), g, alive=MASK), axis_name="replica")(
      {k: jnp.ones((REPLICAS, 2)) for k in "abcd"}
    )


def masked_step(tx, replicas=REPLICAS):
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:1])  # fmt: skip
  loss_fn = lambda p, batch: (0.5 * jnp.mean((p["w"][None] - batch["x"][:, None]) ** 2), {})  # noqa: E731
  init = lambda key: {"w": jnp.zeros(5)}  # noqa: E731
  return make_train_step(loss_fn, init, tx, mesh, num_replicas=replicas)


@pytest.mark.parametrize(
  "make", [lambda inner: streaming_diloco(inner, sync_period=4, fragments=1), sgp]
)
def test_inner_optimizers_may_skip_steps_by_themselves(make):
  """Types of the two branches: what skips differs per replica, though it began equal."""
  step = masked_step(make(optax.apply_if_finite(optax.adam(0.1), 3)))
  assert all(jax.tree.leaves(step.layout.varying.opt_state.inner_state))


@pytest.mark.slow
def test_checkpoints_of_masked_and_of_sharded_runs_with_a_replica_fewer(tmp_path):
  """In the new run all are alive; parts of an outer state fit the old number only."""
  batch = {"x": np.arange(12, dtype=np.float32)}

  def masked(replicas):
    mean = pmean_over("replica", alive=np.ones(replicas, bool))
    return local_sgd(optax.adam(0.1), sync_period=2, mean=mean)

  def sharded(replicas):  # 5 entries in parts of 2, for four replicas and for three
    return co2(optax.adam(0.1), sync_period=2, outer_shards=replicas)

  for make in (masked, sharded):
    step, path = masked_step(make(4)), tmp_path / make.__name__
    state, _ = step.step(step.init(jax.random.key(0)), batch)
    if make is masked:
      state = state.replace(opt_state=optax.tree.set(state.opt_state, alive=jnp.array(MASK)))
    with Checkpoints(path, step.layout) as checkpoints:
      checkpoints.save(1, state, {})
    fewer = masked_step(make(3), 3)
    with Checkpoints(path, fewer.layout) as checkpoints:
      if make is sharded:
        with pytest.raises(CheckpointError, match="every replica keeps its own part of the outer"):
          checkpoints.restore(replica_change="average_replicas")
        assert checkpoints.steps == [1]
        continue
      restored = checkpoints.restore(replica_change="average_replicas").state
    assert optax.tree.get(restored.opt_state, "alive").tolist() == [True] * 3
    restored, metrics = fewer.step(restored, batch)
    assert metrics["total_left_out"].tolist() == [0.0] * 3


@pytest.mark.parametrize(
  "bad", [[1, 0], np.ones((2, 2), bool), np.zeros(4, bool), [True, 0.5], "yes"]
)
def test_rejects_what_is_no_mask(bad):
  with pytest.raises(ValueError, match=r"`alive` must be a vector of bool.*got"):
    pmean_over("replica", alive=bad)


def test_rejects_a_mask_of_another_size_and_no_mean():
  tx = pmean_over("replica", alive=np.ones(3, bool))
  with pytest.raises(ValueError, match=r"`alive` must have one entry.*4, got shape \(3,\)"):
    jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name="replica")(jnp.ones(4))
  with pytest.raises(ValueError, match="`mean` must be an optax transform"):
    healthy_mean(0.5, "replica")
  with pytest.raises(ValueError, match="`skip_nonfinite` must be True where `alive` is None"):
    healthy_mean(pmean_over("replica"), "replica", skip_nonfinite=False)
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  assert isinstance(tx.init(jnp.ones(2)), HealthyMeanState)
  assert pmean_over("replica").init(jnp.ones(2)) == optax.EmptyState()
  assert jaxcomm.just_synced(tx.init(jnp.ones(2))) is None
