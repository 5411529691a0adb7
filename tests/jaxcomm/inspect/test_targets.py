"""Ahead-of-time targets: what they refuse, and what the real compilers make of a program."""

import importlib.util
import pathlib
import re
import runpy
import types

import jax
import numpy as np
import pytest

from jaxcomm import inspect
from jaxcomm.inspect.__main__ import main
from jaxcomm.training import RunConfig, start_devices

EXAMPLE = pathlib.Path(__file__).parents[3] / "examples" / "train_lm.py"
SCRIPT = pathlib.Path(__file__).parents[3] / "scripts" / "make_hlo_fixtures.py"


def test_unknown_target_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"one of gpu:h100:1x8, .*tpu:v5p:4x4x4, got 'tpu:v9'"):
    inspect.target("tpu:v9")


@pytest.mark.parametrize(("name", "extra"), [("gpu:h100:1x8", "gpu"), ("tpu:v5e:2x4", "tpu")])
def test_missing_compiler_names_the_extra(name, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
  with pytest.raises(ImportError, match=rf"pip install 'jaxcomm\[aot-{extra}\]'"):
    inspect.target(name)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--target", "tpu:v9", "--", "x.py"], "error: `name` must be one of"),
    (["--target", "tpu:v5e:2x4"], "name a script after --"),
  ],
)
def test_command_says_what_is_wrong(flags, message, capsys):
  with pytest.raises(SystemExit):
    main(flags)
  assert message in capsys.readouterr().err


def test_scripts_get_the_devices_of_the_target():
  chosen = inspect.Target("four", tuple(reversed(jax.devices()[:4])), inspect.H100)
  config = RunConfig(replicas=1, fsdp=2)
  with inspect.compiling_for(chosen) as compilation:
    assert start_devices(config) == list(chosen.devices[:2])
    assert inspect.current_compilation() is compilation
  assert inspect.current_compilation() is None
  assert start_devices(config) == jax.devices()[:2]


@pytest.mark.slow
def test_command_describes_the_step_of_a_script(monkeypatch, capsys, tmp_path):
  here = inspect.Target("eight", tuple(jax.devices()), inspect.H100)
  monkeypatch.setattr(inspect.__main__, "target", lambda name: here)
  flags = ["--preset", "nano", "--replicas", "2", "--fsdp", "2", "--method", "ddp"]
  main(["--target", "eight", "--out", str(tmp_path), "--", str(EXAMPLE), *flags])
  out = capsys.readouterr().out
  assert "eight: 4 of 8 devices\nmemory per device: " in out
  assert "GiB of 79.14 (fits;" in out
  assert re.search(r"sent per device over replica: [\d,]+ bytes", out)
  assert re.search(r"overlap: 0 of \d+ collectives", out)  # XLA:CPU is synchronous
  assert "modelled with H100 SXM" in out
  assert {p.name for p in tmp_path.iterdir()} == {"step.hlo.txt", "timeline.png", "trace.json"}


# --- with the compilers


def compiler(name):
  try:
    return inspect.target(name)
  except ImportError as e:
    pytest.skip(str(e))


@pytest.mark.aot
@pytest.mark.parametrize(
  ("name", "hidden"), [("gpu:h100:1x8", [1, 2, 0]), ("tpu:v5e:2x4", [1, 1, 0])]
)
def test_ladder_overlaps(name, hidden):
  """All all-reduces but the last have a product of another block beside them."""
  chosen = compiler(name)
  programs = types.SimpleNamespace(**runpy.run_path(str(SCRIPT)))
  mesh = jax.sharding.Mesh(np.array(chosen.devices).reshape(2, 4), ("data", "tensor"))
  function, arguments = programs.ladder_program(mesh)
  options = programs.overlap_options(chosen.devices[0])
  compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
  report = inspect.overlap_report(compiled, mesh)
  assert [c.num_matmuls for c in report.collectives] == hidden
  assert inspect.describe_compiled(compiled, mesh, chosen, report).startswith(name)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["gpu:h100:4x8", "tpu:v5p:4x4x4"])
def test_devices_of_several_hosts(name):
  devices = compiler(name).devices
  hosts = [d.process_index for d in devices]
  assert len(set(hosts)) > 1
  assert len(devices) == {"gpu:h100:4x8": 32, "tpu:v5p:4x4x4": 64}[name]
