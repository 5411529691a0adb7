"""Bad input to `examples/train_lm.py`: one clear line, and nothing of the user's is touched."""

import dataclasses
import re
import types

import pytest

from jaxcomm.training import RunFolder
from models import llama


def contents(path):
  return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# Flags.


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (
      ["--batch-size", "7"],
      "`batch_size` must be divisible by replicas * data_parallel",
    ),
    (["--batch-size", "0"], "`batch_size` must be at least 1, got 0"),
    (["--seq-len", "0"], "`seq_len` must be at least 1, got 0"),
    (["--sync-period", "0"], "`sync_period` must be at least 1, got 0"),
    (["--eval-batches", "0"], "`eval_batches` must be at least 1, got 0"),
    (["--lr", "0"], "`lr` must be positive and finite, got 0"),
    (["--lr", "nan"], "`lr` must be positive and finite, got nan"),
    (["--lr", "inf"], "`lr` must be positive and finite, got inf"),
    (["--outer-lr", "-1"], "`outer_lr` must be positive and finite, got -1"),
    (["--outer-momentum", "1"], r"`outer_momentum` must be in [0, 1), got 1"),
    (["--warmup", "-1"], "`warmup` must be in [0, 300), the length of the schedule, got -1"),
    (["--warmup", "300"], "`warmup` must be in [0, 300), the length of the schedule, got 300"),
    (["--error-feedback"], "`error_feedback` needs a `compressor`"),
    (
      ["--replicas", "1", "--compressor", "int4"],
      "`compressor` acts between replicas, of which there is one, got 'int4'",
    ),
    (["--weight-decay", "-1"], "`weight_decay` must be finite and at least 0, got -1"),
    (["--schedule-steps", "0"], "`schedule_steps` must be at least 1, got 0"),
    (["--method", "none", "--compressor", "int4"], "`compressor` has no effect with method 'none'"),
    (["--method", "sgd"], "invalid choice 'sgd' for argument '--method'"),
    (["--preset", "huge"], "invalid choice 'huge' for argument '--preset'"),
    (["--replicas"], "Missing value for argument '--replicas'"),
    (["--replicaz", "2"], "Unrecognized options: --replicaz, 2"),
    (["--resume"], "`resume` needs `out`"),
    (["--replica-change", "average_replicas"], "`replica_change` needs `resume`"),
  ],
)
def test_wrong_flags(fails, tiny_flags, argv, message):
  code, line = fails(*tiny_flags, *argv)
  assert code == 2
  assert message in line


def test_more_devices_than_there_are(fails, tiny_flags):
  code, line = fails(*tiny_flags, "--fsdp", "16", "--batch-size", "32")
  assert code == 1
  assert "`fsdp` = 16 must not exceed the devices, got 8" in line


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "does not exist"),
    (b"", "is empty"),
    (b" \n\n", "is empty"),
    (b"a few words only", "is too small"),
    (b"text\0text", "a NUL byte"),
    ("déjà vu".encode("latin-1"), "not UTF-8"),
  ],
)
def test_unusable_data(fails, tiny_flags, tmp_path, content, message):
  path = tmp_path / "some.txt"
  if content is not None:
    path.write_bytes(content)
  code, line = fails(*tiny_flags, "--data", path, "--out", tmp_path / "run")
  assert code == 1
  assert message in line
  assert str(path) in line
  assert not (tmp_path / "run").exists()
  assert content is None or path.read_bytes() == content


def test_too_little_text_for_one_batch(fails, tiny_flags):
  code, line = fails(*tiny_flags, "--seq-len", "512", "--batch-size", "64")
  assert code == 1
  assert "`batch_size` must be at most the number of sequences" in line or "tokens" in line


def test_a_short_text_is_evaluated_in_smaller_batches(script, text):
  config = script.Config(
    data=[str(text)], preset="nano", vocab_size=300, seq_len=64, batch_size=64, replicas=2
  )
  corpora = script.load_corpora(config, dataclasses.replace(llama.nano(), vocab_size=300))
  rows = types.SimpleNamespace(local_rows=lambda n: {"row_start": 0, "row_count": n})
  _, evaluation = script.build_data(config, corpora, rows)
  sizes = {len(batch["tokens"]) for batch in evaluation}
  assert len(sizes) == 1
  assert 0 < (size := sizes.pop()) < config.batch_size
  assert size % config.replicas == 0


def test_a_vocabulary_too_small_for_bytes(fails, tiny_flags):
  code, line = fails(*tiny_flags, "--vocab-size", "200")
  assert code == 1
  assert "`vocab_size` must be in [257" in line


def test_token_ids_beyond_the_vocabulary(fails, tiny_flags, script, tmp_path, monkeypatch):
  """As a cache of another tokenizer would give them: the flags use one size for both."""
  wide = script.data.prepare_text(tiny_flags[5], vocab_size=400)
  monkeypatch.setattr(script.data, "prepare_text", lambda *args, **kwargs: wide)
  code, line = fails(*tiny_flags, "--out", tmp_path / "run")
  assert code == 1
  assert "`tokens` must be in [0, 300) (`vocab_size`), got ids from 0 to 3" in line
  assert not (tmp_path / "run").exists()


# Folders that must not be touched.


def test_a_folder_with_a_run_or_anything_needs_resume(fails, tiny_flags, tmp_path):
  """Refused after the step was traced, before anything is compiled."""
  other, mine = tmp_path / "run", tmp_path / "mine"
  RunFolder(other, {"steps": 3})
  mine.mkdir()
  (mine / "notes.txt").write_text("mine")
  before = contents(tmp_path)
  for path in (other, mine, mine / "notes.txt"):
    code, line = fails(*tiny_flags, "--out", path)
    assert code == 1
    assert f"{path} is not an empty folder: give --resume" in line
  assert contents(tmp_path) == before


def test_resume_without_a_run(fails, tiny_flags, tmp_path):
  code, line = fails(*tiny_flags, "--resume", "--out", tmp_path / "none")
  assert code == 1
  assert "no run to resume in" in line
  assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_loss_that_explodes(fails, tiny_flags, tmp_path):
  """A learning rate of 1e30: the parameters are huge after step 1."""
  code, line = fails(
    *tiny_flags, "--lr", "1e30", "--warmup", "0", "--steps", "9", "--out", tmp_path / "run"
  )
  assert code == 1
  message = r"the loss is (nan|inf) at step [23]; there is no checkpoint. Try a lower learning rate"
  assert re.search(message, line), line
  assert not any((tmp_path / "run" / "checkpoints").iterdir())
