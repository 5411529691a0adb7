"""`train_lm.py` with the methods that average with neighbours."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxcomm.collectives import random_matching, ring, torus
from jaxcomm.training import launch, make_train_step

# flags, and what the state must then be like
BUILT = {
  "noloco": (["--replicas", "3", "--allow-idle", "--batch-size", "12"], "anchor"),
  "sgp": (["--overlap", "--topology", "ring"], "message"),
  "ad_psgd": (["--delay", "3"], "pending"),
  "adagossip": ([], "nu"),
  "dfedsam": (["--gossip-steps", "2"], "synced"),
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
def test_every_method_is_built_for_its_replicas(config_of, method):
  """As far as the types of its state: every replica has parameters of its own."""
  flags, field = BUILT[method]
  config = config_of("--method", method, *flags)
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:1])  # fmt: skip
  tx = sys.modules["lm_methods"].build_transform(config, None, mesh, None)
  step = make_train_step(
    lambda p, b: (jnp.mean((p - b) ** 2), {}), lambda key: jnp.zeros(3), tx, mesh,
    num_replicas=config.replicas,
  )  # fmt: skip
  assert step.layout.varying.params
  assert jax.tree.leaves(getattr(step.layout.shapes.opt_state, field))
  rounds = method in ("noloco", "dfedsam")
  assert config.exchange_shares == ((0.95, 0.05) if rounds else (1.0,))


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


def sent(params, method):
  """Bytes per step of two replicas."""
  return {"noloco": 4 * params / 2, "dfedsam": 3 * 4 * params / 2, "sgp": 4 * params + 4}[method]


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags",
  [["noloco"], ["dfedsam", "--gossip-steps", "3"], ["sgp", "--overlap"]],
  ids=lambda flags: flags[0],
)
def test_trains_sends_and_resumes(train, tiny_flags, tmp_path, flags):
  """Saved in the middle of a round, and with a message of sgp under way."""
  flags = [*[f for f in tiny_flags if f not in ("--compressor", "none")], "--method", *flags]
  flags += ["--sync-period", "2", "--schedule-steps", "6", "--save-every", "3", "--out"]
  train(*flags, tmp_path / "once", "--steps", "6")
  train(*flags, tmp_path / "twice", "--steps", "3")
  train("--resume", "--out", tmp_path / "twice", "--steps", "6")
  once, twice = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("once", "twice"))
  for name in ("final_loss", "eval_loss", "wire_bytes_total"):
    assert once[name] == twice[name]
  assert once["final_loss"] < 6.0  # log(300) = 5.7 at the start
  assert once["eval_loss"] < once["first_eval_loss"]
  each = sent(once["params"], flags[flags.index("--method") + 1])
  assert once["wire_bytes_per_step"] == {"replica": pytest.approx(each)}
  assert once["wire_bytes_total"] == pytest.approx(6 * each)


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
