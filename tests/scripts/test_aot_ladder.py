"""Matrix products beside the all-reduces of the real model, compiled for a GPU and a TPU target."""

import pathlib
import runpy
import types

import jax
import numpy as np
import pytest

from jaxcomm.inspect import target

SCRIPT = pathlib.Path(__file__).parent.parent.parent / "scripts" / "aot_ladder.py"


@pytest.fixture(scope="module")
def script():
  return types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.aot
@pytest.mark.parametrize(
  ("name", "scan", "ladder"),
  [
    ("gpu:h100:1x8", False, [2, 3, 2, 3, 2, 3, 2, 0]),
    ("gpu:h100:1x8", True, [3, 2, 0]),  # two in the body of the loop, and the last
    ("tpu:v5e:2x4", False, [1, 5, 1, 5, 1, 5, 1, 0]),
    ("tpu:v5e:2x4", True, [5, 1, 0]),
  ],
)
@pytest.mark.parametrize("residual", ["ladder", "standard"])
def test_forward(script, name, scan, ladder, residual):
  """All blocks of the ladder but the last, and none of the standard model."""
  try:
    devices = target(name).devices
  except ImportError as e:
    pytest.skip(str(e))
  mesh = jax.sharding.Mesh(np.array(devices).reshape(1, 8), ("data", "tensor"))
  cfg = script.build_config("llama3_8b", residual, layers=4, scan=scan)
  compiled = script.compile_pass(cfg, mesh, batch=4, seq_len=1024, gradient=False)
  _, *blocks = script.large_all_reduces(compiled, mesh)  # the first is that of the embedding
  assert [c["matmuls"] for c in blocks] == (ladder if residual == "ladder" else [0] * len(ladder))


def test_describes_what_runs_beside_and_why_nothing_does(script):
  rest = {"times": 1, "waits_for": "a", "needed_by": "b", "not_put_there": ["c", "d"]}
  found = [
    {**rest, "matmuls": 2, "reason": "overlapped", "times": 4},
    {**rest, "matmuls": 0, "reason": "dependency"},
    {**rest, "matmuls": 0, "reason": "scheduler"},
  ]
  assert script.describe(found) == (
    "3 all-reduces, matrix products beside each: 2 (x4), dependency of b on a, scheduler left out"
    " c, d"
  )
