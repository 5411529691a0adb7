"""Compiles the step of a training script for machines not here, and says what it would do there.

    python -m jaxcomm.inspect --target gpu:h100:1x8 -- \\
        examples/train_lm.py --preset llama3_8b --replicas 1 --fsdp 8 --batch-size 8

Runs the script with `--dry-run`. Prints memory per device against capacity, bytes sent per mesh
axis, what runs beside each collective, and modelled times; `--out DIR` adds the modelled timeline
as trace.json (ui.perfetto.dev) and timeline.png, and the program as step.hlo.txt.
"""

import argparse
import contextlib
import pathlib
import runpy
import sys
from collections.abc import Sequence

import jax

from jaxcomm.inspect import (
  compiling_for,
  describe_compiled,
  modelled_timeline,
  overlap_report,
  target,
)

_CPU_DEVICES = 64  # on which the bytes of stacked replicas are read


def main(argv: Sequence[str] | None = None) -> None:
  """Parses the flags before `--` and runs the script named after it."""
  argv = list(sys.argv[1:] if argv is None else argv)
  own, command = _split(argv)
  parser = argparse.ArgumentParser(
    prog="python -m jaxcomm.inspect",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage="%(prog)s --target TARGET [--out DIR] -- SCRIPT [FLAG ...]",
  )
  parser.add_argument("--target", required=True, help="gpu:h100:1x8, say")
  parser.add_argument("--out", type=pathlib.Path, help="folder for trace.json and timeline.png")
  flags = parser.parse_args(own)
  if not command:
    parser.error("name a script after --")
  with contextlib.suppress(RuntimeError):  # called by a program that has started JAX
    jax.config.update("jax_num_cpu_devices", _CPU_DEVICES)
  try:
    _inspect(flags.target, command, flags.out)
  except (ValueError, ImportError, NotImplementedError, OSError, jax.errors.JaxRuntimeError) as e:
    print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
    raise SystemExit(1) from e


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
  at = argv.index("--") if "--" in argv else len(argv)
  return argv[:at], argv[at + 1 :]


def _inspect(name: str, command: list[str], out: pathlib.Path | None) -> None:
  with compiling_for(target(name)) as compilation:
    _run_script(command)
  if not compilation.programs:
    raise ValueError(f"{command[0]} compiled no step in its --dry-run.")
  compiled, mesh = compilation.programs[-1]
  report = overlap_report(compiled, mesh)
  print(describe_compiled(compiled, mesh, compilation.target, report), flush=True)
  if out is not None:
    out.mkdir(parents=True, exist_ok=True)
    timeline = modelled_timeline(report, compilation.target.machine)
    timeline.save_chrome_trace(out / "trace.json")
    timeline.plot(out / "timeline.png", title=f"{' '.join(command)}\non {name}")
    (out / "step.hlo.txt").write_text(compiled.as_text() or "")


def _run_script(command: list[str]) -> None:
  """As `python SCRIPT FLAGS --dry-run` would, but in this process."""
  before = sys.argv, list(sys.path)
  sys.argv = [*command, "--dry-run"]
  sys.path.insert(0, str(pathlib.Path(command[0]).resolve().parent))
  try:
    runpy.run_path(command[0], run_name="__main__")
  except SystemExit as e:
    if e.code not in (None, 0):
      raise
  finally:
    sys.argv, sys.path[:] = before


if __name__ == "__main__":
  main()
