"""Two processes over sockets (gloo) give the bits that two virtual devices of one process give."""

import jax
import numpy as np
import pytest

from tests.multiprocess import programs
from tests.multiprocess.join import place
from tests.multiprocess.launch import run_workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """name -> the row of each process, from one job of two processes."""
  folder = tmp_path_factory.mktemp("collectives")
  run_workers("collectives_worker.py", 2, str(folder), folder=folder, timeout=600)
  files = [np.load(folder / f"rows{i}.npz") for i in range(2)]
  return {name: [file[name] for file in files] for name in programs.PROGRAMS}


@pytest.fixture(scope="module")
def mesh():
  return jax.make_mesh((2,), ("replica",), devices=jax.devices()[:2])


@pytest.mark.parametrize("name", programs.PROGRAMS)
def test_two_processes_equal_two_virtual_devices(rows, mesh, name):
  x = place(mesh, programs.inputs(2))
  expected = programs.on_mesh(programs.PROGRAMS[name], mesh)(x)
  for got, want in zip(rows[name], np.asarray(expected), strict=True):
    assert np.isfinite(want).all()
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)


EQUAL = ("pmean", "_hop", "quantized_psum", "quantized_all_gather")


@pytest.mark.parametrize(
  "name",
  [n for n in programs.PROGRAMS if any(part in n for part in EQUAL) and "scatter" not in n],
)
def test_sums_and_gathers_are_equal_on_both_processes(rows, name):
  np.testing.assert_array_equal(*rows[name])
