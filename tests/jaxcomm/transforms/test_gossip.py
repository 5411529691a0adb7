"""What all methods share that average with neighbours: their wire, resuming, and the dead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import ad_psgd, adagossip, dfedsam, noloco, sgp
from jaxcomm.collectives import exponential, random_matching, ring
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step

N, STEPS = 4, 7
PARAMS = {
  "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
  "h": np.ones(6, jnp.bfloat16),
}
TREE = 4 * 12 + 2 * 6  # bytes, in the dtypes of the parameters
INNER = optax.adam(0.1)
# name -> (transform, bytes of an exchange, whether it has rounds)
METHODS = {
  "noloco": (noloco(INNER, sync_period=3), TREE, True),
  "noloco_both": (noloco(INNER, sync_period=3, consensus_lr=0.5), TREE + 4 * 18, True),
  "dfedsam": (dfedsam(INNER, exponential(), sync_period=3, gossip_steps=2), 2 * 2 * TREE, True),
  "sgp": (sgp(INNER), TREE + 4, False),
  "sgp_overlap": (sgp(INNER, overlap=True), TREE + 4, False),
  "ad_psgd": (ad_psgd(INNER, delay=2), TREE, False),
  "adagossip": (adagossip(INNER, ring(), consensus_lr=0.01), 2 * TREE, False),
}
FAST = {("noloco", "devices"), ("noloco", "vmap"), ("sgp_overlap", "devices")}


def loss_fn(params, batch):
  far = jax.tree.map(lambda p, x: p.astype(jnp.float32)[None] - x, params, batch)
  return sum(jnp.sum(f**2) for f in jax.tree.leaves(far)), {}


BATCHES = [
  {k: np.float32(np.random.default_rng(t).normal(size=(N, *p.shape))) for k, p in PARAMS.items()}
  for t in range(STEPS)
]


@functools.cache
def compiled_step(method, context):
  """The step of four replicas, and its program."""
  size = 1 if context == "vmap" else N
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((size,), ("replica",), axis_types=auto, devices=jax.devices()[:size])
  init = lambda key: jax.tree.map(jnp.asarray, PARAMS)  # noqa: E731
  step = make_train_step(loss_fn, init, METHODS[method][0], mesh, num_replicas=N)
  return step, step.compile(BATCHES[0])


def cells(contexts):
  return [
    pytest.param(m, c, marks=() if (m, c) in FAST else pytest.mark.slow, id=f"{m}-{c}")
    for m in METHODS
    for c in contexts
  ]


@pytest.mark.parametrize(("method", "context"), cells(["devices"]))
def test_sends_permutes_only_of_the_bytes_in_the_formula(method, context):
  step, compiled = compiled_step(method, context)
  report = collective_bytes(compiled, step.layout.mesh)
  _, sent, has_rounds = METHODS[method]
  assert {(op.kind, op.axis) for op in report.ops} == {("collective-permute", "replica")}
  assert report.total == sent
  assert report.by_axis_when(False).get("replica", 0.0) == (0 if has_rounds else sent)


@pytest.mark.parametrize(("method", "context"), cells(["vmap", "devices"]))
def test_resumes_bit_for_bit_at_every_step(method, context):
  """What a checkpoint holds is all there is, messages under way included."""
  step, compiled = compiled_step(method, context)
  batches = [jax.device_put(b, step.batch_sharding) for b in BATCHES]
  state, saved = step.init(jax.random.key(0)), []
  for batch in batches:
    saved.append(jax.tree.map(np.array, state))
    state, _ = compiled(state, batch)
  saved.append(jax.tree.map(np.array, state))
  for before, batch, after in zip(saved, batches, saved[1:]):
    restored = jax.tree.map(jax.device_put, before, step.layout.shardings)
    state, _ = compiled(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, state, after)
  for name, p in saved[-1].params.items():
    assert p.shape == (N, *PARAMS[name].shape)
    assert len(np.unique(p.reshape(N, -1), axis=0)) == N, name  # all differ


MASKED = {
  "noloco": noloco(optax.sgd(0.1), sync_period=1),
  "dfedsam": dfedsam(optax.sgd(0.1), ring(), sync_period=1, gossip_steps=3),
  "sgp": sgp(optax.sgd(0.1), exponential()),
  "sgp_overlap": sgp(optax.sgd(0.1), exponential(), overlap=True),
  "ad_psgd": ad_psgd(optax.sgd(0.1)),
  "adagossip": adagossip(optax.sgd(0.1), ring(), consensus_lr=0.01),
}


def test_the_dead_reach_nobody():
  """Replica 2 is dead and holds NaN; nobody waits for it, and the others still meet."""

  def two_steps(start, alive):
    def train(tx):
      p, state = start, tx.init(start)
      for _ in range(2):
        updates, state = tx.update(p, state, p, alive=alive)
        p = optax.apply_updates(p, updates)
      return p

    return {name: train(tx) for name, tx in MASKED.items()}

  fun = jax.jit(jax.vmap(two_steps, in_axes=(0, None), axis_name="replica"))
  start = np.asarray([[1.0, -3.0], [2.0, 0.5], [np.nan, np.nan], [4.0, 1.5]], np.float32)
  got = jax.tree.map(np.asarray, fun(start, np.asarray([True, True, False, True])))
  rest = [0, 1, 3]
  for name, p in got.items():
    assert np.isnan(p[2]).all(), name
    assert np.isfinite(p[rest]).all(), name
    alone = start[rest] * np.float32(0.9) ** 2  # had nobody met
    assert np.abs(p[rest] - alone).max() > 0.01, name


def traced(tx, size=4, dtype=jnp.float32, give_params=True, **extra):
  def update(p):
    return tx.update(p, tx.init(p), p if give_params else None, **extra)

  jax.eval_shape(jax.vmap(update, axis_name="replica"), jnp.zeros((size, 3), dtype))


def test_rejects_bad_input():
  alive = jnp.ones(4, bool)
  for tx in MASKED.values():
    with pytest.raises(ValueError, match=r"`alive` must be bool\[4\].*got bool\(3,\)"):
      traced(tx, alive=alive[:3])
    with pytest.raises(ValueError, match="`params` must be given to update"):
      traced(tx, give_params=False)
    with pytest.raises(ValueError, match="`params` must be floating-point arrays, got int32"):
      traced(tx, dtype=jnp.int32)
    with pytest.raises(ValueError, match="axis `replica` is unbound"):
      tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
  for tx in (
    dfedsam(optax.sgd(0.1), exponential(), sync_period=1),
    ad_psgd(optax.sgd(0.1), exponential()),
    adagossip(optax.sgd(0.1), exponential(), consensus_lr=0.1),
  ):
    with pytest.raises(ValueError, match="`alive` needs a symmetric `topology`, got Exponential"):
      traced(tx, alive=alive)
  traced(sgp(optax.sgd(0.1), random_matching()), size=5, alive=jnp.ones(5, bool))
