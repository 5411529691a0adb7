"""`examples/train_long_context.py`: the facts it hides, its step against one device, its folder."""

import dataclasses
import json

import numpy as np
import pytest

from jaxcomm.training import launch, read_metrics
from tests.examples.load_script import load_script
from tests.examples.write_text import write_text

SEQ_LEN = 128
CUT = ["--replicas", "2", "--seq-shards", "2"]


@pytest.fixture(scope="module")
def script():
  with load_script("train_long_context", "recall_task") as module:
    yield module


@pytest.fixture(scope="module")
def recall(script):
  return script.Recall(seq_len=SEQ_LEN, first_id=300)


def make_row(rng):
  tokens = rng.integers(0, 300, SEQ_LEN + 1).astype(np.int32)
  mask = rng.integers(0, 2, SEQ_LEN).astype(np.float32)
  return {"tokens": tokens[:-1], "targets": tokens[1:], "loss_mask": mask}


def test_questions_stand_as_far_behind_their_topic_as_they_say(recall):
  assert recall.distances == [16, 32, 64]
  seen = set()
  for seed in range(100):
    rng = np.random.default_rng(seed)
    row = make_row(rng)
    hidden = recall.hide(row, rng)
    tokens, targets, distance = (hidden[k] for k in ("tokens", "targets", "distance"))
    special, questions = tokens >= 300, distance > 0
    topic = tokens[np.argmax(special)] - 300
    seen.add(int(topic))
    assert (tokens[special & ~questions] == 300 + topic).sum() == SEQ_LEN // 16
    assert (tokens[questions] == 316).all()
    assert (targets[questions] == 308 + topic).all()
    last = np.flatnonzero(special & ~questions).max()
    np.testing.assert_array_equal(distance[questions], np.flatnonzero(questions) - last)
    assert (np.bincount(np.log2(distance[questions]).astype(int))[4:] == 8).all()
    np.testing.assert_array_equal(tokens[~special], row["tokens"][~special])
    decided = ~special & ~np.append(special[1:], False)
    np.testing.assert_array_equal(targets[decided], row["targets"][decided])
    np.testing.assert_array_equal(hidden["text_mask"], row["loss_mask"] * decided)
  assert seen == set(range(8))


def test_losses_by_distance_are_means_over_their_questions(recall):
  loss = np.arange(8, dtype=np.float32).reshape(2, 4)
  distance = np.array([[0, 16, 31, 0], [64, 0, 0, 16]])
  got = {k: float(v) for k, v in recall.losses(loss, distance).items()}
  want = {"recall": 3.5, "recall_16": 10 / 3, "recall_32": 0.0, "recall_64": 4.0}
  assert got == pytest.approx(want, rel=1e-6)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """Long enough for sequences to validate on."""
  with write_text(tmp_path_factory.mktemp("long"), lines=6000) as path:
    yield path


@pytest.fixture(scope="module")
def flags(script, text):
  """Of a model of one narrow layer, whose steps are made once."""
  build_model, build_step, made = script.build_model, script.build_step, {}

  def small(config):
    return dataclasses.replace(build_model(config), hidden_size=16, num_layers=1, vocab_size=400)

  def once(config, *args):
    key = (config.seq_shards, config.context, config.replicas)
    if key not in made:
      made[key] = build_step(config, *args)
    return made[key]

  script.build_model, script.build_step = small, once
  return [
    *("--data", str(text), "--seq-len", "64", "--batch-size", "4", "--compressor", "none"),
    *("--log-every", "1", "--eval-every", "2", "--save-every", "2", "--sync-period", "3"),
    *("--eval-batches", "1", "--block-size", "8", "--schedule-steps", "4"),
  ]


@pytest.fixture
def run(script, flags, capsys, quick_compile):
  """Runs the script: what it prints."""

  def start(*argv):
    capsys.readouterr()
    with quick_compile():
      launch(script.Config, script.main, [*flags, *map(str, argv)])
    return capsys.readouterr().out

  return start


def rows_of(path):
  return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in read_metrics(path)]


@pytest.mark.slow
def test_a_run_and_one_that_was_interrupted(run, tmp_path):
  out = run(*CUT, "--steps", "4", "--out", tmp_path / "whole")
  assert "loss of the answers by distance" in out
  assert "from      32 tokens  " in out
  assert (tmp_path / "whole" / "distance.png").stat().st_size > 5000
  rows = rows_of(tmp_path / "whole")
  assert all(r["loss"] == pytest.approx(r["text"] + r["recall"], rel=1e-5) for r in rows[1:])
  summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
  assert summary["wire_bytes_per_step"]["seq"] > 0
  run(*CUT, "--steps", "2", "--out", tmp_path / "stopped")
  run("--resume", "--steps", "4", "--out", tmp_path / "stopped")
  assert rows_of(tmp_path / "stopped") == rows


@pytest.mark.slow
def test_losses_are_those_of_uncut_sequences(run, tmp_path):
  run("--replicas", "2", "--seq-shards", "1", "--steps", "4", "--out", tmp_path / "one")
  want = rows_of(tmp_path / "one")
  run(*CUT, "--steps", "4", "--out", tmp_path / "ring")
  for got, row in zip(rows_of(tmp_path / "ring"), want, strict=True):
    for name in ("loss", "text", "recall", "recall_32", "eval_loss"):
      assert got.get(name) == (pytest.approx(row[name], abs=1e-4) if name in row else None)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--seq-len", "100"], "`seq_len` must be a positive multiple of 8 with `layout` 'zigzag'"),
    (["--seq-len", "32"], "`seq_len` must be at least 64, got 32"),
    (["--batch-size", "3"], "`batch_size` must be divisible by replicas * data_parallel * fsdp"),
    (["--seq-shards", "8"], "`seq_shards` = 8 needs a device for each of"),
    (["--seq-shards", "0"], "`seq_shards` must be at least 1, got 0"),
    (["--context", "dense"], "invalid choice 'dense' for argument '--context'"),
  ],
)
def test_wrong_flags(script, flags, capsys, argv, message):
  with pytest.raises(SystemExit):
    launch(script.Config, script.main, [*flags, *argv])
  err = capsys.readouterr().err
  assert message in err, err
  assert err.count("\n") == 1, err
