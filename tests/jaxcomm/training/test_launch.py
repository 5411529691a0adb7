"""Flags, saved flags, and one line for every error."""

import dataclasses
import json
import os
import pathlib
import pty
import subprocess
import sys

import pytest

from jaxcomm.training import RunConfig, RunFolder, launch

ROOT = pathlib.Path(__file__).parents[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Flags of a script."""

  lr: float = 0.1
  """learning rate"""

  def __post_init__(self):
    super().__post_init__()
    if not self.lr > 0:
      raise ValueError(f"`lr` must be positive, got {self.lr}.")


def parse(*argv):
  """The config that a script with these arguments gets."""
  got = []
  launch(Config, got.append, argv)
  return got[0]


def fails(capsys, *argv, main=lambda config: None):
  """Exit code and the one line of a script that fails."""
  with pytest.raises(SystemExit) as exit_info:
    launch(Config, main, argv)
  out, err = capsys.readouterr()
  assert out == ""
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  assert err.endswith("\n")
  return exit_info.value.code, err


def test_defaults_and_flags_in_kebab_case():
  assert parse() == Config()
  got = parse("--steps", "7", "--log-every", "0", "--out", "x", "--lr", "2", "--data-parallel", "2")
  assert got == Config(steps=7, log_every=0, out="x", lr=2.0, data_parallel=2)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--stepz", "4"], "Unrecognized options: --stepz, 4; Perhaps you meant: --steps"),
    (["4"], "Unrecognized options: 4"),
    (["--steps"], "Missing value for argument '--steps'"),
    (["--out"], "Missing value for argument '--out'"),
    (["--resume", "--out"], "Missing value for argument '--out'"),
    (["--steps", "many"], "Error parsing --steps: invalid literal for int"),
    (["--replica-change", "mean"], "invalid choice 'mean' for argument '--replica-change'"),
    (["--steps", "0"], "`steps` must be at least 1, got 0."),
    (["--lr", "nan"], "`lr` must be positive, got nan."),
    (["--resume"], "`resume` needs `out`"),
  ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(argv, message, capsys):
  code, line = fails(capsys, *argv)
  assert code == 2
  assert message in line
  assert "(--help lists the flags)" in line
  assert not set(line) & set("│─╭╰")


def test_long_values_stay_whole(capsys, monkeypatch):
  value = "x" * 150
  line = fails(capsys, "--steps", value)[1]
  assert line.startswith("error: Error parsing --steps: invalid literal")
  assert value in line
  monkeypatch.setenv("COLUMNS", "50")
  assert fails(capsys, "--steps", value)[1] == line
  assert os.environ["COLUMNS"] == "50"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_one_line_also_in_a_real_terminal(encoding, tmp_path):
  """With the box and the colours that tyro draws there, or without where they do not exist."""
  script = tmp_path / "script.py"
  script.write_text("from jaxcomm.training import RunConfig, launch\nlaunch(RunConfig, print)\n")
  screen, terminal = pty.openpty()
  done = subprocess.run(
    [sys.executable, script, "--stepz", "4"],
    stdout=terminal, stderr=subprocess.PIPE, text=True, check=False,
    env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
  )  # fmt: skip
  os.close(terminal)
  os.close(screen)
  assert done.returncode == 2
  assert done.stderr == (
    "error: Unrecognized options: --stepz, 4; Perhaps you meant: --steps INT optimizer steps in all"
    " (default: 300) (--help lists the flags)\n"
  )


@pytest.mark.parametrize(
  "error",
  [
    ValueError("two\nlines"),
    FileNotFoundError(2, "No such file", "data.txt"),
    OSError(28, "No space left on device"),
    ImportError("no grain"),
  ],
)
def test_expected_errors_are_one_line_and_exit_code_1(error, capsys):
  def main(config):
    raise error

  code, line = fails(capsys, main=main)
  assert code == 1
  assert line == f"error: {' '.join(str(error).split())}\n"


def test_unexpected_errors_keep_their_traceback():
  def main(config):
    raise ZeroDivisionError("a bug")

  with pytest.raises(ZeroDivisionError):
    launch(Config, main, [])


def test_debug_shows_expected_errors_too(monkeypatch):
  def main(config):
    raise ValueError("seen")

  monkeypatch.setenv("JAXCOMM_DEBUG", "1")
  with pytest.raises(ValueError, match="seen"):
    launch(Config, main, [])


def test_help_lists_all_flags_with_their_text(capsys):
  with pytest.raises(SystemExit) as exit_info:
    launch(Config, lambda config: None, ["--help"], description="What it does.")
  out = capsys.readouterr().out
  assert exit_info.value.code == 0
  assert "What it does." in out
  for field in dataclasses.fields(Config):
    assert f"--{field.name.replace('_', '-')}" in out
  assert "optimizer steps in all" in out


# Saved flags.


@pytest.fixture
def run(tmp_path):
  path = tmp_path / "run"
  start = Config(steps=7, lr=0.5, out=str(path), replicas=2, coordinator="h:1", num_processes=2,
                 process_id=0)  # fmt: skip
  RunFolder(path, dataclasses.asdict(start))
  return path


def test_resume_takes_the_flags_not_given_from_the_run(run):
  got = parse("--resume", "--out", str(run), "--steps", "9")
  assert got == Config(steps=9, lr=0.5, out=str(run), replicas=2, resume=True)  # no processes
  got = parse(f"--out={run}", "--resume", "--replica-change", "average_replicas")
  assert (got.replica_change, got.steps, got.resume) == ("average_replicas", 7, True)


def test_without_resume_nothing_is_taken(run):
  assert parse("--out", str(run)) == Config(out=str(run))


def test_resume_reports_a_missing_or_broken_run(run, tmp_path, capsys):
  code, line = fails(capsys, "--resume", "--out", str(tmp_path / "none"))
  assert code == 1
  assert "no run to resume in" in line
  (run / "config.json").write_text('{"steps": 3, "depth": 2}')
  assert (
    "has flags that this script lacks: ['depth']" in fails(capsys, "--resume", "--out", str(run))[1]
  )
  for steps in ('"many"', "null", "-1"):
    (run / "config.json").write_text(f'{{"steps": {steps}}}')
    code, line = fails(capsys, "--resume", "--out", str(run))
    assert code == 1
    assert "config.json does not hold the flags of a run" in line


def test_a_run_of_an_older_script_gets_the_new_defaults(run):
  saved = json.loads((run / "config.json").read_text())
  del saved["lr"]
  (run / "config.json").write_text(json.dumps(saved))
  assert parse("--resume", "--out", str(run)).lr == 0.1


# Checks of the flags.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"replicas": 0}, "`replicas` must be at least 1, got 0"),
    ({"data_parallel": 0}, "`data_parallel` must be at least 1, got 0"),
    ({"fsdp": -1}, "`fsdp` must be at least 1, got -1"),
    ({"seed": -1}, "`seed` must be at least 0, got -1"),
    ({"log_every": -1}, "`log_every` must be at least 0, got -1"),
    ({"eval_every": -1}, "`eval_every` must be at least 0, got -1"),
    ({"save_every": -1}, "`save_every` must be at least 0, got -1"),
    ({"keep": 1}, "`keep` must be at least 2: .* got 1"),
    ({"max_devices": 0}, "`max_devices` must be at least 1, got 0"),
    ({"resume": True}, "`resume` needs `out`"),
    ({"replica_change": "average_replicas"}, "`replica_change` needs `resume`, got 'average_repl"),
    ({"process_id": 0}, "`coordinator`, `num_processes` and `process_id` must be given together"),
    ({"coordinator": "h:1", "num_processes": 2}, "must be given together"),
    (
      {"coordinator": "h:1", "num_processes": 2, "process_id": 2},
      r"`process_id` must be in \[0, `num_processes`=2\), got 2",
    ),
    ({"coordinator": "h:1", "num_processes": 0, "process_id": 0}, "`process_id` must be in"),
  ],
)
def test_rejects(flags, message):
  with pytest.raises(ValueError, match=message):
    RunConfig(**flags)
