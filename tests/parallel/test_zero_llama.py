"""The language model on shards, through its hook."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.training import make_train_step
from models import llama
from parallel import PartitionPlan, make_zero_step, partitioned
from tests.models.llama_params import llama_params

pytestmark = pytest.mark.slow
CFG = dataclasses.replace(llama.nano(), vocab_size=96, intermediate_size=96, dtype="float32")
STACKED = jax.tree.map(
  lambda s: s[0] == "layers", llama.specs(CFG), is_leaf=lambda x: isinstance(x, jax.P)
)


def make_batch(rows=16):
  stream = np.random.default_rng(0).integers(0, CFG.vocab_size, (rows, 17)).astype(np.int32)
  mask = (np.arange(rows * 16).reshape(rows, 16) % 5 > 0).astype(np.float32)
  segments = np.repeat(np.array([[1] * 7 + [2] * 9], np.int32), rows, 0)
  return {
    "tokens": stream[:, :-1],
    "targets": stream[:, 1:],
    "loss_mask": mask,
    "segment_ids": segments,
  }


def init(key):
  del key
  return jax.tree.map(jnp.asarray, llama_params(CFG))


def train(step, batch, steps):
  state, losses = step.init(jax.random.key(0)), []
  for _ in range(steps):
    state, metrics = step.step(state, batch)
    losses.append(float(np.mean(metrics["loss"])))
  return losses


def test_hook_trains_like_the_model_itself(zero):
  plan, tx = PartitionPlan.topo(), optax.adamw(1e-2)
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  wrap = functools.partial(partitioned, plan=plan, policy=policy)

  def loss(shards, batch):
    return llama.loss(shards, batch, CFG, partition=wrap)

  one = jax.make_mesh((1,), ("replica",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
  plain = make_train_step(lambda p, b: llama.loss(p, b, CFG), init, tx, one)
  want = train(plain, make_batch(), 3)
  got = train(make_zero_step(loss, init, tx, zero.mesh(), plan, stacked=STACKED), make_batch(), 3)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert want[-1] < want[0]


def test_the_partition_owns_the_checkpoint():
  cfg = dataclasses.replace(CFG, remat="full")
  with pytest.raises(ValueError, match="must be 'none' with a `partition`, got 'full'"):
    llama.loss({}, make_batch(), cfg, partition=lambda fn: fn)
