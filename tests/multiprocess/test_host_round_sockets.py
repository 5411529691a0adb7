"""Two hosts that exchange on a background thread compute what simulated CO2 computes."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import jaxcomm
from tests.multiprocess import host_round_problem as problem
from tests.multiprocess.launch import run_workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
  """Parameters after each round, float32[ROUNDS, SIZE] per process."""
  folder = tmp_path_factory.mktemp("host_round")
  run_workers("host_round_worker.py", problem.HOSTS, str(folder), folder=folder, timeout=300)
  return [np.load(folder / f"params{i}.npy") for i in range(problem.HOSTS)]


def simulated(index, rows, barrier):
  """The rounds of one host, whose mean is taken between threads of this process."""

  def mean(moved):
    rows[index] = moved
    barrier.wait()
    half_the_sum = np.float32(0.5) * (rows[0] + rows[1])  # of two, in any order
    barrier.wait()  # both have read before one writes again
    return half_the_sum

  return problem.run_host(index, mean)


def test_bit_for_bit_the_delay_simulated_in_one_process(histories):
  rows, barrier = [None] * problem.HOSTS, threading.Barrier(problem.HOSTS, timeout=120)
  with ThreadPoolExecutor(problem.HOSTS) as pool:
    want = list(pool.map(lambda i: simulated(i, rows, barrier), range(problem.HOSTS)))
  np.testing.assert_array_equal(histories, want)
  np.testing.assert_array_equal(histories[0], histories[1])


def test_what_co2_computes_as_one_program(histories):
  tx = jaxcomm.co2(problem.INNER, **problem.OPTIONS)

  def replica(batches):
    def step(carry, batch):
      params, state = carry
      updates, state = tx.update(jax.grad(problem.loss_fn)(params, batch), state, params)
      params = jaxcomm.apply_updates(params, updates, state)
      return (params, state), params

    steps = batches.reshape(-1, problem.SIZE)
    return jax.lax.scan(step, (problem.PARAMS, tx.init(problem.PARAMS)), steps)[1]

  want = jax.jit(jax.vmap(replica, axis_name="replica"))(problem.BATCHES)[0]
  np.testing.assert_allclose(histories[0], want[problem.PERIOD - 1 :: problem.PERIOD], atol=1e-6)
