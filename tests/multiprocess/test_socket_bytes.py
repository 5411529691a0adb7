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


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize("name", WIRES)
def test_socket_bytes_agree_with_the_compiled_program(name, num_processes, tmp_path):
  with network_namespace() as prefix:
    results = run_workers(
      "socket_worker.py", num_processes, name, folder=tmp_path, prefix=prefix, timeout=600
    )
  result = results[0]
  ratio = result["measured"] / result["compiled"]
  print(f"{name}, {num_processes} processes: {result}, ratio {ratio:.4f}")
  assert all(r["compiled"] == result["compiled"] for r in results)
  assert result["compiled"] >= 4e6
  assert result["idle"] < 0.005 * result["measured"]  # heartbeats of the coordinator
  assert ratio == pytest.approx(GLOO.get((name, num_processes), 1.0), rel=0.03)
