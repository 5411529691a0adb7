"""Quantized plans: bytes read from the program, and training that stays close."""

import dataclasses

import jax
import pytest

from parallel import PartitionPlan, traffic_per_step

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
  assert run.losses[-1] < 0.5 * run.losses[0]


def test_slow_links_carry_a_tenth_of_zero3(zero):
  """In bfloat16, which crosses as 16 bits."""
  flat = zero.train(PartitionPlan.zero(3, AXES), dtype="bfloat16")
  topo = zero.train(PartitionPlan.topo(), dtype="bfloat16")
  check_bytes(zero, flat, 2)
  check_bytes(zero, topo, 2)
  assert across_nodes(topo) == 0.5 / 5.25 * across_nodes(flat)
