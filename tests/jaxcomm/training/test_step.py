"""The training step: what differs per replica, where it lives, and that meshes agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm import compressed_mean, diloco, e3m0, int8, local_sgd, pmean_over
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step

AxisType = jax.sharding.AxisType
P = jax.P
AXES = ("replica", "data", "fsdp")
WIDTH, ROWS, STEPS = 16, 16, 7
SPECS = {"w": P(None, "fsdp"), "b": P("fsdp"), "v": P("fsdp")}


def make_mesh(shape, kind=AxisType.Auto, names=AXES):
  devices = jax.devices()[: int(np.prod(shape))]
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape), devices=devices)


def init_params(key):
  """Numbers without a generator, which would take longest to compile."""
  del key
  rng = np.random.default_rng(7)
  return {
    "w": jnp.asarray(rng.normal(size=(4, WIDTH)), jnp.float32),
    "b": jnp.zeros(WIDTH),
    "v": jnp.asarray(rng.normal(size=(WIDTH, 2)) / WIDTH, jnp.float32),
  }


def loss_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
  loss = jnp.mean((hidden @ params["v"] - batch["y"]) ** 2)
  return loss, {"tokens": jnp.asarray(batch["x"].shape[0], jnp.float32)}


def make_batch(step=0, rows=ROWS):
  rng = np.random.default_rng(step)
  x = rng.normal(size=(rows, 4)).astype(np.float32)
  return {"x": x, "y": np.sin(x[:, :2])}


def make_step(tx, shape=(4, 1, 1), kind=AxisType.Auto, **kwargs):
  kwargs = {"param_specs": SPECS} | kwargs
  return make_train_step(loss_fn, init_params, tx, make_mesh(shape, kind), **kwargs)


def differing(train_step):
  """Paths of the leaves that are stored per replica."""
  flat = jax.tree.leaves_with_path(train_step.layout.varying)
  return {jax.tree_util.keystr(path) for path, varies in flat if varies}


def each(prefix):
  return {f"{prefix}['{name}']" for name in SPECS}


def feedback(compressor):
  return compressed_mean("replica", compressor, error_feedback=True, specs=P())


ADAM = each(".opt_state.inner_state[0].mu") | each(".opt_state.inner_state[0].nu")
LOCAL = each(".params") | ADAM
OUTER_FEEDBACK = optax.chain(feedback(e3m0(8)), optax.sgd(0.7, momentum=0.9, nesterov=True))
DIFFERING = {
  "ddp": (optax.chain(pmean_over("replica"), optax.adam(0.1)), set()),
  "ddp, rounded": (optax.chain(compressed_mean("replica", int8(8)), optax.adam(0.1)), set()),
  "ddp, feedback": (
    optax.chain(feedback(int8(8)), optax.adam(0.1)),
    each(".opt_state[0].residual"),
  ),
  "clipped before": (
    optax.chain(optax.clip_by_global_norm(1.0), pmean_over("replica"), optax.adam(0.1)),
    set(),
  ),
  "local_sgd": (local_sgd(optax.adam(0.1), sync_period=3), LOCAL),
  "diloco": (diloco(optax.adam(0.1), sync_period=3), LOCAL),
  "diloco, feedback": (
    diloco(optax.adam(0.1), OUTER_FEEDBACK, sync_period=3),
    LOCAL | each(".opt_state.outer_state[0].residual"),
  ),
  "in a chain": (
    optax.chain(optax.clip(1.0), diloco(optax.adam(0.1), sync_period=3)),
    {path.replace(".opt_state", ".opt_state[1]") for path in LOCAL},
  ),
  "no communication": (
    optax.adam(0.1),
    each(".params") | each(".opt_state[0].mu") | each(".opt_state[0].nu"),
  ),
}


@pytest.mark.parametrize("method", DIFFERING)
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 1)])
def test_only_what_differs_is_stored_per_replica(method, shape):
  tx, want = DIFFERING[method]
  ts = make_step(tx, shape, num_replicas=4)
  assert differing(ts) == want
  one = jax.eval_shape(lambda: (p := init_params(jax.random.key(0)), tx.init(p)))
  got = (ts.layout.shapes.params, ts.layout.shapes.opt_state)
  varying = (ts.layout.varying.params, ts.layout.varying.opt_state)
  for x, stored, varies in zip(*map(jax.tree.leaves, (one, got, varying))):
    assert stored.shape == ((4, *x.shape) if varies else x.shape)
    over_replicas = bool(stored.sharding.spec) and stored.sharding.spec[0] == "replica"
    assert over_replicas == (varies and shape[0] == 4)


def test_state_is_sharded_like_its_parameters():
  ts = make_step(diloco(optax.adam(0.1), sync_period=3), (2, 1, 2))
  state = ts.init(jax.random.key(0))
  specs = jax.tree.map(lambda x: x.sharding.spec, state)
  assert specs.params == {k: P("replica", *s) for k, s in SPECS.items()}
  assert specs.opt_state.anchor == SPECS
  assert specs.opt_state.inner_state[0].mu == specs.params
  assert specs.opt_state.outer_state[1][0].trace == SPECS
  assert specs.opt_state.count == P()
  # No device holds more than its part.
  assert state.params["w"].addressable_shards[0].data.shape == (1, 4, WIDTH // 2)
  assert state.opt_state.anchor["v"].addressable_shards[0].data.shape == (WIDTH // 2, 2)


def test_factored_moments_are_replicated():
  """They are trees like the parameters, but of other shapes."""
  tx = diloco(optax.adafactor(0.1, min_dim_size_to_factor=1), sync_period=3)
  ts = make_step(tx, (2, 1, 2))
  factored = ts.layout.shapes.opt_state.inner_state[0].v_row
  assert factored["v"].shape == (2, 2)
  assert factored["v"].sharding.spec == P("replica")


CURVES = {
  "devices": ((4, 1, 1), AxisType.Auto),
  "data": ((4, 2, 1), AxisType.Auto),
  "fsdp": ((4, 1, 2), AxisType.Auto),
  "stacked": ((1, 1, 1), AxisType.Auto),
  "stacked data": ((1, 2, 1), AxisType.Auto),
  "stacked fsdp": ((1, 1, 2), AxisType.Auto),
  "explicit devices": ((4, 1, 1), AxisType.Explicit),
  "explicit data": ((4, 2, 1), AxisType.Explicit),
  "explicit fsdp": ((4, 1, 2), AxisType.Explicit),
}


def curve(tx, shape, kind):
  """Losses [T, R], evaluation, and parameters after STEPS steps (one into a round)."""
  ts = make_step(tx, shape, kind, num_replicas=4)
  state, losses = ts.init(jax.random.key(0)), []
  for step in range(STEPS):
    state, metrics = ts.step(state, make_batch(step))
    losses.append(np.asarray(metrics["loss"]))  # waits: XLA:CPU must not have many in flight
    assert bool(metrics["synced"]) == (step % 3 == 2)
  assert int(state.step) == STEPS
  evaluation = jax.tree.map(np.asarray, ts.evaluate(state, make_batch(99)))
  assert ts.step._cache_size() == 1
  return np.stack(losses), evaluation, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def reference_curve():
  return curve(diloco(optax.adam(0.05), sync_period=3), *CURVES["devices"])


QUICK = ("stacked", "stacked data", "data", "explicit fsdp")


@pytest.mark.parametrize(
  "place",
  [
    place if place in QUICK else pytest.param(place, marks=pytest.mark.slow)
    for place in CURVES
    if place != "devices"
  ],
)
def test_loss_curves_agree_on_all_meshes(reference_curve, place):
  losses, evaluation, params = reference_curve
  assert losses.shape == (STEPS, 4)
  assert len(np.unique(losses)) == losses.size  # every replica has its own rows
  start = init_params(jax.random.key(0))
  assert all(np.abs(params[k] - start[k][None]).max() > 0.05 for k in params)  # it moved
  got = curve(diloco(optax.adam(0.05), sync_period=3), *CURVES[place])
  np.testing.assert_allclose(got[0], losses, rtol=1e-5)
  np.testing.assert_allclose(got[1]["loss_sum"], evaluation["loss_sum"], rtol=1e-5)
  np.testing.assert_array_equal(got[1]["tokens"], evaluation["tokens"])
  for name, want in params.items():
    np.testing.assert_allclose(got[2][name], want, atol=1e-5)


def test_metrics_and_rows_are_those_of_each_replica():
  """Replica r sees rows r B/R to (r+1) B/R, stacked or not."""
  batch = make_batch()
  for shape in ((4, 1, 1), (1, 1, 1)):
    ts = make_step(optax.chain(pmean_over("replica"), optax.sgd(0.1)), shape, num_replicas=4)
    state = ts.init(jax.random.key(0))
    params = jax.tree.map(np.asarray, state.params)
    state, metrics = ts.step(state, batch)
    for replica in range(4):
      part = {k: x[4 * replica : 4 * replica + 4] for k, x in batch.items()}
      want, aux = jax.jit(loss_fn)(params, part)
      np.testing.assert_allclose(metrics["loss"][replica], want, rtol=1e-5)
      assert metrics["tokens"][replica] == aux["tokens"] == 4
    assert "synced" not in metrics  # the method has no rounds
    # One step of the mean gradient: that of the whole batch.
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch)[0]))(params)
    for name, grad in grads.items():
      np.testing.assert_allclose(state.params[name], params[name] - 0.1 * grad, atol=1e-6)


def test_evaluates_outer_parameters_in_the_middle_of_a_round():
  ts = make_step(diloco(optax.sgd(0.5), sync_period=10))
  state = ts.init(jax.random.key(0))
  start = jax.tree.map(np.asarray, state.opt_state.anchor)
  for step in range(2):
    state, _ = ts.step(state, make_batch(step))
  batch = make_batch(9)
  got = ts.evaluate(state, batch)
  for replica in range(4):
    part = {k: x[4 * replica : 4 * replica + 4] for k, x in batch.items()}
    want, aux = jax.jit(loss_fn)(start, part)
    np.testing.assert_allclose(got["loss_sum"][replica], want * aux["tokens"], rtol=1e-5)
  assert np.abs(np.asarray(state.params["w"]) - start["w"][None]).max() > 1e-3


def test_nothing_crosses_replicas_but_what_the_transform_sends():
  ts = make_step(optax.adam(0.1), (2, 2, 1))
  report = collective_bytes(ts.compile(make_batch()), ts.layout.mesh)
  assert set(report.by_axis) == {"data"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_state_is_not_gathered_whole(kind):
  """A gather of parameters for the forward pass is FSDP's; one of moments or anchor is a bug."""
  ts = make_step(diloco(optax.adam(0.1), sync_period=3), (2, 1, 2), kind)
  report = collective_bytes(ts.compile(make_batch()), ts.layout.mesh)
  gathered = [op.shape for op in report.ops if op.kind == "all-gather" and op.axis == "fsdp"]
  shards = [(4, WIDTH // 2), (WIDTH // 2,), (WIDTH // 2, 2)]
  assert all(gathered.count(shard) <= 1 for shard in shards), gathered


def test_stacked_replicas_share_each_device_evenly():
  """Rows of each replica are spread over devices: only gradients are summed, nothing gathered."""
  tx = diloco(optax.adam(0.1), sync_period=3)
  ts = make_step(tx, (1, 2, 1), num_replicas=4)
  report = collective_bytes(ts.compile(make_batch()), ts.layout.mesh)
  assert report.conditional == 0  # a round's end needs no other device
  assert not [op for op in report.ops if op.kind == "all-gather"]
  summed = [op.shape for op in report.ops if op.kind == "all-reduce"]
  assert max(int(np.prod(shape)) for shape in summed) == 4 * 4 * WIDTH


def test_masked_partitioned_and_wrapped_transforms_train():
  labels = {"w": "local", "b": "ddp", "v": "local"}
  ddp = optax.chain(pmean_over("replica"), optax.adam(0.05))
  tx = optax.partition({"local": diloco(optax.sgd(0.1), sync_period=2), "ddp": ddp}, labels)
  ts = make_step(optax.chain(optax.clip_by_global_norm(1.0), tx), (2, 1, 2))
  assert differing(ts) == {".params['w']", ".params['v']"}
  state = ts.init(jax.random.key(0))
  synced = []
  for step in range(4):
    state, metrics = ts.step(state, make_batch(step))
    synced.append(bool(metrics["synced"]))
  assert synced == [False, True, False, True]
  w = np.asarray(state.params["w"])
  np.testing.assert_array_equal(w[0], w[1])
  assert ts.evaluate(state, make_batch())["loss_sum"].shape == (2,)


@pytest.mark.parametrize(
  "tx",
  [
    diloco(optax.contrib.muon(0.1), sync_period=2),
    optax.inject_hyperparams(diloco)(optax.adam(0.1), sync_period=2),
    optax.chain(
      pmean_over("replica"), optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    ),
    optax.masked(local_sgd(optax.lion(0.1), sync_period=2), {"w": True, "b": False, "v": True}),
  ],
  ids=["muon", "injected", "multi_steps", "masked"],
)
def test_other_transforms_get_a_layout(tx):
  ts = make_step(tx, (2, 1, 2))
  batch = ts.abstract_batch(make_batch())
  state, metrics = jax.eval_shape(ts.step, ts.layout.shapes, batch)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, ts.layout.shapes)
  assert metrics["loss"].shape == (2,)


def test_rows_of_this_process():
  ts = make_step(optax.sgd(0.1), (2, 2, 1))
  assert ts.local_rows(16) == {"row_start": 0, "row_count": 16}
  assert ts.batch_sharding.spec == P(AXES)
  for bad in (0, -4, 6):
    with pytest.raises(ValueError, match=rf"`batch_size` must be .*4 devices.*got {bad}"):
      ts.local_rows(bad)
  stacked = make_step(optax.sgd(0.1), (1, 1, 1), num_replicas=4)
  with pytest.raises(ValueError, match=r"1 devices that share its rows and the 4 replicas, got 6"):
    stacked.local_rows(6)


def test_devices_of_a_sequence_or_a_matrix_share_rows():
  mesh = make_mesh((2, 2, 2), names=("replica", "seq", "tensor"))
  ts = make_train_step(loss_fn, init_params, optax.sgd(0.1), mesh)
  assert ts.batch_sharding.spec == P(("replica",), "seq")
  assert ts.local_rows(2) == {"row_start": 0, "row_count": 2}


def test_rejects_a_mesh_without_replicas():
  mesh = make_mesh((2, 1), names=("data", "fsdp"))
  with pytest.raises(ValueError, match=r"`mesh` must have an axis 'replica', got axes \('data'"):
    make_train_step(loss_fn, init_params, optax.sgd(0.1), mesh)


@pytest.mark.parametrize("num_replicas", [2, 8])
def test_rejects_another_number_of_replicas_than_the_mesh_has(num_replicas):
  with pytest.raises(ValueError, match=rf"size 1 or `num_replicas`={num_replicas}, got 4"):
    make_step(optax.sgd(0.1), (4, 1, 1), num_replicas=num_replicas)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_rejects_a_bad_number_of_replicas(bad):
  with pytest.raises(ValueError, match=rf"`num_replicas` must be an integer >= 1, got {bad}"):
    make_step(optax.sgd(0.1), (1, 1, 1), num_replicas=bad)


def test_rejects_stacking_on_an_explicit_mesh():
  with pytest.raises(ValueError, match=r"stacked .* `mesh` of Auto axes"):
    make_step(optax.sgd(0.1), (1, 1, 2), AxisType.Explicit, num_replicas=4)


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 1, 1)])
def test_rejects_an_outer_chain_without_a_mean(shape):
  """Also where replicas are stacked, and `jax.vmap` itself would not notice."""
  tx = diloco(optax.sgd(0.1), optax.sgd(0.7), sync_period=2)
  with pytest.raises(ValueError, match="`outer` must average over axis `replica`"):
    make_step(tx, shape, num_replicas=4)


def test_rejects_a_mean_over_another_axis():
  with pytest.raises(ValueError, match="axis `clients` is unbound"):
    make_step(optax.chain(pmean_over("clients"), optax.sgd(0.1)))


def test_rejects_missing_specs():
  tx = optax.chain(compressed_mean("replica", int8()), optax.sgd(0.1))
  with pytest.raises(ValueError, match=r"`specs` must say .*automatic mesh axes \{'fsdp': 2\}"):
    make_step(tx, (2, 1, 2))


@pytest.mark.parametrize(
  "tx",
  [
    optax.MultiSteps(diloco(optax.sgd(0.1), sync_period=2), 2),
    diloco(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(), sync_period=2),
  ],
  ids=["around", "inside"],
)
def test_rejects_multi_steps_over_values_that_differ(tx):
  with pytest.raises(ValueError, match=r"`tx` must not hold optax\.MultiSteps .*`loss_fn`"):
    make_step(tx)


def skip_large(inner):
  """A wrapper that lets each replica decide alone whether to take a step."""

  def update(updates, state, params=None):
    new_updates, new_state = inner.update(updates, state, params)
    fine = optax.tree.norm(updates) < 1
    return new_updates, jax.tree.map(lambda a, b: jnp.where(fine, a, b), new_state, state)

  return optax.GradientTransformation(inner.init, update)


def test_rejects_rounds_that_replicas_end_alone():
  with pytest.raises(ValueError, match=r"`tx` must end rounds on all replicas at once"):
    make_step(skip_large(diloco(optax.sgd(0.1), sync_period=2)))
  ts = make_step(diloco(skip_large(optax.adam(0.1)), sync_period=2))  # inside, it may
  assert ".opt_state.inner_state[0].count" in differing(ts)


@pytest.mark.parametrize("shape", [pytest.param((2, 1, 1), marks=pytest.mark.slow), (1, 1, 1)])
def test_replicas_skip_inner_steps_alone(shape):
  """A gradient that is not finite stops one replica for a step, and no round."""
  tx = diloco(optax.apply_if_finite(optax.adam(0.1), 3), sync_period=2)
  ts = make_step(tx, shape, num_replicas=2)
  assert ".opt_state.synced" not in differing(ts)
  state, batch = ts.init(jax.random.key(0)), make_batch()
  batch["x"][:8, 0] = np.nan  # rows of the first replica
  start = np.asarray(state.params["w"])
  state, metrics = ts.step(state, batch)
  assert state.opt_state.inner_state.total_notfinite.tolist() == [1, 0]
  assert state.opt_state.inner_state.inner_state[0].count.tolist() == [0, 1]
  w = np.asarray(state.params["w"])
  np.testing.assert_array_equal(w[0], start[0])
  assert np.abs(w[1] - start[1]).min() > 0.01
  state, metrics = ts.step(state, make_batch(1))
  assert bool(metrics["synced"])
  w = np.asarray(state.params["w"])
  np.testing.assert_array_equal(w[0], w[1])
  assert np.isfinite(w).all()


@pytest.mark.parametrize(
  "tx",
  [
    diloco(optax.sgd(0.1), sync_period=2),
    optax.chain(pmean_over("replica"), optax.sgd(0.1)),
    optax.chain(compressed_mean("replica", int8(), error_feedback=True), optax.adam(0.1)),
    optax.sgd(0.1),
  ],
  ids=["diloco", "ddp", "int8", "none"],
)
def test_rejects_methods_that_a_replica_may_skip(tx):
  with pytest.raises(ValueError, match=r"must not hold optax\.apply_if_finite around .*`inner`"):
    make_step(optax.apply_if_finite(tx, 3))


def test_steps_may_be_skipped_behind_the_mean():
  tx = optax.chain(pmean_over("replica"), optax.apply_if_finite(optax.adam(0.1), 3))
  assert differing(make_step(tx)) == set()


def test_averages_survive_in_the_step():
  """The step's own `apply_updates`: replicas hold the same bits when a round ends."""
  ts = make_step(diloco(optax.adam(0.1), sync_period=2))
  state = ts.init(jax.random.key(0))
  for step in range(2):
    state, metrics = ts.step(state, make_batch(step))
  assert bool(metrics["synced"])
  outer = jaxcomm.outer_params(state.opt_state)
  for name, p in state.params.items():
    np.testing.assert_array_equal(p, np.broadcast_to(outer[name], p.shape))


@pytest.mark.parametrize("size", [1, 2])
def test_loss_of_the_step(size):
  """The loss gets the steps taken so far, on replicas of their own and on stacked ones."""

  def loss(params, batch, step):
    return jnp.sum(params * batch) * (1.0 + step), {"seen": step}

  made = make_train_step(
    loss, lambda key: jnp.ones(()), pmean_over("replica"), make_mesh((size,), names=("replica",)),
    num_replicas=2, eval_loss_fn=lambda p, b: (p, {}), step_in_loss=True,
  )  # fmt: skip
  state = made.init(jax.random.key(0))
  for count in range(2):
    state, metrics = made.step(state, jnp.ones(2))
    assert metrics["seen"].tolist() == [count] * 2
  assert float(state.params) == 1 + 1 + 2  # the transform keeps the gradient's sign
  with pytest.raises(ValueError, match="`eval_loss_fn` must be given with `step_in_loss`"):
    make_train_step(loss, init_params, pmean_over("replica"), make_mesh((1,), names=("replica",)),
                    step_in_loss=True)  # fmt: skip
