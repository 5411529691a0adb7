"""One small model, trained by any partition plan and on one device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.inspect import WireReport, collective_bytes
from parallel import ZeroStep, clip_by_global_norm, make_zero_step, partitioned
from parallel._zero_hops import vary_all
from parallel._zero_plan import axes_of

LAYERS, WIDTH, INNER = 2, 23, 11  # odd: every leaf is padded
STEPS = 10


def zero_mesh(*, replica=1, node=2, gpu=2, gcd=2, kind=jax.sharding.AxisType.Auto):
  sizes = (replica, node, gpu, gcd)
  devices = jax.devices()[: int(np.prod(sizes))]
  return jax.make_mesh(sizes, ("replica", "node", "gpu", "gcd"), (kind,) * 4, devices=devices)


def init_params(key):
  """All leaves stacked: the compiler may merge two gathers of a weight outside of the loop.

  Numbers without a generator, which would take longest to compile.
  """
  del key

  def draw(*shape):
    return jnp.sin(1 + jnp.arange(np.prod(shape), dtype=jnp.float32) ** 1.5).reshape(shape) / 4

  return {
    "up": draw(LAYERS, WIDTH, INNER),
    "down": draw(LAYERS, INNER, WIDTH),
    "gain": 1 + draw(LAYERS, WIDTH),
  }


def make_batch(rows=48):  # for 1, 4, 6 and 8 devices, and two micro-steps
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(2, rows, WIDTH)).astype(np.float32)
  mask = (np.arange(rows) % 5 > 0).astype(np.float32)  # devices have unequal numbers of targets
  return {"x": x, "y": y, "mask": mask}


def make_loss(wrap, dtype="float32"):
  """The loss on weights (wrap: identity) or on shards (wrap: `partitioned` with a plan)."""
  layer = wrap(lambda w, x: x + jnp.tanh((x * w["gain"][None]) @ w["up"]) @ w["down"])

  def loss(params, batch):
    x = vary_all(batch["x"].astype(dtype))
    y, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), x, params)
    y = y.astype(jnp.float32)
    errors = jnp.square(y - batch["y"]).mean(-1)
    tokens = batch["mask"].sum()
    return (errors * batch["mask"]).sum() / jnp.maximum(tokens, 1), {"tokens": tokens}

  return loss


def _same(fn):
  return fn


def make_tx(clip=optax.clip_by_global_norm):
  return optax.chain(clip(0.3), optax.adamw(1e-2))


@dataclasses.dataclass(frozen=True)
class Run:
  """A plan's step, compiled, and what `STEPS` steps of it gave."""

  step: ZeroStep
  compiled: Any
  wire: WireReport
  losses: list[float]
  state: Any
  local_elements: dict[str, int]  # of one device's weights and gradients, all layers


@functools.cache
def train_with(plan, *, dtype="float32", grad_accum=1, **sizes) -> Run:
  mesh, seen = zero_mesh(**sizes), {}
  loss = make_loss(functools.partial(partitioned, plan=plan), dtype)

  def spy(shards, batch):
    leaves = jax.tree.leaves(shards, is_leaf=lambda x: hasattr(x, "slot"))
    seen["weights"] = sum(s.weight.size for s in leaves)
    seen["gradients"] = sum(s.slot.size for s in leaves)
    return loss(shards, batch)

  clip = functools.partial(clip_by_global_norm, axis_names=axes_of(plan.optimizer))
  step = make_zero_step(
    spy, init_params, make_tx(clip), mesh, plan,
    dtype=dtype, stacked=True, grad_accum=grad_accum,
  )  # fmt: skip
  batch = jax.device_put(make_batch(), step.batch_sharding)
  compiled = step.compile(batch)
  state, losses = step.init(jax.random.key(0)), []
  for _ in range(STEPS):
    state, metrics = compiled(state, batch)
    losses.append(float(metrics["loss"][0]))
  return Run(step, compiled, collective_bytes(compiled, mesh), losses, state, seen)


@functools.cache
def train_on_one_device():
  """(losses, parameters) after `STEPS` steps on the whole batch, by optax alone."""
  tx, loss = make_tx(), make_loss(_same)

  @jax.jit
  def step(carry, batch):
    params, opt_state = carry
    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  params = init_params(jax.random.key(0))
  carry, losses = (params, tx.init(params)), []
  for _ in range(STEPS):
    carry, value = step(carry, make_batch())
    losses.append(float(value))
  return losses, carry[0]


@pytest.fixture(scope="session")
def zero():
  """`zero.train(plan, ...) -> Run`, `zero.reference()`, and the model's parts."""

  class Zero:
    train = staticmethod(train_with)
    reference = staticmethod(train_on_one_device)
    mesh = staticmethod(zero_mesh)
    init = staticmethod(init_params)
    loss = staticmethod(make_loss)
    batch = staticmethod(make_batch)
    tx = staticmethod(make_tx)

  return Zero
