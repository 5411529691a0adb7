"""Means between processes on a thread of their own, while the devices go on computing."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_transform
from jaxcomm.transforms.pmean_over import pmean_over


class HostMean:
  """Takes means of trees on one background thread, in the order in which they were started.

  For links so slow that a collective on the device would keep it waiting: the tree is copied to
  the host, `mean` exchanges it there, and the device computes meanwhile. All processes must start
  their means in the same order.

  Args:
    mean: `tree of numpy arrays -> tree of numpy arrays`, called on the thread: a `ProcessMean`, or
      anything else that averages between processes.

  Raises:
    ValueError: `mean` is not callable.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.transforms import HostMean
    >>> host_mean = HostMean(lambda tree: tree)  # of one process
    >>> pending = host_mean.start({"w": jnp.ones(2)})
    >>> pending.result(timeout=10)["w"].tolist()
    [1.0, 1.0]
  """

  def __init__(self, mean: Callable[[Any], Any]):
    if not callable(mean):
      raise ValueError(f"`mean` must be a function of a tree, got {mean!r}.")
    self._mean = mean
    self._started: queue.SimpleQueue = queue.SimpleQueue()
    # A daemon: a peer that never answers must not keep this process from ending.
    threading.Thread(target=self._work, name="host-mean", daemon=True).start()

  def start(self, tree: Any) -> Future:
    """Copies `tree` to the host and starts its mean.

    The arrays may be donated or overwritten as soon as this returns.

    Returns:
      A `concurrent.futures.Future`; `result(timeout)` is the mean, or raises TimeoutError if it is
      not there within `timeout` seconds (it may be asked again), or what `mean` raised.
    """
    pending: Future = Future()
    self._started.put((pending, jax.tree.map(lambda x: np.array(x, copy=True), tree)))
    return pending

  def _work(self) -> None:
    while True:
      pending, tree = self._started.get()
      try:
        pending.set_result(self._mean(tree))
      except BaseException as e:  # belongs to the thread that waits
        pending.set_exception(e)


class ProcessMean:
  r"""The mean over the processes of a mesh of one device each: for `HostMean`.

  On CPU devices the exchange is gloo's (`jax_cpu_collectives_implementation`). The devices should
  not be those that train: programs of one device run one after the other. Processes that train on
  accelerators have their CPU devices free; others need a second CPU device.

  Wire: what `mean` sends; by default float32, :math:`2\frac{N-1}{N} 4P` bytes per process.

  Args:
    mesh: one axis, one device of every process.
    mean: any mean over that axis, e.g. `compressed_mean("replica", int8())`; default `pmean_over`.
      Its state (residuals, counts of left-out replicas) is in `state` and in no checkpoint.

  Attributes:
    state: of `mean`, of this process; None before the first mean.

  Raises:
    ValueError: `mesh` has several axes, or not one device of each process; `mean` is not a
      transform.

  Example:
    >>> import jax, numpy as np
    >>> from jaxcomm.transforms import ProcessMean
    >>> mean = ProcessMean(jax.make_mesh((1,), ("replica",)))
    >>> mean({"w": np.ones(2, np.float32)})["w"].tolist()
    [1.0, 1.0]
  """

  def __init__(self, mesh: jax.sharding.Mesh, *, mean: optax.GradientTransformation | None = None):
    _check_mesh(mesh)
    (axis_name,) = mesh.axis_names
    self._mean = pmean_over(axis_name) if mean is None else mean
    check_transform("mean", self._mean)
    self._rows = jax.NamedSharding(mesh, jax.P(axis_name))
    self._state: Any = None

    def local(tree, state):
      tree, state = jax.tree.map(lambda x: x[0], (tree, state))
      means, state = self._mean.update(tree, state)
      return means, jax.tree.map(lambda x: _axes.vary(x, axis_name)[None], state)

    self._update = jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=jax.P(axis_name), out_specs=(jax.P(), jax.P(axis_name))
      )
    )

  @property
  def state(self) -> Any:
    return None if self._state is None else jax.tree.map(lambda x: _own(x)[0], self._state)

  def __call__(self, tree: Any) -> Any:
    """The mean of every process's `tree`, numpy arrays like it."""
    if self._state is None:
      self._state = jax.tree.map(self._row, self._mean.init(tree))
    means, self._state = self._update(jax.tree.map(self._row, tree), self._state)
    return jax.tree.map(_own, means)

  def _row(self, x: Any) -> jax.Array:
    """This process's row of a global array with one row per process."""
    return jax.make_array_from_process_local_data(self._rows, np.asarray(x)[None])


def _own(x: jax.Array) -> np.ndarray:
  return np.asarray(x.addressable_data(0))


def _check_mesh(mesh: jax.sharding.Mesh) -> None:
  processes = [device.process_index for device in mesh.devices.flat]
  if len(mesh.axis_names) != 1 or sorted(processes) != list(range(jax.process_count())):
    raise ValueError(
      f"`mesh` must have one axis and one device of each of the {jax.process_count()} processes,"
      f" got axes {mesh.axis_names} and devices of processes {processes}."
    )
