"""SIGTERM as a request: finish the step, save, leave with exit code 0."""

import signal
import threading

import jax


class TerminationSignal:
  """Notes SIGTERM instead of dying; all processes stop after the same step.

  Used as a context manager around a loop. In threads other than the main one, and between several
  processes (where JAX's preemption service agrees on the step), no handler is installed.
  """

  def __init__(self):
    self.received = False
    self._previous = None

  def __enter__(self):
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      self._previous = signal.signal(signal.SIGTERM, self._note)
    return self

  def __exit__(self, *exc):
    if self._previous is not None:
      signal.signal(signal.SIGTERM, self._previous)

  def _note(self, *args):
    self.received = True

  def reached(self, step: int) -> bool:
    """Whether to stop before taking the step after `step`."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      self.received = multihost_utils.reached_preemption_sync_point(step)
    return self.received
