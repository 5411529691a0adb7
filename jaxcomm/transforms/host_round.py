"""A round whose exchange runs on the host: for slow links between processes."""

from concurrent.futures import Future
from typing import Any

import jax
import optax

from jaxcomm.transforms._checks import check_count, check_transform
from jaxcomm.transforms._local_updates import LocalUpdatesState
from jaxcomm.transforms.delayed import delayed
from jaxcomm.transforms.diloco import diloco
from jaxcomm.transforms.host_mean import HostMean
from jaxcomm.transforms.overlapped_round import (
  ValueAndGrad,
  check_round,
  end_of_round,
  inner_steps,
)


class HostRound:
  """`overlapped_round` with the exchange on a background thread instead of in the program.

  Each process is one replica with devices of its own (any shardings over them), and its programs
  hold no collective between processes. A call starts the mean of what the last round moved, runs
  the `sync_period` inner steps, and waits for the mean only then: a round takes the longer of the
  two. The numbers are those of `diloco(inner, delayed(outer))` with a mean before `outer`.

  Wire: what `host_mean` sends, once per round.

  Args:
    value_and_grad: `(params, batch) -> (value, grads)`, as from `jax.value_and_grad`.
    inner: optimizer of this replica.
    outer: an optimizer *without* a mean: `co2_outer(mean=optax.identity(), ...)`, `optax.sgd(0.7)`.
    host_mean: takes the mean over the processes.
    sync_period: inner steps per round.

  Raises:
    ValueError: `sync_period` is not an integer of at least 1, `inner` or `outer` is not a
      transform, `host_mean` is no `HostMean`; when called, as `overlapped_round`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm.transforms import HostMean, HostRound
    >>> loss = lambda p, target: 0.5 * (p - target) ** 2
    >>> host_mean = HostMean(lambda tree: tree)  # of one process
    >>> run_round = HostRound(
    ...   jax.value_and_grad(loss), optax.sgd(0.5), optax.sgd(1.0), host_mean, sync_period=2
    ... )
    >>> p = jnp.zeros(())
    >>> state = run_round.init(p)
    >>> for _ in range(2):
    ...   p, state, losses = run_round(p, state, jnp.full((2,), 4.0), timeout=60)
    >>> float(p), losses.tolist()
    (3.0, [8.0, 2.0])
  """

  def __init__(
    self,
    value_and_grad: ValueAndGrad,
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation,
    host_mean: HostMean,
    *,
    sync_period: int,
  ):
    check_count("sync_period", sync_period, at_least=1)
    check_transform("inner", inner)
    check_transform("outer", outer)
    if not isinstance(host_mean, HostMean):
      raise ValueError(f"`host_mean` must be a HostMean, got {host_mean!r}.")
    self._sync_period = sync_period
    self._host_mean = host_mean
    self._init = diloco(inner, delayed(outer), sync_period=sync_period).init
    self._pending: tuple[Any, Future] | None = None  # of which tree, and its mean

    @jax.jit
    def local(params, inner_state, batches):
      return inner_steps(value_and_grad, inner, params, inner_state, batches)

    @jax.jit
    def finish(state, local, inner_state, mean):
      step, outer_state = outer.update(mean, state.outer_state.outer_state, state.anchor)
      return end_of_round(state, local, inner_state, step, outer_state, sync_period)

    self._local, self._finish = local, finish

  def init(self, params: optax.Params) -> LocalUpdatesState:
    """The state before the first round; all processes must start from equal parameters."""
    state: Any = self._init(params)
    return state

  def __call__(
    self,
    params: optax.Params,
    state: LocalUpdatesState,
    batches: Any,
    *,
    timeout: float | None = None,
  ) -> tuple[optax.Params, LocalUpdatesState, Any]:
    """One round: `(params, state, values)`, see `overlapped_round`.

    Args:
      params: of this replica, where a round begins.
      state: from `init` or the last round.
      batches: arrays with a leading axis of `sync_period` steps.
      timeout: seconds to wait for the mean after the inner steps; None: for ever.

    Raises:
      TimeoutError: the mean was not there in time. Nothing has changed: call again with the same
        `params` and `state` to go on waiting for it.
      ValueError: another `state` than the one whose mean is being waited for.
    """
    check_round(state, batches, self._sync_period)
    late: Any = state.outer_state
    pending = self._start(late.inflight)
    local, inner_state, values = self._local(params, state.inner_state, batches)
    jax.block_until_ready(local)  # the time limit is for the exchange alone
    try:
      mean = pending.result(timeout)
    finally:
      if pending.done():
        self._pending = None
    params, state = self._finish(state, local, inner_state, mean)
    return params, state, values

  def _start(self, inflight: Any) -> Future:
    """The mean of `inflight`: the one that a call before has waited for in vain, or a new one."""
    if self._pending is None:
      self._pending = inflight, self._host_mean.start(inflight)
    tree, mean = self._pending
    if any(x is not y for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(inflight))):
      raise ValueError(
        "`state` must be the one whose mean is still being waited for, got another: the other"
        " processes wait for the mean of that one."
      )
    return mean
