"""Every `--method` of `train_lm.py` trains, and counts what it sends."""

import json

import pytest

METHODS = {
  "powersgd": ["--rank", "2"],
  "demo": ["--demo-topk", "8", "--weight-decay", "0"],
  "ef21": [],
  "one_bit_adam": ["--exact-steps", "2"],
  "zero_one_adam": ["--exact-steps", "2"],
  "sign_majority": ["--lr", "1e-3"],
  # Six steps are two rounds; fragments of unequal sizes.
  "streaming_diloco": ["--sync-period", "3", "--fragments", "3", "--delay", "0"],
  "eager_diloco": ["--sync-period", "2"],
  "slowmo": ["--sync-period", "2"],
  "co2": ["--sync-period", "2"],
  "async_outer": ["--sync-period", "2", "--step-seconds", "1", "2"],
  "decoupled_diloco": [
    "--sync-period", "2", "--fragments", "2", "--step-seconds", "1", "2", "--quorum", "1",
  ],
}  # fmt: skip
COMPRESSORS = {"int8": ["--rounding", "stochastic"], "top_k": ["--error-feedback"]}


def summary_of(train, tiny_flags, out, *flags):
  few = ["--steps", "6", "--eval-every", "0", "--save-every", "0", "--out", out]
  train(*[f for f in tiny_flags if f not in ("--compressor", "none")], *few, *flags)
  return json.loads((out / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_methods(train, tiny_flags, tmp_path, method):
  summary = summary_of(train, tiny_flags, tmp_path / "run", "--method", method, *METHODS[method])
  assert summary["final_loss"] < 6.0  # log(300) = 5.7 at the start
  # Counted step by step from the program's branches, and announced from the schedule.
  assert summary["wire_bytes_total"] == pytest.approx(6 * summary["wire_bytes_per_step"]["replica"])
  assert 0 < summary["wire_bytes_total"] < 6 * summary["dense_wire_bytes_per_step"]


@pytest.mark.slow
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_compressors(train, tiny_flags, tmp_path, compressor):
  flags = ["--method", "ddp", "--compressor", compressor, *COMPRESSORS[compressor]]
  summary = summary_of(train, tiny_flags, tmp_path / "run", *flags)
  assert summary["final_loss"] < 6.0
  assert 0 < summary["wire_bytes_total"] < 0.5 * 6 * summary["dense_wire_bytes_per_step"]


@pytest.mark.slow
@pytest.mark.usefixtures("with_llama")
def test_ddp_averages_layer_by_layer(train, tiny_flags, tmp_path):
  within, after = (
    summary_of(train, tiny_flags, tmp_path / str(len(flags)), "--method", "ddp", *flags)
    for flags in (
      ["--compressor", "int8", "--overlap", "--data-parallel", "2"],
      ["--compressor", "none"],
    )
  )
  assert within["final_loss"] == pytest.approx(after["final_loss"], rel=3e-3)
  sent, dense = (summary["wire_bytes_per_step"]["replica"] for summary in (within, after))
  assert 0 < sent < 0.5 * dense  # whole blocks


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--method", "demo", "--compressor", "int8"], "`compressor` has no effect with method 'demo'"),
    (["--method", "ef21", "--compressor", "none"], "`compressor` must not be 'none'"),
    (["--quorum", "2"], "`quorum` has no effect with method 'diloco', got 2"),
    (["--step-seconds", "1"], "`step_seconds` has no effect with method 'diloco'"),
    (
      ["--method", "async_outer", "--step-seconds", "1"],
      "`step_seconds` must be given for each of 2 `replicas`",
    ),
    (
      ["--method", "async_outer", "--step-seconds", "1", "0"],
      "`step_seconds` must be positive and finite",
    ),
    (["--method", "decoupled_diloco", "--quorum", "3"], "`quorum` must be in [1, 2]"),
    (
      ["--method", "decoupled_diloco", "--grace-seconds", "-1"],
      "`grace_seconds` must be finite and at least 0",
    ),
    (["--overlap"], "`overlap` has no effect with method 'diloco'"),
    (["--method", "ddp", "--overlap", "--fsdp", "2"], "`fsdp` must be 1 with `overlap`, got 2"),
    (
      ["--method", "ddp", "--overlap", "--compressor", "top_k"],
      "`overlap` needs a `compressor` of ('none', 'int8', 'int4', 'fp8', 'e3m0'), got 'top_k'",
    ),
    (
      ["--method", "ddp", "--overlap", "--compressor", "int8", "--rounding", "stochastic"],
      "`overlap` keeps no state",
    ),
    (["--method", "powersgd", "--rank", "0"], "`rank` must be at least 1, got 0"),
    (["--compressor", "top_k", "--keep-ratio", "0"], "`keep_ratio` must be in (0, 1], got 0.0"),
    (["--compressor", "sign", "--rounding", "stochastic"], "`rounding` has no effect"),
    (
      ["--method", "streaming_diloco", "--fragments", "3"],
      "`sync_period` must be a multiple of `fragments`, 3, got 4",
    ),
    (
      ["--method", "streaming_diloco", "--fragments", "2", "--delay", "2"],
      "`delay` must be in [0, 2), below sync_period / fragments, got 2",
    ),
    (["--method", "ef21", "--error-feedback"], "`error_feedback` needs a `compressor`"),
  ],
)
def test_flags_without_sense(fails, tiny_flags, flags, message):
  rest = [f for f in tiny_flags if f not in ("--compressor", "none")]
  code, line = fails(*rest, *flags)
  assert code == 2
  assert message in line
