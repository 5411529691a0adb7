"""An example as a module, imported as if it were run."""

import contextlib
import importlib.util
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

import jax

FOLDER = pathlib.Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def load_script(name: str, *imported: str) -> Iterator[ModuleType]:
  """The example `name`; at the end it and the modules of the folder that it imports are gone."""
  assert len(jax.devices()) == 8  # started here, so that the script does not choose their number
  sys.path.insert(0, str(FOLDER))  # as for a script
  spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  yield module
  for loaded in (name, *imported):
    del sys.modules[loaded]
  sys.path.remove(str(FOLDER))
