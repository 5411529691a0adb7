"""Quantized plans: bytes read from the program, and training that stays close."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxcomm.inspect import collective_bytes
from parallel import PartitionPlan, make_zero_step, partitioned, traffic_per_step
from parallel._zero_hops import vary_all

pytestmark = pytest.mark.slow
AXES = ("gcd", "gpu", "node")


def small_leaves(plan):
  return dataclasses.replace(plan, min_size=100)  # the matrices of the model, not the gain


def across_nodes(run):
  arrays = [op for op in run.wire.ops if op.kind != "all-reduce"]
  return sum(op.bytes for op in arrays if "node" in op.axis)


def check_bytes(zero, run, itemsize):
  shapes = jax.eval_shape(zero.init, jax.random.key(0))
  sizes = {"weight_bytes": itemsize, "grad_bytes": itemsize, "stacked": True}
  want = traffic_per_step(run.step.plan, shapes, run.step.layout.mesh.shape, **sizes)
  sent = dict(run.wire.by_axis)
  scalars = sum(op.bytes for op in run.wire.ops if op.kind == "all-reduce")
  sent["node,gpu,gcd"] -= scalars
  assert {level: n for level, n in sent.items() if n} == want


@pytest.mark.parametrize(
  "plan",
  [
    PartitionPlan.topo(weight_bits=8, grad_bits=4, block_size=32),
    PartitionPlan.zeropp(AXES, ("gcd", "gpu"), block_size=32),
  ],
  ids=["topo", "zeropp"],
)
def test_sends_codes_and_learns(zero, plan):
  run = zero.train(small_leaves(plan), dtype="bfloat16")
  check_bytes(zero, run, 2)
  losses, _ = zero.reference()
  assert run.losses[0] == pytest.approx(losses[0], rel=0.02)
  assert run.losses[-1] == pytest.approx(losses[-1], rel=0.05)
  assert run.losses[-1] < 0.7 * run.losses[0]


def test_slow_links_carry_a_tenth_of_zero3(zero):
  """In bfloat16, which crosses as 16 bits."""
  flat = zero.train(PartitionPlan.zero(3, AXES), dtype="bfloat16")
  topo = zero.train(PartitionPlan.topo(), dtype="bfloat16")
  check_bytes(zero, flat, 2)
  check_bytes(zero, topo, 2)
  assert across_nodes(topo) == 0.5 / 5.25 * across_nodes(flat)


def test_slow_links_carry_a_twentyfifth_in_codes(zero):
  """In blocks of 256, as by default, and with leaves that they and the devices divide."""
  plan = PartitionPlan.topo(weight_bits=8, grad_bits=4)
  layer = partitioned(lambda w, x: jnp.tanh(x @ w), plan)

  def loss(shards, batch):
    x = vary_all(batch.astype("bfloat16"))
    x, _ = jax.lax.scan(lambda x, w: (layer(w, x), None), x, shards)
    return jnp.mean(x.astype("float32") ** 2), {}

  init = lambda key: jnp.ones((2, 64, 64))  # noqa: E731
  step = make_zero_step(
    loss, init, optax.sgd(0.1), zero.mesh(), plan, dtype="bfloat16", stacked=True
  )
  mesh = step.layout.mesh
  sent = collective_bytes(step.compile(jax.ShapeDtypeStruct((8, 64), "float32")), mesh)
  arrays = [op for op in sent.ops if math.prod(op.shape) > 2]  # without those of the loss
  assert {op.dtype for op in arrays} == {"u8"}  # codes and scales in one message
  shapes = jax.eval_shape(init, None)
  flat = traffic_per_step(PartitionPlan.zero(3, AXES), shapes, mesh.shape, stacked=True)
  want = traffic_per_step(plan, shapes, mesh.shape, stacked=True)
  got = {level: sum(op.bytes for op in arrays if op.axis == level) for level in AXES}
  assert got == want
  assert got["node"] == (1.5 + 8 / 256) * 8192 / 8 <= 0.04 * flat["node,gpu,gcd"]
