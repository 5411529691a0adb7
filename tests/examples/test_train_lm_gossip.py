"""`train_lm.py` with the methods that average with neighbours."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxcomm.collectives import random_matching, ring, torus
from jaxcomm.training import launch, make_train_step, read_metrics, step_wire

P = 3  # elements of the parameters below
# flags, what the state must then hold, and the bytes of an exchange of as many replicas
BUILT = {
  "noloco": (["--replicas", "3", "--allow-idle", "--batch-size", "12"], "anchor", 4 * P),
  "sgp": (["--overlap", "--replicas", "8"], "message", 4 * P + 4),
  "ad_psgd": (["--delay", "3"], "pending", 4 * P),
  "adagossip": ([], "nu", 2 * 4 * P),
  "dfedsam": (["--gossip-steps", "3", "--sync-period", "10"], "inner_state", 3 * 2 * 4 * P),
}


@pytest.fixture
def config_of(script):
  """The flags that the script would see."""

  def parse(*argv):
    found = []
    launch(script.Config, found.append, [str(a) for a in argv])
    return found[0]

  return parse


@pytest.mark.parametrize("method", BUILT)
def test_every_method_is_built_and_metered(config_of, method):
  """Every replica has parameters of its own, and what it announces goes to its neighbours."""
  flags, field, sent = BUILT[method]
  config = config_of("--method", method, *flags)
  mesh = jax.make_mesh((config.replicas,), ("replica",), devices=jax.devices()[: config.replicas],
                       axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
  tx = sys.modules["lm_methods"].build_transform(config, None, mesh, None)
  loss_fn = lambda p, b: (jnp.mean((p[None] - b) ** 2), {})  # noqa: E731
  step = make_train_step(loss_fn, lambda key: jnp.zeros(P), tx, mesh)
  assert step.layout.varying.params
  assert jax.tree.leaves(getattr(step.layout.shapes.opt_state, field))
  wire = step_wire(step, step.compile(jax.ShapeDtypeStruct((24, P), jnp.float32)))
  period = {"noloco": 20, "dfedsam": 10}.get(method, 1)
  assert wire.per_step(config.exchange_shares) == {"replica": pytest.approx(sent / period)}


def test_topologies(config_of):
  build = lambda *argv: sys.modules["lm_gossip"].build_topology(config_of(*argv))  # noqa: E731
  pairs = ["--method", "ad_psgd", "--seed", "7"]
  assert build(*pairs) == random_matching(7, bipartite=True)
  assert build(*pairs, "--replicas", "3", "--batch-size", "12") == random_matching(7)
  assert build("--method", "adagossip") == ring()
  assert build("--method", "sgp", "--topology", "torus") == torus()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--method", "diloco", "--topology", "ring"], "`topology` has no effect with method 'diloco'"),
    (["--method", "sgp", "--sam-rho", "0.1"], "`sam_rho` has no effect with method 'sgp', got 0.1"),
    (["--method", "dfedsam", "--sam-rho", "-1"], "`sam_rho` must be finite and at least 0"),
    (["--method", "dfedsam", "--gossip-steps", "0"], "`gossip_steps` must be at least 1, got 0"),
    (["--method", "noloco", "--consensus-lr", "0"], "`consensus_lr` must be positive and finite"),
    (["--method", "noloco", "--compressor", "int8"], "`compressor` has no effect with method"),
    (["--method", "ad_psgd", "--delay", "-1"], "`delay` must be at least 0 with method 'ad_psgd'"),
    (
      ["--method", "sgp", "--topology", "torus", "--replicas", "5", "--batch-size", "10"],
      "a torus needs rows * columns replicas, both at least 2, got a prime number of 5 replicas",
    ),
  ],
)
def test_flags_without_sense(fails, flags, message):
  code, line = fails(*flags)
  assert code == 2
  assert message in line


def test_replicas_that_would_drift_apart(fails, tiny_flags):
  """Known only to the method, once it knows the replicas; nothing is compiled yet."""
  code, line = fails(
    *tiny_flags, "--method", "noloco", "--replicas", "8", "--outer-momentum", "0.9"
  )
  assert code == 1
  assert "`outer_lr` must be below 0.436 with `outer_momentum`=0.9 and 8 replicas, got 0.7" in line


@pytest.mark.slow
def test_trains_on_worst_gradients_and_resumes(train, tiny_flags, tmp_path):
  """Saved in the middle of a round. The evaluation is of the plain loss."""
  flags = [*[f for f in tiny_flags if f not in ("--compressor", "none")], "--method", "dfedsam"]
  flags += ["--sync-period", "2", "--schedule-steps", "6", "--out"]
  train(*flags, tmp_path / "once", "--steps", "6")
  train(*flags, tmp_path / "twice", "--steps", "3")
  train("--resume", "--out", tmp_path / "twice", "--steps", "6")
  once, twice = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("once", "twice"))
  for name in ("final_loss", "eval_loss", "wire_bytes_total"):
    assert once[name] == twice[name]
  assert once["final_loss"] < 6.0  # log(300) = 5.7 at the start
  assert once["eval_loss"] < once["first_eval_loss"]
  assert once["wire_bytes_total"] == pytest.approx(3 * 4 * once["params"])
  at_3, at_6 = (r["disagreement"] for r in read_metrics(tmp_path / "once") if "disagreement" in r)
  assert at_3 > 1e-5  # in the middle of a round
  assert at_6 < 1e-6  # two replicas have just taken their mean


@pytest.mark.slow
def test_goes_on_without_a_replica_that_was_lost(train, fails, tiny_flags, tmp_path):
  """Three replicas, then two: by name only."""
  flags = [*[f for f in tiny_flags if f not in ("--compressor", "none")], "--method", "noloco"]
  flags += ["--sync-period", "2", "--batch-size", "6", "--replicas", "3", "--allow-idle"]
  out = ["--out", tmp_path / "run"]
  train(*flags, *out, "--steps", "3", "--schedule-steps", "6")
  again = ["--resume", *out, "--steps", "6", "--replicas", "2"]
  code, line = fails(*again)
  assert code == 1
  assert "holds 3 replicas, this run has 2" in line
  train(*again, "--replica-change", "average_replicas", "--no-allow-idle")
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["steps"] == 6
  assert summary["final_loss"] < 6.0
