"""Devices of a run, and the job that a launcher started it in."""

import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import pytest

from jaxcomm.training import RunConfig, _cluster, _devices, start_devices

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _eight_devices():
  """JAX has started, so that `start_devices` does not choose their number."""
  assert len(jax.devices()) == 8


def test_one_device_per_place_on_the_mesh():
  assert start_devices(RunConfig(replicas=2, fsdp=2)) == jax.devices()[:4]
  assert start_devices(RunConfig(replicas=2, data_parallel=2, fsdp=2)) == jax.devices()[:8]
  assert start_devices(RunConfig(replicas=2, seq_shards=2, tensor=2)) == jax.devices()[:8]


def test_fewer_devices_than_places_stack_the_replicas():
  assert start_devices(RunConfig(replicas=4, max_devices=1)) == jax.devices()[:1]
  assert start_devices(RunConfig(replicas=4, max_devices=3)) == jax.devices()[:1]
  assert start_devices(RunConfig(replicas=4, fsdp=2, max_devices=5)) == jax.devices()[:2]
  assert start_devices(RunConfig(replicas=9)) == jax.devices()[:1]  # there are eight here


def test_too_few_devices_for_one_replica():
  with pytest.raises(ValueError, match=r"`data_parallel` \* `fsdp` = 4 must not exceed .* got 3"):
    start_devices(RunConfig(replicas=2, data_parallel=2, fsdp=2, max_devices=3))


def test_replicas_with_cut_sequences_are_not_stacked():
  message = r"`seq_shards` = 2 needs .* `replicas` \* `seq_shards` = 8 places, got 2: .* stacked"
  with pytest.raises(ValueError, match=message):
    start_devices(RunConfig(replicas=4, seq_shards=2, max_devices=2))


def test_processes_must_share_the_devices_evenly():
  with pytest.raises(ValueError, match=r"= 3 must be a multiple of the number of processes, got 2"):
    start_devices(RunConfig(replicas=3, coordinator="h:1", num_processes=2, process_id=0))


def test_processes_give_equal_numbers_of_devices():
  """A TPU pod may list the devices of its hosts in turns, and have more than are needed."""
  device = lambda i, process: types.SimpleNamespace(id=i, process_index=process)  # noqa: E731
  devices = [device(i, i % 3) for i in range(12)]
  chosen = _devices._of_each_process(devices, 2)
  assert [(d.process_index, d.id) for d in chosen] == [
    (0, 0), (0, 3), (1, 1), (1, 4), (2, 2), (2, 5),
  ]  # fmt: skip


# Launchers.

SLURM = {
  "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
  "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "0"}
ADDRESS = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


@pytest.fixture
def environment(monkeypatch):
  for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_"))]:
    monkeypatch.delenv(name)
  return lambda values: [monkeypatch.setenv(*item) for item in values.items()]


@pytest.mark.parametrize(
  ("values", "processes"),
  [
    ({}, 1),
    (SLURM, 4),
    (SLURM | {"SLURM_NTASKS": "1"}, 1),  # srun --pty bash
    ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, 1),  # a script without srun
    (OPEN_MPI | ADDRESS, 3),
    (OPEN_MPI | ADDRESS | SLURM, 3),  # mpirun in a Slurm job
  ],
)
def test_processes_that_a_launcher_started(environment, values, processes):
  environment(values)
  assert _cluster.launched_processes() == processes


def test_an_open_mpi_that_hides_the_address_needs_the_flags(environment):
  environment(OPEN_MPI)
  flags = r"--coordinator HOST:PORT --num-processes 3 --process-id \$OMPI_COMM_WORLD_RANK"
  with pytest.raises(ValueError, match=f"`coordinator` must be given: .* Add {flags}"):
    _cluster.launched_processes()


def test_slurm_is_seen_where_jax_sees_it(environment, monkeypatch):
  clusters = pytest.importorskip("jax._src.clusters")
  environment(SLURM)
  assert clusters.SlurmCluster.is_env_present()
  assert clusters.SlurmCluster.get_process_count() == _cluster.launched_processes()
  for name in SLURM:
    with monkeypatch.context() as patch:
      patch.delenv(name)
      assert not clusters.SlurmCluster.is_env_present()
      assert _cluster.launched_processes() == 1


@pytest.fixture
def joined(monkeypatch):
  calls = []
  monkeypatch.setattr("jax.distributed.initialize", lambda *args: calls.append(args))
  return calls


def test_joins_by_flags_launcher_or_pod_and_else_not_at_all(environment, joined, monkeypatch):
  _cluster.join(None, None, None)
  assert joined == []
  monkeypatch.setattr(_cluster, "_on_tpu", lambda: True)
  _cluster.join(None, None, None)
  assert joined.pop() == ()
  environment(SLURM)
  _cluster.join(None, None, None)
  assert joined.pop() == ()
  _cluster.join("host:1", 2, 0)
  assert joined == [("host:1", 2, 0)]


def test_a_single_tpu_host_outside_a_pod_is_no_error(environment, monkeypatch):
  asked = []

  def initialize():
    asked.append(True)
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr("jax.distributed.initialize", initialize)
  monkeypatch.setattr(_cluster, "_on_tpu", lambda: True)
  _cluster.join(None, None, None)
  assert asked == [True]


@pytest.mark.slow
def test_two_processes_of_slurm_share_a_mesh(environment):
  """Real processes on this machine, with the variables that `srun` would set."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  code = (
    "import jax; from jaxcomm.training import RunConfig, start_devices;"
    "devices = start_devices(RunConfig(replicas=2, data_parallel=2));"
    "print(jax.process_index(), [d.process_index for d in devices])"
  )
  variables = SLURM | {
    "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port,
    "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
  }  # fmt: skip
  jobs = [
    subprocess.Popen(
      [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
      env={**os.environ, **variables, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    printed = [job.communicate(timeout=120)[0] for job in jobs]
  finally:
    for job in jobs:
      job.kill()
  assert printed == ["0 [0, 0, 1, 1]\n", "1 [0, 0, 1, 1]\n"]


def test_compiled_programs_are_kept_by_default(tmp_path):
  """In the folder of the data caches; a folder that JAX was given stays."""
  code = (
    "import jax; from jaxcomm.training import RunConfig, start_devices;"
    "start_devices(RunConfig(replicas=1)); print(jax.config.jax_compilation_cache_dir)"
  )
  base = {
    k: v for k, v in os.environ.items() if k not in ("JAXCOMM_CACHE", "JAX_COMPILATION_CACHE_DIR")
  }
  base |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}

  def folder(**variables):
    done = subprocess.run(
      [sys.executable, "-c", code],
      env={**base, **variables},
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip()

  assert folder() == str(tmp_path / ".cache" / "jaxcomm" / "xla")
  assert folder(JAXCOMM_CACHE="/kept", JAX_COMPILATION_CACHE_DIR="/mine") == "/mine"
