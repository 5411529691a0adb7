"""The min-max script: what it claims, what it leaves behind, and what it refuses."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from jaxcomm.training import RunFolderError, read_metrics

SCRIPT = pathlib.Path(__file__).parents[2] / "examples" / "masha_minmax.py"


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("masha_minmax", SCRIPT)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules["masha_minmax"] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules["masha_minmax"]


@pytest.fixture(scope="module")
def run(script, tmp_path_factory):
  """The bilinear game of the defaults, up to 10,000 values: its folder and curves."""
  out = tmp_path_factory.mktemp("runs") / "bilinear"
  cfg = script.Config(problem="bilinear", floats=10_000, points=5, out=str(out))
  return cfg, out, script.main(cfg)["bilinear"]


@pytest.mark.slow
def test_with_equal_values_sent_it_is_far_ahead(run):
  _, _, curves = run
  dense = curves["extragradient"].at(10_000)
  assert 1e-18 < dense < 1e-10
  for name in ("MASHA1 Rand-k", "MASHA2 Top-k"):
    assert curves[name].at(10_000) < 1e-5 * dense
  for name in ("naive Rand-k", "naive Top-k"):
    late = curves[name].distance[curves[name].floats > 5_000]
    assert late.min() > 1e-2  # a plateau, from early on
    assert curves[name].at(2_000) < 20 * late.mean()


@pytest.mark.slow
def test_the_folder(script, run):
  cfg, out, curves = run
  rows = read_metrics(out)
  for method in curves:
    mine = [r for r in rows if r["method"] == method]
    assert len(mine) == 5
    assert 10_000 - 160 < mine[-1]["floats"] <= 10_000
    assert mine[-1]["distance"] == curves[method].at(10_000)
  # A value costs 8 bytes in a dense mean, 4 in a message, and 7 bits for its place.
  rand_k, dense = (
    [r for r in rows if r["method"] == m][-1] for m in ("naive Rand-k", "extragradient")
  )
  assert dense["wire_bytes_total"] == 8 * dense["floats"]
  assert rand_k["wire_bytes_total"] == rand_k["floats"] * (4 + 7 / 8)
  summary = json.loads((out / "summary.json").read_text())
  assert set(summary["results"]["bilinear"]) == set(curves)
  assert json.loads((out / "config.json").read_text()) == dataclasses.asdict(cfg)
  assert (out / "report.png").stat().st_size > 10_000
  with pytest.raises(RunFolderError, match="is not an empty folder"):
    script.main(cfg)


@pytest.mark.slow
def test_adversarial_training(script):
  cfg = script.Config(floats=3_000, workers=3, size=8, ratio=0.25, dtype="float32")
  problem = script.adversarial(cfg)
  curve = script.run_method(cfg, problem, "MASHA2 Top-k")
  assert curve.at(3_000) < 1e-4
  assert 3_000 - 2 * problem.start.size < curve.floats[-1] <= 3_000


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"ratio": 1.0}, r"`ratio` must be in \(0, 1\), got 1.0"),
    ({"workers": 0}, "`workers` must be at least 1, got 0"),
    ({"seed": -1}, "`seed` must be at least 0, got -1"),
  ],
)
def test_bad_flags(script, flags, message):
  with pytest.raises(ValueError, match=message):
    script.Config(**flags)


@pytest.mark.slow
def test_help():
  out = subprocess.run(
    [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
  )
  assert "--floats" in out.stdout
  assert "Eight workers" in out.stdout
