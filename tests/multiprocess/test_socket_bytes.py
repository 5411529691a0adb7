"""Bytes on the socket against bytes read from the compiled program.

The processes run in a network namespace where nobody else talks; `/proc/net/dev` counts what leaves
through its loopback device, TCP/IP headers and acknowledgements included.
"""

import pytest

from tests.multiprocess.launch import namespace_missing, network_namespace, run_workers
from tests.multiprocess.programs import WIRES

MISSING = namespace_missing()
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

# The meter counts algorithms that send no byte twice. gloo reduces and scatters by recursive
# halving, which leaves each block at the rank of reversed bits: of four ranks, 1 and 2 exchange
# theirs, half a block per device on top of three.
GLOO = {("psum_scatter", 4): 3.5 / 3}


@pytest.fixture(scope="module", params=[2, 4])
def job(request, tmp_path_factory):
  """Number of processes, and what each reports: one job runs all programs."""
  folder = tmp_path_factory.mktemp("sockets")
  with network_namespace() as prefix:
    reports = run_workers(
      "socket_worker.py", request.param, folder=folder, prefix=prefix, timeout=600
    )
  return request.param, reports


@pytest.mark.parametrize("name", WIRES)
def test_socket_bytes_agree_with_the_compiled_program(job, name):
  num_processes, reports = job
  results = [r[name] for r in reports]
  result = results[0]
  ratio = result["measured"] / result["compiled"]
  print(f"{name}, {num_processes} processes: {result}, ratio {ratio:.4f}")
  assert all(r["compiled"] == result["compiled"] for r in results)
  assert result["compiled"] >= 4e6
  assert result["idle"] < 0.005 * result["measured"]  # heartbeats of the coordinator
  assert ratio == pytest.approx(GLOO.get((name, num_processes), 1.0), rel=0.03)
