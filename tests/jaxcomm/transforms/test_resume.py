"""Every method with rounds or neighbours: what its program sends, and what its state must hold.

A run that stops after any step and goes on from its state does what it would have done; so does,
after a named change, a run that lost a replica.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import (
  ad_psgd,
  adagossip,
  co2,
  compressed_mean,
  dfedsam,
  diloco,
  e3m0,
  eager_diloco,
  int4,
  local_sgd,
  noloco,
  pmean_over,
  sgp,
  slowmo,
  streaming_diloco,
)
from jaxcomm.collectives import compressed_pmean_bytes, exponential, random_matching, ring
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import average_replicas, make_train_step
from jaxcomm.transforms import (
  async_local_sgd,
  decoupled_diloco,
  simulate_async,
  simulate_quorum,
)

REPLICAS, STEPS, ROWS = 4, 7, 12
PARAMS = {"w": np.linspace(3, 5, 16, dtype=np.float32), "h": np.full(6, 4, jnp.bfloat16)}
TREE = 4 * 16 + 2 * 6  # bytes, in the dtypes of the parameters
MEAN = 2 * (REPLICAS - 1) / REPLICAS * 4 * (16 + 6)  # of float32, in a ring
INNER = optax.adam(0.1)


class Method(NamedTuple):
  """A transform, the collectives of its program, and the bytes of its largest exchange."""

  tx: Any
  kinds: set[str]
  sent: float
  every_step: bool = False  # else nothing between exchanges


def nesterov_after(mean):
  return optax.chain(mean, optax.sgd(0.7, momentum=0.5, nesterov=True))


def feedback(compressor):
  return compressed_mean("replica", compressor, error_feedback=True)


def coded(compressor, *names):
  return sum(compressed_pmean_bytes(PARAMS[n].shape, REPLICAS, compressor) for n in names)


def quorum():
  return simulate_quorum(
    [1, 1, 1, 2], num_ticks=STEPS, sync_period=4, num_fragments=2, quorum=3, grace_seconds=1
  )


SUM, CODES, PERMUTE = {"all-reduce"}, {"all-to-all", "all-gather"}, {"collective-permute"}
METHODS = {
  "local_sgd": Method(local_sgd(INNER, sync_period=3), SUM, MEAN),
  "diloco": Method(diloco(INNER, nesterov_after(pmean_over("replica")), sync_period=3), SUM, MEAN),
  "slowmo": Method(slowmo(INNER, sync_period=3, inner_lr=0.1), SUM, MEAN),
  "co2": Method(co2(INNER, sync_period=2, clip_threshold=1.0), SUM, MEAN),
  "eager_diloco": Method(
    eager_diloco(INNER, optax.sgd(0.7), sync_period=3, mean=feedback(int4(8))),
    CODES,
    coded(int4(8), "w", "h"),
  ),
  # One leaf is one fragment.
  "streaming_diloco": Method(
    streaming_diloco(INNER, nesterov_after(feedback(e3m0(8))), sync_period=6, fragments=2, delay=2),
    CODES,
    coded(e3m0(8), "w"),
  ),
  "decoupled_diloco": Method(
    decoupled_diloco(INNER, nesterov_after(pmean_over("replica")), schedule=quorum()),
    SUM,
    MEAN * 16 / 22,
  ),
  "async_local_sgd": Method(
    async_local_sgd(INNER, schedule=simulate_async([1, 1, 1, 2], num_ticks=STEPS, sync_period=3)),
    SUM,
    MEAN,
  ),
  "noloco": Method(noloco(INNER, sync_period=3, allow_idle=True), PERMUTE, TREE),
  "noloco_both": Method(
    noloco(INNER, sync_period=3, consensus_lr=0.5, allow_idle=True), PERMUTE, TREE + 4 * 22
  ),
  "dfedsam": Method(
    dfedsam(INNER, exponential(), sync_period=3, gossip_steps=2), PERMUTE, 2 * 2 * TREE
  ),
  "sgp": Method(sgp(INNER, ring()), PERMUTE, 2 * (TREE + 4), True),
  "sgp_overlap": Method(sgp(INNER, overlap=True), PERMUTE, TREE + 4, True),
  "ad_psgd": Method(ad_psgd(INNER, random_matching(), delay=2), PERMUTE, TREE, True),
  "adagossip": Method(adagossip(INNER, ring(), consensus_lr=0.01), PERMUTE, 2 * TREE, True),
}
GOSSIP = [name for name, method in METHODS.items() if method.kinds == PERMUTE]
CLOCKED = ("decoupled_diloco", "async_local_sgd")  # their schedules are of so many replicas
FAST = ("diloco", "streaming_diloco", "noloco", "sgp_overlap")
some_slow = [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


def loss_fn(params, batch):
  far = jax.tree.map(lambda p, x: p.astype(jnp.float32)[None] - x, params, batch)
  return sum(jnp.mean(f**2) for f in jax.tree.leaves(far)), {}


BATCHES = [
  {k: np.float32(np.random.default_rng(t).normal(size=(ROWS, *p.shape))) for k, p in PARAMS.items()}
  for t in range(STEPS)
]


@functools.cache
def compiled_step(method, context, replicas=REPLICAS):
  """The step, and its program."""
  size = 1 if context == "vmap" else replicas
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((size,), ("replica",), axis_types=auto, devices=jax.devices()[:size])
  init = lambda key: jax.tree.map(jnp.asarray, PARAMS)  # noqa: E731
  step = make_train_step(loss_fn, init, METHODS[method].tx, mesh, num_replicas=replicas)
  return step, step.compile(BATCHES[0])


@functools.cache
def saved_states(method, context):
  """A host copy of every state, from before the first step: as a checkpoint has it."""
  step, compiled = compiled_step(method, context)
  state, saved = step.init(jax.random.key(0)), []
  for batch in BATCHES:
    saved.append(jax.tree.map(np.array, state))
    state, _ = compiled(state, jax.device_put(batch, step.batch_sharding))
  return [*saved, jax.tree.map(np.array, state)]


@pytest.mark.parametrize("method", some_slow)
def test_the_program_holds_the_collectives_of_the_method_only(method):
  step, compiled = compiled_step(method, "shard_map")
  report, (_, kinds, sent, every_step) = (
    collective_bytes(compiled, step.layout.mesh),
    METHODS[method],
  )
  assert {(op.kind, op.axis) for op in report.ops} == {(kind, "replica") for kind in kinds}
  assert report.total == sent
  assert report.by_axis_when(False).get("replica", 0.0) == (sent if every_step else 0.0)


@pytest.mark.parametrize("context", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", some_slow)
def test_resumes_bit_for_bit_at_every_step(method, context):
  """What a checkpoint holds is all there is: fragments, delays and messages under way included."""
  step, compiled = compiled_step(method, context)
  saved = saved_states(method, context)
  for before, batch, after in zip(saved, BATCHES, saved[1:]):
    restored = jax.tree.map(jax.device_put, before, step.layout.shardings)
    state, _ = compiled(restored, jax.device_put(batch, step.batch_sharding))
    jax.tree.map(np.testing.assert_array_equal, state, after)
  params = saved[-1].params["w"]
  assert params.shape == (REPLICAS, 16)
  assert (params != PARAMS["w"][None]).all()
  if method in GOSSIP:
    assert len(np.unique(params, axis=0)) == REPLICAS  # none ever holds the mean


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:one_peer_exponential")
@pytest.mark.parametrize("method", [m for m in METHODS if m not in CLOCKED])
def test_goes_on_without_a_replica_that_was_lost(method):
  """From the middle of a round: the mean of what was there is where the rest goes on from."""
  state = saved_states(method, "vmap")[4]
  step, compiled = compiled_step(method, "vmap", REPLICAS - 1)
  before = average_replicas(jax.tree.map(jnp.asarray, state), step.layout)
  for name, p in state.params.items():
    mean = np.mean(p.astype(np.float32), 0)
    np.testing.assert_allclose(before.params[name].astype(jnp.float32)[2], mean, rtol=2**-8)
  losses, state = [], before
  for _ in range(12):
    state, metrics = compiled(state, jax.device_put(BATCHES[0], step.batch_sharding))
    losses.append(float(metrics["loss"].mean()))
  assert state.params["w"].shape == (REPLICAS - 1, 16)
  assert losses[-1] < losses[0]


def test_a_schedule_of_learners_is_of_so_many():
  with pytest.raises(ValueError, match="`schedule` must be of as many learners as axis"):
    compiled_step("decoupled_diloco", "vmap", REPLICAS - 1)
