"""`--partition` of `train_lm.py`: the losses of one device, and what is refused."""

import pytest

from jaxcomm.training import read_metrics

FEW = ["--steps", "4", "--eval-every", "0", "--save-every", "0"]


@pytest.mark.slow
def test_losses_are_those_of_the_compiler_s_own_sharding(train, tiny_flags, tmp_path):
  losses = {}
  for name, flags in {
    "plain": [],
    "topo": ["--partition", "topo", "--levels", "2", "1", "2", "--fsdp", "4"],
  }.items():
    out = tmp_path / name
    train(*tiny_flags, *FEW, "--out", out, *flags)
    losses[name] = [row["loss"] for row in read_metrics(out) if "loss" in row]
  assert losses["topo"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.slow
def test_one_replica_may_be_sharded(train, tiny_flags, tmp_path):
  flags = ["--replicas", "1", "--fsdp", "4", "--method", "ddp"]
  assert "done: 4 steps" in train(*tiny_flags, *FEW, *flags)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--levels", "1", "2", "2"], "`levels` has no effect without a `partition`"),
    (
      ["--partition", "topo"],
      "`levels` must be three positive numbers whose product is `fsdp` = 1",
    ),
    (
      ["--partition", "topo", "--levels", "1", "2", "2", "--fsdp", "4", "--method", "demo"],
      "`method` 'demo' needs matrices",
    ),
  ],
)
def test_flags_without_sense(fails, tiny_flags, flags, message):
  code, line = fails(*tiny_flags, *flags)
  assert code == 2
  assert message in line
