"""A run that stops after any step and goes on from its state does what it would have done."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import compressed_mean, e3m0, eager_diloco, int4, streaming_diloco
from jaxcomm.training import make_train_step
from jaxcomm.transforms import decoupled_diloco, simulate_quorum

REPLICAS, STEPS = 4, 9


def outer(compressor):
  mean = compressed_mean("replica", compressor, error_feedback=True)
  return optax.chain(mean, optax.sgd(0.7, momentum=0.9, nesterov=True))


def quorum():
  return simulate_quorum(
    [1, 1, 1, 2], num_ticks=STEPS, sync_period=4, num_fragments=2, quorum=3, grace_seconds=1
  )


# name -> a transform whose rounds the steps cut in every place
METHODS = {
  "streaming_diloco": lambda: streaming_diloco(
    optax.adam(0.1), outer(e3m0(8)), sync_period=6, fragments=2, delay=2
  ),
  "eager_diloco": lambda: eager_diloco(
    optax.adam(0.1), sync_period=3, mean=compressed_mean("replica", int4(8), error_feedback=True)
  ),
  "decoupled_diloco": lambda: decoupled_diloco(optax.adam(0.1), outer(int4(8)), schedule=quorum()),
}


def loss_fn(params, batch):
  far = (params["w"][None] - batch["x"], params["b"][None] - batch["x"][:, :3])
  return sum(jnp.mean(jnp.square(x)) for x in far), {}


@pytest.mark.parametrize("context", ["shard_map", pytest.param("vmap", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
  "method",
  [m if m == "streaming_diloco" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS],
)
def test_resumes_after_any_step(method, context):
  """Each step from a host copy of the state before, one leaf at a time, as a checkpoint has it."""
  size = 1 if context == "vmap" else REPLICAS
  kind = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((size,), ("replica",), axis_types=kind, devices=jax.devices()[:size])
  init = lambda key: {"w": jnp.ones(16), "b": jnp.zeros(3)}  # noqa: E731
  ts = make_train_step(loss_fn, init, METHODS[method](), mesh, num_replicas=REPLICAS)
  rng = np.random.default_rng(0)
  batches = [{"x": rng.normal(size=(8, 16)).astype(np.float32)} for _ in range(STEPS)]
  batches = jax.device_put(batches, ts.batch_sharding)

  state, saved = ts.init(jax.random.key(0)), []
  for batch in batches:
    saved.append(jax.tree.map(lambda x: np.array(x), state))
    state, _ = ts.step(state, batch)
  whole = jax.tree.map(np.asarray, state)
  assert all((a.params["w"] != b.params["w"]).any() for a, b in itertools.pairwise(saved))
  for start in range(STEPS):
    state = jax.device_put(saved[start], ts.layout.shardings)
    for batch in batches[start:]:
      state, _ = ts.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state, whole)
