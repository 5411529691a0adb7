"""`--tensor`, `--seq-shards` and their company change where numbers are, not which."""

import json
import os

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("with_llama")
METHODS = {
  "streaming_diloco": ["--fragments", "2"], "noloco": [], "ddp": [], "local_sgd": [],
  "eager_diloco": [], "slowmo": [], "co2": [], "sgp": [], "ad_psgd": [], "adagossip": [],
  "dfedsam": [],
}  # fmt: skip
CHOSEN = list(METHODS)[: None if os.environ.get("JAXCOMM_EVERY_SPLIT") else 1]


def trained(start, out, *argv):
  """(losses of the steps, evaluation loss, summary)."""
  start(*argv, "--out", out)
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  summary = json.loads((out / "summary.json").read_text())
  losses = [row["loss"] for row in rows if "loss" in row]
  return losses, summary["eval_loss"], summary


@pytest.mark.slow
def test_trains_like_whole_replicas(start, tiny_flags, tmp_path):
  argv = [*tiny_flags, "--steps", "5", "--method", "diloco"]
  cut = ["--seq-shards", "2", "--tensor", "2", "--sequence-parallel"]
  want = trained(start, tmp_path / "whole", *argv)
  got = trained(start, tmp_path / "cut", *argv, *cut)
  np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-4)
  np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-4)
  sent = got[2]["wire_bytes_per_step"]
  assert sent.keys() >= {"replica", "seq", "tensor"}
  assert min(sent.values()) > 0
  # Over the slow link parameters go, of which two devices have a half each, but for vectors.
  whole = want[2]["wire_bytes_per_step"]["replica"]
  assert whole / 2 <= sent["replica"] <= 1.2 * whole / 2
  # The run goes on where nothing is cut.
  whole_again = ["--seq-shards", "1", "--tensor", "1", "--no-sequence-parallel"]
  more = ["--resume", "--steps", "6", *whole_again]
  last = [trained(start, tmp_path / name, *argv, *more)[0][-1] for name in ("whole", "cut")]
  np.testing.assert_allclose(*last, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", CHOSEN)
def test_methods_train_like_whole_replicas(start, tiny_flags, tmp_path, method):
  """One method; with JAXCOMM_EVERY_SPLIT=1 all whose messages do not depend on the cut."""
  argv = [*tiny_flags, "--steps", "5", "--method", method, *METHODS[method]]
  want = trained(start, tmp_path / "whole", *argv)
  got = trained(start, tmp_path / "cut", *argv, "--seq-shards", "2", "--tensor", "2")
  np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-4)
  np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_stages_train_like_whole_replicas(start, tiny_flags, tmp_path):
  argv = [*tiny_flags, "--steps", "5", "--method", "diloco", "--fsdp", "1"]
  want = trained(start, tmp_path / "whole", *argv)
  got = trained(start, tmp_path / "cut", *argv, "--stages", "2", "--microbatches", "2")
  np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-4)
  np.testing.assert_allclose(got[1], want[1], rtol=0, atol=1e-4)
  assert got[2]["wire_bytes_per_step"]["stage"] > 0
  last = trained(start, tmp_path / "cut", *argv, "--resume", "--steps", "6", "--stages", "1",
                 "--microbatches", "None")  # fmt: skip
  assert len(last[0]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "noloco"])
def test_random_routes_go_on_after_a_resume(start, tiny_flags, tmp_path, method):
  """Bit for bit, and from the middle of a round: routes are drawn by the number of the step."""
  argv = [*tiny_flags, "--method", method, "--stages", "2", "--microbatches", "2", "--route"]
  once = trained(start, tmp_path / "once", *argv, "--steps", "5")
  trained(start, tmp_path / "twice", *argv, "--steps", "3", "--schedule-steps", "5")
  twice = trained(start, tmp_path / "twice", "--resume", "--steps", "5")
  assert twice[:2] == once[:2]
  sent = once[2]["wire_bytes_per_step"]
  assert sent["replica,stage"] > 0
  assert ("replica" in sent) == (method == "noloco")


def test_flags_without_sense(fails, tiny_flags):
  for flags, message in (
    (["--sequence-parallel"], "`sequence_parallel` has no effect without `tensor`"),
    (["--seq-shards", "3"], "`seq_len` must be a positive multiple of 6 with `layout` 'zigzag'"),
    (["--seq-shards", "2", "--partition", "zero1", "--levels", "1", "1", "1"],
     "`seq_shards` must be 1 with `partition`"),
    (["--seq-shards", "2", "--max-devices", "2"], "`seq_shards` = 2 needs a device for each"),
    (["--stages", "2", "--max-devices", "2"], "`stages` = 2 needs a device for each"),
    (["--microbatches", "2"], "`microbatches` has no effect without `stages`, got 2"),
    (["--stages", "2", "--microbatches", "0"], "`microbatches` must be at least 1, got 0"),
    (["--stages", "2", "--microbatches", "3"], "fsdp * microbatches = "),
    (["--tensor", "3", "--replicas", "1"], "dimension 2 ('kv_heads') has size 2, which must be"),
    (["--route"], "`route` needs several `stages` and `replicas`, got 1 and 2"),
    (["--route", "--stages", "2", "--replicas", "1"], "and `replicas`, got 2 and 1"),
  ):  # fmt: skip
    _, line = fails(*tiny_flags, *flags)
    assert message in line
