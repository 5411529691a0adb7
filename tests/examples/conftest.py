"""`examples/train_lm.py` run in this process, on a model and a text that take seconds."""

import dataclasses
import shutil

import pytest

from jaxcomm.training import launch
from models import llama
from tests.examples import small_lm
from tests.examples.load_script import load_script
from tests.examples.write_text import write_text

# Flags that the training step does not depend on.
FREE = (
  "data", "data_weights", "dry_run", "eval_batches", "eval_every", "keep", "log_every", "out",
  "replica_change", "resume", "save_every", "steps", "text_field", "tokenizer",
)  # fmt: skip


def once(module):
  """Its `build_step`, but each step is made once: runs that ask for the same compile nothing."""
  build_step, made = module.build_step, {}

  def build(config, model, devices):
    flags = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    key = repr((flags, module.llama, model, devices))
    if key not in made:
      made[key] = build_step(config, model, devices)
    return made[key]

  return build


@pytest.fixture(scope="session")
def script():
  """The script, which trains `small_lm`."""
  with load_script("train_lm") as module:
    module.build_step = once(module)
    module.llama = small_lm
    yield module


@pytest.fixture(scope="module")
def with_llama(script):
  """For a file about the script's own model."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(script, "llama", llama)
    yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
  """A text file, and the cache of its tokens."""
  with write_text(tmp_path_factory.mktemp("data"), lines=1000) as path:
    yield path


@pytest.fixture(scope="session")
def tiny_flags(text):
  return [
    *("--preset", "nano", "--vocab-size", "300", "--data", str(text), "--compressor", "none"),
    *("--seq-len", "16", "--batch-size", "8", "--replicas", "2", "--eval-batches", "1"),
    *("--log-every", "1", "--eval-every", "3", "--save-every", "3", "--sync-period", "4"),
  ]


@pytest.fixture(scope="session")
def start(script, quick_compile):
  """Runs the script with flags."""

  def run(*argv):
    with quick_compile():
      launch(script.Config, script.main, [str(a) for a in argv])

  return run


@pytest.fixture
def train(start, capsys):
  """Runs the script with flags: what it prints."""

  def run(*argv):
    capsys.readouterr()
    start(*argv)
    return capsys.readouterr().out

  return run


@pytest.fixture
def fails(start, capsys):
  """Runs the script with flags that must fail: exit code and its one line."""

  def run(*argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
      start(*argv)
    err = capsys.readouterr().err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return exit_info.value.code, err

  return run


@pytest.fixture(scope="session")
def short(start, tiny_flags, tmp_path_factory):
  """A finished run of 6 steps, checkpoints at 3 and 6: in the middle of a round of 4."""
  path = tmp_path_factory.mktemp("runs") / "short"
  start(*tiny_flags, "--steps", "6", "--out", path)
  return path


@pytest.fixture
def run(short, tmp_path):
  """A copy of `short` to work on."""
  return shutil.copytree(short, tmp_path / "run")
