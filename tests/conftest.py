"""Eight virtual CPU devices and a persistent compilation cache, set before JAX starts."""

import contextlib
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
_CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "xla"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_numpy_rank_promotion", "raise")


@contextlib.contextmanager
def _quick_compile():
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  jax.config.update(name, True)
  try:
    yield
  finally:
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def quick_compile():
  """`with quick_compile():` halves the time to compile, by hardly optimizing.

  For tests of what surrounds a program (flags, folders, resume), not of its numbers, its
  collectives or its speed.
  """
  return _quick_compile


@pytest.fixture(scope="module")
def quickly_compiled():
  """`quick_compile` for all of a file: `pytestmark = pytest.mark.usefixtures(...)`."""
  with _quick_compile():
    yield
