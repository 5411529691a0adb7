"""A small regression problem on any mesh, and batches with a state, for all tests of training."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcomm
from jaxcomm.training import make_train_step
from parallel import make_mesh

ROWS = 8


class Batches:
  """Batch n is drawn from seed n, whatever was taken before; `bad` replaces some of them."""

  def __init__(self, bad=None):
    self.taken, self._bad = 0, bad or {}

  def __iter__(self):
    return self

  def __next__(self):
    self.taken += 1
    x = np.random.default_rng(self.taken).normal(size=(ROWS, 8)).astype(np.float32)
    return self._bad.get(self.taken, {"x": x, "scale": np.ones((ROWS,), np.float32)})

  def get_state(self):
    return {"taken": self.taken}

  def set_state(self, state):
    self.taken = state["taken"]


def init_params(key):
  w, v = jax.random.split(key)
  return {
    "w": jax.random.normal(w, (8, 4)),
    "v": 0.1 * jax.random.normal(v, (4, 2)),
    "b": jnp.zeros((2,), jnp.bfloat16),
  }


def loss_fn(params, batch):
  """`scale` 0 gives a finite loss with gradients that are not."""
  hidden = jnp.tanh(batch["x"] @ params["w"])
  out = hidden @ params["v"] + params["b"].astype(jnp.float32)[None]
  penalty = jnp.sqrt(batch["scale"].mean() * (1.0 + jnp.sum(params["v"] ** 2)))
  return jnp.mean((out - batch["x"][:, :2]) ** 2) + 0.01 * penalty, {"tokens": 1.0 * out.shape[0]}


def build_tx(method, specs):
  adam = optax.adam(0.02)
  mean = jaxcomm.pmean_over("replica")
  if method == "ddp":
    return optax.chain(mean, adam)
  if method == "diloco_int4":
    mean = jaxcomm.compressed_mean("replica", jaxcomm.int4(), error_feedback=True, specs=specs)
  outer = optax.chain(mean, optax.sgd(0.7, momentum=0.6, nesterov=True))
  return jaxcomm.diloco(adam, outer, sync_period=4)


def build_step(*, replicas=4, data=1, fsdp=1, stacked=False, method="diloco", init=init_params):
  """A `TrainStep`; `stacked` puts all replicas on one group of `data * fsdp` devices."""
  groups = 1 if stacked else replicas
  devices = jax.devices()[: groups * data * fsdp]
  mesh = make_mesh(replica=groups, data=data, fsdp=fsdp, devices=devices)
  specs = {"w": jax.P("fsdp"), "v": jax.P(None, None), "b": jax.P()}
  tx = build_tx(method, specs)
  return make_train_step(loss_fn, init, tx, mesh, param_specs=specs, num_replicas=replicas)


def place(train_step, batch):
  return jax.device_put(batch, train_step.batch_sharding)


def advance(train_step, state, batches, steps):
  """The state and the mean losses after `steps` steps."""
  losses = []
  for _ in range(steps):
    state, metrics = train_step.step(state, place(train_step, next(batches)))
    losses.append(float(np.mean(np.asarray(metrics["loss"]))))
  return state, losses


def snapshot(state):
  """A copy on the host, safe from donation."""
  return jax.tree.map(lambda x: np.array(x, copy=True), state)


@pytest.fixture(scope="session")
def tiny():
  """The names above."""
  names = (Batches, init_params, loss_fn, build_step, place, advance, snapshot)
  return types.SimpleNamespace(**{f.__name__: f for f in names}, replace=dataclasses.replace)
