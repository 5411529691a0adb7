"""The two examples of user code: they learn, and send what they say."""

import importlib.util
import pathlib
import re

import jax
import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _as_in_a_users_program():
  with jax.numpy_rank_promotion("allow"):
    yield


def load(name):
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.slow
def test_optax(capsys):
  load("compose_optax").main(steps=100)
  out = capsys.readouterr().out
  changes = re.findall(r"^([-+])(?!\1)", out, re.MULTILINE)
  assert changes == ["-", "-", "+", "+"]  # two lines
  accuracy = [float(x) for x in re.findall(r"accuracy (\S+)", out)]
  dense, sent = (float(x.replace(",", "")) for x in re.findall(r"([\d,]+) bytes", out))
  assert min(accuracy) > 0.85
  assert dense / sent > 20 * 4 / (0.5 + 4 / 256) * 0.9  # 20 steps, 4 bits and scales; padding


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "linen"])
def test_linen_or_plain(model, capsys):
  assert load("compose_linen_or_plain").main(model, steps=100) > 0.85
  sent, dense = re.findall(r"([\d,]+)(?: bytes|\n)", capsys.readouterr().out)
  ratio = float(dense.replace(",", "")) / float(sent.replace(",", ""))
  assert ratio > 20 * 4 / (1 + 4 / 256) * 0.9
