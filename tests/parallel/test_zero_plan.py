"""Plans: what is legal, what they cost, against the sums of the papers written by hand."""

import dataclasses

import jax
import pytest

from parallel import PartitionPlan, memory_per_device, traffic_per_step

AXES = ("gcd", "gpu", "node")
CUBE = {"node": 2, "gpu": 2, "gcd": 2}
ZERO = {stage: PartitionPlan.zero(stage, AXES) for stage in (1, 2, 3)}
PSI = 8 * 2 * 4096  # divided by devices and blocks without rest


def frontier(nodes):
  return {"replica": 4, "node": nodes, "gpu": 4, "gcd": 2}


def test_memory_of_the_zero_paper():
  """Figure 1 of ZeRO: 7.5B parameters on 64 devices, 120 / 31.4 / 16.6 / 1.9 GB."""
  shape = {"node": 8, "gpu": 4, "gcd": 2}
  got = [
    round(memory_per_device(p, 7_500_000_000, shape)["total"] / 1e9, 1)
    for p in (PartitionPlan(), *ZERO.values())
  ]
  assert got == [120, 31.4, 16.6, 1.9]


def test_memory_of_twenty_billion_parameters_on_frontier():
  """20 GB of weights, 5 GB of gradients and 240 GB / N of optimizer state on a 64 GB device."""
  parts = memory_per_device(PartitionPlan.topo(), 20_000_000_000, frontier(48))
  want = {"weights": 20e9, "secondary": 0, "gradients": 5e9, "optimizer": 240e9 / 384}
  assert parts == pytest.approx(want | {"total": sum(want.values())}, rel=1e-6)


def test_secondary_copy_adds_one_share_of_a_node():
  parts = memory_per_device(PartitionPlan.zeropp(AXES, ("gcd", "gpu")), PSI, frontier(4))
  assert parts["secondary"] == 2 * PSI / 8
  assert parts["weights"] == parts["gradients"] == 2 * PSI / 32


def test_traffic_of_zero_is_two_or_three_times_the_model():
  share = 7 / 8
  for stage, moves in ((1, 2), (2, 2), (3, 3)):
    assert traffic_per_step(ZERO[stage], PSI, CUBE) == {"node,gpu,gcd": moves * 2 * PSI * share}


def test_traffic_of_three_levels_term_by_term():
  b_w, b_g, psi = 2, 4, PSI
  got = traffic_per_step(
    PartitionPlan.topo(), psi, frontier(3), 5, weight_bytes=b_w, grad_bytes=b_g
  )
  padded = -(-psi // 24) * 24
  assert got == {
    "gcd": 5 * (2 * b_w + b_g) * padded / 2,
    "gpu": (5 * b_g + b_w) * padded / 2 * 3 / 4,
    "node": (b_g + b_w) * padded / 8 * 2 / 3,
  }


def test_traffic_of_zeropp():
  """int8 forward over everything, backward inside a node, int4 gradients in two hops."""
  plan = PartitionPlan.zeropp(("node", "gpu"), "gpu")
  P, n = 4, 3
  shape = {"node": n, "gpu": P}
  psi = 12 * 256 * 10
  int8, int4 = 1 + 4 / 256, 0.5 + 4 / 256
  inside = psi * (P - 1) / P
  across = psi / P * (n - 1) / n
  got = traffic_per_step(plan, psi, shape)
  assert got == pytest.approx(
    {"gpu": (2 * int8 + int4) * inside, "node": (int8 + int4) * across}, rel=1e-12
  )
  forward = int8 * (inside + across)
  assert forward == pytest.approx(int8 * psi * (P * n - 1) / (P * n))
  exact = PartitionPlan.zeropp(("node", "gpu"), "gpu", weight_bits=None, grad_bits=None)
  assert traffic_per_step(exact, psi, shape)["gpu"] == 3 * 2 * inside


def test_three_levels_send_a_tenth_across_nodes_and_a_twentyfifth_quantized():
  flat = traffic_per_step(ZERO[3], PSI, CUBE)["node,gpu,gcd"]
  assert flat == 5.25 * PSI
  plain = traffic_per_step(PartitionPlan.topo(), PSI, CUBE)["node"]
  assert plain == 0.5 * PSI <= 0.10 * flat
  small = traffic_per_step(PartitionPlan.topo(weight_bits=8, grad_bits=4), PSI, CUBE)["node"]
  assert small == (1.5 + 8 / 256) * PSI / 8 <= 0.04 * flat


def test_axes_of_size_one_send_nothing_and_hold_everything():
  one_node = {"node": 1, "gpu": 4, "gcd": 2}
  assert set(traffic_per_step(PartitionPlan.topo(), PSI, one_node)) == {"gcd", "gpu"}
  one_gcd = {"node": 4, "gpu": 2, "gcd": 1}
  topo = memory_per_device(PartitionPlan.topo(), PSI, one_gcd)
  assert topo["weights"] == 2 * PSI  # nobody shares them: ZeRO-2 inside a node
  assert set(traffic_per_step(PartitionPlan.topo(), PSI, one_gcd)) == {"gpu", "node"}
  one = dict.fromkeys(CUBE, 1)
  assert traffic_per_step(PartitionPlan.topo(), PSI, one) == {}
  assert memory_per_device(PartitionPlan.topo(), PSI, one)["total"] == 16 * PSI


def test_axes_that_the_plan_does_not_name_average_in_float32():
  plan = PartitionPlan.zero(1, "gcd")
  got = traffic_per_step(plan, PSI, CUBE)
  assert got == {"gcd": 2 * PSI, "node,gpu": 2 * 3 / 4 * 4 * PSI / 2}


def test_trees_count_leaf_by_leaf_with_their_padding():
  tree = {
    "layers": jax.ShapeDtypeStruct((3, 5, 7), "float32"),
    "b": jax.ShapeDtypeStruct((1,), "f4"),
  }
  stacked = {"layers": True, "b": False}
  elements = 3 * 40 + 8
  parts = memory_per_device(ZERO[3], tree, CUBE, stacked=stacked)
  assert parts["total"] == 16 * elements / 8
  assert traffic_per_step(ZERO[3], tree, CUBE, stacked=stacked)["node,gpu,gcd"] == 5.25 * elements
  # Only leaves of at least `min_size` elements a layer are quantized, and padded to whole blocks.
  plan = PartitionPlan.topo(weight_bits=8, block_size=8)
  small = dataclasses.replace(plan, min_size=35)
  assert memory_per_device(plan, tree, CUBE, stacked=stacked)["optimizer"] == 12 * elements / 8
  padded = 3 * 64 + 8
  assert memory_per_device(small, tree, CUBE, stacked=stacked)["optimizer"] == 12 * padded / 8


def test_plans_are_values():
  plans = {PartitionPlan.topo(grad_bits=4), PartitionPlan.topo(grad_bits=4), PartitionPlan.topo()}
  assert len(plans) == 2
  assert PartitionPlan.topo(grad_bits={"node": 4}).grad_bits == {"node": 4}


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"weights": ("gcd",), "gradients": ("gpu",), "optimizer": AXES},
      "`gradients` must be .* superset",
    ),
    (
      {"gradients": ("gpu",), "optimizer": AXES},
      r"`optimizer` must be .* got \('gcd', 'gpu', 'node'\)",
    ),
    ({"optimizer": ("gcd", "gcd")}, "`optimizer` must be a tuple of different axis names"),
    ({"optimizer": "gcd"}, "`optimizer` must be a tuple"),
    ({"secondary": ("gcd",)}, r"`secondary` .* `weights` has \(\), got \('gcd',\)"),
    ({"weights": AXES, "secondary": ()}, "`secondary` must be the first axes of `weights`"),
    ({"weights": AXES, "secondary": AXES}, "and not all of them"),
    ({"weights": (AXES,), "secondary": ("gcd",)}, "must end where a level"),
    ({"weights": AXES, "weight_bits": 3}, "`weight_bits` must be 4, 8 or None, got 3"),
    ({"optimizer": AXES, "grad_bits": {"pod": 4}}, "`grad_bits` must be for axes .* got 'pod'"),
    ({"optimizer": AXES, "grad_bits": {"node": 5}}, "`grad_bits` must be 4 or 8, got 5"),
    ({"optimizer": (AXES,), "weight_bits": 8}, r"levels of one axis each, got the level \('gcd'"),
    ({"optimizer": (AXES,), "grad_bits": {"gpu": 4}}, "levels of one axis each"),
    ({"block_size": 9}, "`block_size` must be an even integer of at least 8, got 9"),
    ({"min_size": -1}, "`min_size` must not be negative"),
  ],
)
def test_rejects_plans(fields, message):
  weights = fields.get("weights", ())
  fields = {"gradients": weights, "optimizer": fields.get("gradients", weights), **fields}
  with pytest.raises(ValueError, match=message):
    PartitionPlan(**fields)


def test_rejects_bad_constructors_and_meshes():
  with pytest.raises(ValueError, match="`stage` must be 1, 2 or 3, got 0"):
    PartitionPlan.zero(0, AXES)
  with pytest.raises(ValueError, match="`axes` must name one or more"):
    PartitionPlan.zero(1, ())
  with pytest.raises(ValueError, match="`node_axes` must be some, not all"):
    PartitionPlan.zeropp(AXES, AXES)
  with pytest.raises(ValueError, match="`axes` must be two or more"):
    PartitionPlan.topo("gcd")
  with pytest.raises(ValueError, match=r"the axes \['gcd'\], which the mesh lacks"):
    memory_per_device(PartitionPlan.topo(), 8, {"node": 2, "gpu": 2})
  with pytest.raises(ValueError, match="`grad_accum` must be at least 1, got 0"):
    traffic_per_step(PartitionPlan.topo(), 8, CUBE, 0)
