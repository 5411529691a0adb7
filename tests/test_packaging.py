"""What `import jaxcomm` costs and touches: core dependencies only, no thread, no device.

`scripts/check_wheel` runs this file against a wheel in a clean environment.
"""

import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OPTIONAL = (
  "datasets", "grain", "matplotlib", "pandas", "pyarrow", "safetensors", "sympy", "tensorboardX",
  "tokenizers", "tyro", "wandb",
)  # fmt: skip

# Runs first in every process below: an optional package cannot be imported by anything.
BLOCK = f"""
import sys
class Block:
  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] in {OPTIONAL}:
      raise ModuleNotFoundError(f"blocked: {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""

LIGHT = (
  BLOCK
  + """
import json, threading, time
import jax, optax
threads, start = threading.active_count(), time.perf_counter()
import jaxcomm
seconds = time.perf_counter() - start
new_threads = threading.active_count() - threads
jax.config.update("jax_num_cpu_devices", 3)  # refused once devices have started
devices = len(jax.devices())
print(json.dumps([seconds, new_threads, devices]))
"""
)


def python(code: str, folder: pathlib.Path) -> str:
  """Runs `code` in `folder`, which is first on the path, as for a user's script."""
  path = [] if os.environ.get("JAXCOMM_TEST_INSTALLED") else [str(ROOT)]
  env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *path]), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_import_is_light(tmp_path):
  """Also beside a folder `models` of the user's own, which nothing looks into."""
  for name in ("models", "parallel"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')\n")
  seconds, new_threads, devices = json.loads(python(LIGHT, tmp_path))
  assert seconds < 2
  assert new_threads == 0
  assert devices == 3


def test_every_package_imports_with_core_dependencies_only(tmp_path):
  names = ("collectives", "compressors", "data", "inspect", "training", "transforms")
  imports = [f"import jaxcomm.{name}" for name in names] + ["import parallel", "import models"]
  python("\n".join([BLOCK, *imports]), tmp_path)


def test_a_script_says_which_extra_is_missing(tmp_path):
  code = (
    "from jaxcomm.training import RunConfig, launch\nlaunch(RunConfig, print, ['--steps', '3'])"
  )
  wrapped = f"{BLOCK}\nsys.stderr = sys.stdout\ntry:\n  exec({code!r})\nexcept SystemExit: pass"
  assert python(wrapped, tmp_path).startswith("error: ")


@pytest.fixture(scope="module")
def project():
  file = ROOT / "pyproject.toml"
  if not file.exists():
    pytest.skip("there is no checkout")
  return tomllib.loads(file.read_text())["project"]


def test_core_dependencies_are_few(project):
  names = {requirement.partition(">=")[0] for requirement in project["dependencies"]}
  assert names == {"flax", "jax", "numpy", "optax", "orbax-checkpoint"}
