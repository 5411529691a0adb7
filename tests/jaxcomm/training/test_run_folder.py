"""The run folder: what a kill may leave, and that nothing of the user's is overwritten."""

import json
import pathlib

import pytest

from jaxcomm.training import RunFolder, RunFolderError, load_config, read_metrics

CONFIG = {"steps": 10, "lr": 0.1, "out": "here"}


def contents(path):
  return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path):
  """A run with three logged steps."""
  path = tmp_path / "run"
  folder = RunFolder(path, CONFIG)
  for step in range(3):
    folder.log({"step": step, "loss": 0.1 * step})
  folder.close()
  return path


def test_a_new_run_writes_its_configuration(tmp_path):
  path = tmp_path / "deep" / "run"
  folder = RunFolder(path, CONFIG)
  assert load_config(path) == CONFIG
  assert sorted(contents(path)) == ["config.json"]
  assert folder.checkpoints == path / "checkpoints"
  assert folder.finished_steps is None


def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path):
  folder = RunFolder(tmp_path / "run", CONFIG)
  folder.log({"step": 1, "loss": 1 / 3})
  assert read_metrics(folder.path) == [{"step": 1, "loss": 1 / 3}]  # before close
  folder.log({"step": 2, "loss": 0.5})
  assert [r["step"] for r in read_metrics(folder.path)] == [1, 2]
  folder.close()
  folder.close()


def test_floats_survive_to_the_bit(tmp_path):
  folder = RunFolder(tmp_path / "run", CONFIG)
  values = [0.1, 1e-300, 2.718281828459045, 4.4725341796875]
  for step, value in enumerate(values):
    folder.log({"step": step, "loss": value})
  folder.continue_from(10)  # reads and writes all rows
  assert [r["loss"] for r in read_metrics(folder.path)] == values


def test_refuses_a_folder_that_holds_anything(run, tmp_path):
  user = tmp_path / "mine"
  user.mkdir()
  (user / "thesis.tex").write_text("years of work")
  file = tmp_path / "file"
  file.write_text("x")
  before = contents(tmp_path)
  for path in (run, user, file):
    with pytest.raises(RunFolderError, match=f"{path} is not an empty folder: give --resume"):
      RunFolder(path, CONFIG)
  assert contents(tmp_path) == before


def test_an_empty_folder_is_as_good_as_none(tmp_path):
  RunFolder(tmp_path, CONFIG)
  assert load_config(tmp_path) == CONFIG


def test_a_run_killed_while_it_wrote_its_configuration_can_start_again(tmp_path):
  (tmp_path / "config.json.tmp").write_text('{"ste')
  RunFolder(tmp_path, CONFIG)
  assert sorted(contents(tmp_path)) == ["config.json"]
  assert load_config(tmp_path) == CONFIG


def test_resume_changes_nothing_before_it_continues(run):
  before = contents(run)
  folder = RunFolder(run, {**CONFIG, "steps": 20}, resume=True, may_change={"steps"})
  assert contents(run) == before
  folder.continue_from(1)
  assert load_config(run)["steps"] == 20
  assert [r["step"] for r in read_metrics(run)] == [0, 1]
  folder.log({"step": 2, "loss": 0.0})
  assert [r["step"] for r in read_metrics(run)] == [0, 1, 2]
  folder.close()


def test_a_line_cut_by_a_kill_is_dropped(run):
  with (run / "metrics.jsonl").open("a") as f:
    f.write('{"step": 3, "lo')
  assert [r["step"] for r in read_metrics(run)] == [0, 1, 2]
  folder = RunFolder(run, CONFIG, resume=True)
  folder.continue_from(2)
  folder.log({"step": 3, "loss": 1.0})
  folder.close()
  lines = (run / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_nothing_is_kept_without_a_checkpoint(run):
  RunFolder(run, CONFIG, resume=True).continue_from(-1)
  assert read_metrics(run) == []


def test_resume_without_metrics(tmp_path):
  RunFolder(tmp_path, CONFIG)
  RunFolder(tmp_path, CONFIG, resume=True).continue_from(-1)
  assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
  ("changed", "shown"),
  [
    ({"lr": 0.2}, "lr: 0.1 -> 0.2"),
    ({"lr": 0.2, "out": "there", "new": 1}, "lr: 0.1 -> 0.2"),
  ],
)
def test_resume_refuses_another_configuration(run, changed, shown):
  before = contents(run)
  with pytest.raises(RunFolderError, match=f"another configuration than .* with: {shown}"):
    RunFolder(run, {**CONFIG, **changed}, resume=True, may_change={"steps", "out"})
  assert contents(run) == before


def test_resume_without_a_run(tmp_path):
  (tmp_path / "file").write_text("x")
  for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
    with pytest.raises(RunFolderError, match=r"no run to resume in .*config\.json is missing"):
      RunFolder(path, CONFIG, resume=True)
  assert contents(tmp_path) == {"file": b"x"}


@pytest.mark.parametrize("text", ["", '{"steps": 1', "[1]", "3"])
def test_resume_with_a_broken_configuration(run, text):
  (run / "config.json").write_text(text)
  before = contents(run)
  with pytest.raises(RunFolderError, match=r"config\.json (is not readable|must hold an object)"):
    RunFolder(run, CONFIG, resume=True)
  assert contents(run) == before


def test_only_the_first_process_writes(run, tmp_path):
  before = contents(tmp_path)
  folder = RunFolder(tmp_path / "other", CONFIG, write=False)
  folder.log({"step": 1})
  folder.summarise({"steps": 1})
  resumed = RunFolder(run, CONFIG, resume=True, write=False)
  resumed.continue_from(0)
  assert contents(tmp_path) == before
  RunFolder(run, CONFIG, write=False)  # the first process has just created it


def test_finished_steps_are_those_of_the_summary(run):
  folder = RunFolder(run, CONFIG, resume=True)
  folder.summarise({"steps": 7, "final_loss": 1.0})
  assert folder.finished_steps == 7
  for text in ("", "[]", "{}", '{"steps": null}'):
    (run / "summary.json").write_text(text)
    assert folder.finished_steps is None


def test_a_failed_write_leaves_the_old_file(run, monkeypatch):
  def full(*args):
    raise OSError(28, "No space left on device")

  folder = RunFolder(run, {**CONFIG, "steps": 20}, resume=True, may_change={"steps"})
  monkeypatch.setattr("os.fsync", full)
  before = contents(run)
  with pytest.raises(OSError, match="No space left"):
    folder.continue_from(1)
  after = contents(run)
  assert {k: v for k, v in after.items() if not k.endswith(".tmp")} == before


def test_paths_may_be_strings(tmp_path):
  folder = RunFolder(str(tmp_path / "run"), CONFIG)
  assert folder.path == pathlib.Path(tmp_path / "run")
