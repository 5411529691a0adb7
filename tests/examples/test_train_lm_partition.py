"""`--partition` of `train_lm.py`: one device's losses, any plan after a stop, what is refused."""

import dataclasses
import math
import shutil

import jax
import pytest

from jaxcomm.training import Checkpoints, load_config, read_metrics, tree_digest
from models import llama

pytestmark = pytest.mark.usefixtures("with_llama")

FEW = ["--eval-every", "0", "--save-every", "0"]
TOPO = ["--partition", "topo", "--levels", "2", "1", "2", "--fsdp", "4"]


@pytest.fixture(scope="module")
def saved(start, tiny_flags, tmp_path_factory):
  """Five steps by three levels, saved in the middle of the second round of four."""
  path = tmp_path_factory.mktemp("runs") / "topo"
  steps = ["--steps", "5", "--schedule-steps", "6"]  # of `short`
  start(*tiny_flags, *FEW, *TOPO, *steps, "--out", path)
  return path


@pytest.mark.slow
def test_trains_and_goes_on_without_a_partition_like_one_device_per_replica(
  train, tiny_flags, saved, tmp_path
):
  steps = ["--steps", "8", "--schedule-steps", "6"]
  train(*tiny_flags, *FEW, *steps, "--out", tmp_path / "one")
  want = [row["loss"] for row in read_metrics(tmp_path / "one") if "loss" in row]
  parted = shutil.copytree(saved, tmp_path / "parted")
  flags = ["--partition", "none", "--levels", "--fsdp", "1"]
  out = train("--resume", "--out", parted, "--steps", "8", *flags)
  assert "mesh: replica 2, data 1, fsdp 1 on 2 x cpu" in out
  assert "resumed from step 5." in out
  rows = read_metrics(parted)
  assert len(rows) == 8
  assert [row["loss"] for row in rows] == pytest.approx(want, rel=1e-4)
  sent = [row["wire_bytes"] for row in rows]
  assert sent[3] > sent[4] == sent[0] > 0  # the fourth step ended a round


@pytest.mark.slow
def test_any_plan_and_number_of_devices_restores_the_same_bits(script, saved):
  """Parameters, Adam's moments and the state of a round; nothing is trained."""
  model = dataclasses.replace(llama.nano(), vocab_size=300)
  digests = set()
  for partition, levels, num_devices in (
    ("none", [], 1),
    ("zero1", [1, 1, 2], 4),
    ("zeropp", [2, 2, 1], 8),  # padded to whole blocks
  ):
    flags = {"partition": partition, "levels": levels, "fsdp": math.prod(levels)}
    config = script.Config(**(load_config(saved) | flags))
    step = script.build_step(config, model, jax.devices()[:num_devices])
    with Checkpoints(saved / "checkpoints", step.logical_layout) as checkpoints:
      restored = checkpoints.restore().state
    back = step.to_logical(step.from_logical(restored))
    digests |= {tree_digest(restored), tree_digest(back)}
  assert len(digests) == 1


@pytest.mark.slow
def test_one_replica_may_be_sharded(train, tiny_flags):
  flags = ["--replicas", "1", "--fsdp", "4", "--method", "ddp", "--steps", "1"]
  assert "done: 1 steps" in train(*tiny_flags, *FEW, *flags)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--levels", "1", "2", "2"], "`levels` has no effect without a `partition`"),
    (
      ["--partition", "topo"],
      "`levels` must be three positive numbers whose product is `fsdp` = 1",
    ),
    ([*TOPO, "--method", "demo"], "`method` 'demo' needs matrices"),
    ([*TOPO, "--data-parallel", "2", "--batch-size", "16"], "`data_parallel` must be 1 with"),
  ],
)
def test_flags_without_sense(fails, tiny_flags, flags, message):
  code, line = fails(*tiny_flags, *flags)
  assert code == 2
  assert message in line


def test_too_few_devices(fails, tiny_flags):
  code, line = fails(*tiny_flags, *TOPO, "--max-devices", "4")
  assert code == 1
  assert "needs a device for each of `replicas` * `fsdp` = 2 * 4 shards, got 4" in line
