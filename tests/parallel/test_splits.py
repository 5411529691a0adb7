"""Training on every split of eight devices: all train like one.

The slow suite takes those that cut three axes, every three of the six, and so every pair; with
JAXCOMM_EVERY_SPLIT=1 it takes those with 4 or 8 devices on an axis, too (50 splits, 4 minutes).
"""

import dataclasses
import functools
import itertools
import os

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from jaxcomm import pmean_over
from jaxcomm.training import make_train_step
from jaxcomm.training._layout import init_state
from models import llama, llama_pipeline
from parallel import (
  DEFAULT_RULES,
  ContextParallel,
  PipelineParallel,
  context_permutation,
  make_mesh,
  mesh_specs,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")
ROWS, S, STEPS = 8, 16, 5
AXES = ("replica", "data", "fsdp", "stage", "seq", "tensor")
CFG = llama.LlamaConfig(
  vocab_size=64, hidden_size=16, num_layers=2, intermediate_size=32, num_heads=16, num_kv_heads=8,
  head_dim=4, dtype="float32", tie_embeddings=True, rope_theta=100.0,
)  # fmt: skip


def init(key):
  """Without a generator, which would take longest to compile."""
  del key
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), CFG))
  return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def make_batch():
  """Packed: two documents and padding. Rows have equally many targets: replicas take means."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, CFG.vocab_size, (2, ROWS, S)).astype(np.int32)
  lengths = (5, 9, 2)
  ids = np.repeat(np.array([[1, 2, 0]], np.int32), lengths, axis=1).repeat(ROWS, 0)
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None].repeat(ROWS, 0)
  mask = (ids > 0).astype(np.float32)
  return {
    "tokens": tokens, "targets": targets, "segment_ids": ids, "positions": positions,
    "loss_mask": mask,
  }  # fmt: skip


def train(mesh, batch, context=None, *, schedule="1f1b", sequence_parallel=False):
  """(loss and gradients of step 1; losses and parameters after `STEPS`): of each replica the same.

  Momentum is the gradient after the first step.
  """
  cfg = dataclasses.replace(CFG, sequence_parallel=sequence_parallel)
  rules = {**DEFAULT_RULES, "layers": "stage"}
  specs = mesh_specs(llama.specs(cfg), jax.eval_shape(init, jax.random.key(0)), mesh, rules)
  loss = llama.loss
  if mesh.shape["stage"] > 1:
    pipeline = PipelineParallel(num_microbatches=2, schedule=schedule)
    loss = functools.partial(llama_pipeline.loss, pipeline=pipeline)
  tx = optax.chain(pmean_over("replica"), optax.sgd(0.1, momentum=0.9))
  made = make_train_step(
    lambda p, b: loss(p, b, cfg, context=context), init, tx, mesh, param_specs=specs
  )
  batch = jax.device_put(batch, made.batch_sharding)
  compiled = made.compile(batch)
  state = made.layout.stack(init_state(init, tx, None))  # without a program for it
  state = jax.device_put(state, made.layout.shardings)
  losses, grads = [], None
  for _ in range(STEPS):
    state, metrics = compiled(state, batch)
    losses.append(float(np.mean(metrics["loss"])))
    if grads is None:
      grads = jax.device_get(optax.tree.get(state.opt_state, "trace"))
  return losses, grads, jax.device_get(state.params)


@functools.cache
def on_one_device():
  return train(make_mesh(devices=jax.devices()[:1]), make_batch())


def check(sizes, kind, method, sequence_parallel, schedule="1f1b"):
  mesh = make_mesh(**sizes, axis_types=kind)
  batch, context = make_batch(), None
  if sizes.get("seq", 1) > 1:
    layout = "contiguous" if method == "ulysses" else "zigzag"
    context = ContextParallel(method=method, layout=layout)
    order, _ = context_permutation(S, sizes["seq"], layout)
    batch = jax.tree.map(lambda x: x[:, order], batch)
  losses, grads, params = train(
    mesh, batch, context, schedule=schedule, sequence_parallel=sequence_parallel
  )
  want_losses, want_grads, want_params = on_one_device()
  assert_close((losses[0], grads), (want_losses[0], want_grads), 1e-5)
  assert_close((losses, params), (want_losses, want_params), 1e-4)


def assert_close(got, want, atol):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


def splits():
  """Every way to write 8 as a product of the six sizes, with at most two stages of two layers."""
  powers = itertools.product((0, 1, 2, 3), repeat=len(AXES))
  sizes = [tuple(2**p for p in split) for split in powers if sum(split) == 3]
  return [each for each in sizes if each[3] <= CFG.num_layers]


def chosen():
  every = os.environ.get("JAXCOMM_EVERY_SPLIT")
  return [sizes for sizes in splits() if every or max(sizes) == 2]


def test_replicas_with_cut_sequences_and_matrices():
  check({"replica": 2, "seq": 2, "tensor": 2}, AxisType.Explicit, "ring", sequence_parallel=False)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", chosen(), ids=lambda sizes: "x".join(map(str, sizes)))
def test_all(sizes):
  """The details alternate: kind of axes, attention, schedule, what is cut between blocks."""
  number = splits().index(sizes)
  kind = (AxisType.Auto, AxisType.Explicit)[number % 2]
  method = ("ulysses", "all_gather", "ulysses", "ring")[number % 4]
  schedule = ("1f1b", "1f1b", "gpipe")[number % 3]
  sequence_parallel = sizes[5] > 1 and number % 3 < 2
  check(dict(zip(AXES, sizes)), kind, method, sequence_parallel, schedule)
