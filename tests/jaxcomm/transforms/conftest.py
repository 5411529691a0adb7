"""One way to train replicas in the tests of transforms: a whole trajectory in one program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomm
from jaxcomm import _axes
from jaxcomm.training import TrainState
from jaxcomm.training._layout import make_layout


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """What happened to R replicas in T steps.

  Attributes:
    loss: float32[R, T], before each step.
    params: like the parameters, float32[R, T, ...], after each step.
    state: the last `TrainState`; leaves that differ are stacked.
    layout: which leaves those are.
  """

  loss: np.ndarray
  params: Any
  state: TrainState
  layout: Any


def make_mesh(context: str, num_replicas: int) -> jax.sharding.Mesh:
  size = 1 if context == "vmap" else num_replicas
  kind = jax.sharding.AxisType.Explicit if context == "explicit" else jax.sharding.AxisType.Auto
  return jax.make_mesh((size,), ("replica",), axis_types=(kind,), devices=jax.devices()[:size])


def train_replicas(
  tx,
  loss_fn,
  params,
  batches,
  *,
  context: str = "vmap",
  state: TrainState | None = None,
  apply_updates=jaxcomm.apply_updates,
  checkpoint: bool = False,
) -> Trajectory:
  """Trains one replica per leading index of `batches`, one step per index of the next axis.

  Args:
    tx: the transform, with `axis_name="replica"`.
    loss_fn: `(params, batch) -> loss` of one replica.
    params: where all replicas start.
    batches: arrays [R, T, ...].
    context: "vmap" (stacked on one device) or "shard_map" (a device per replica, with checks).
    state: start from here instead.
    apply_updates: how updates reach the parameters.
    checkpoint: rematerialise the loss.
  """
  num_replicas, num_steps = jax.tree.leaves(batches)[0].shape[:2]
  mesh = make_mesh(context, num_replicas)
  layout = make_layout(lambda key: params, tx, mesh, None, num_replicas)
  grad_fn = jax.value_and_grad(jax.checkpoint(loss_fn) if checkpoint else loss_fn)

  def step(state, batch):
    loss, grads = grad_fn(_axes.vary(state.params, "replica"), batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    new = apply_updates(state.params, updates, opt_state)
    return TrainState(state.step + 1, new, opt_state), {"loss": loss, "params": new}

  def roll_out(state, batches):
    return jax.lax.scan(step, state, batches)

  if state is None:
    state = layout.stack(TrainState(jnp.zeros((), jnp.int32), params, tx.init(params)))
  state = jax.device_put(state, layout.shardings)
  rows = jax.tree.map(lambda x: jnp.reshape(x, (-1, *x.shape[2:])), batches)
  last, metrics = jax.jit(layout.over_replicas(roll_out))(state, rows)
  metrics = jax.tree.map(np.asarray, metrics)
  assert metrics["loss"].shape == (num_replicas, num_steps)
  return Trajectory(metrics["loss"], metrics["params"], last, layout)


def roll_out_replicas(tx, grads, *, context="vmap", state=None, differs=()):
  """Updates [R, T, ...] for gradients [R, T, ...], and the last states [R, ...].

  Args:
    tx: the transform, with `axis_name="replica"`.
    grads: a tree of arrays; parameters stay at zero.
    context: "vmap" (stacked on one device) or "shard_map" (a device per replica, with checks).
    state: start from here instead of `tx.init`.
    differs: fields of the state that differ per replica.
  """
  params = jax.tree.map(lambda g: jnp.zeros(g.shape[2:], g.dtype), grads)
  state = tx.init(params) if state is None else state

  def replica(grads):
    varying = {name: _axes.vary(getattr(state, name), "replica") for name in differs}
    start = state._replace(**varying) if differs else state

    def step(state, grad):
      updates, state = tx.update(grad, state, params)
      return state, updates

    return jax.lax.scan(step, start, grads)

  def local(grads):
    return jax.tree.map(lambda x: x[None], replica(jax.tree.map(lambda g: g[0], grads)))

  if context == "vmap":
    fun = jax.vmap(replica, axis_name="replica")
  else:
    mesh, spec = make_mesh(context, jax.tree.leaves(grads)[0].shape[0]), jax.P("replica")
    fun = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
  state, updates = jax.tree.map(np.asarray, jax.jit(fun)(grads))
  return updates, state


@pytest.fixture(scope="session")
def roll_out():
  """`roll_out(tx, grads, context=...) -> (updates, state)`."""
  return roll_out_replicas


@pytest.fixture(scope="session")
def train():
  """`train(tx, loss_fn, params, batches, context=...) -> Trajectory`."""
  return train_replicas
