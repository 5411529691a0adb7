"""A window of steps under `jax.profiler`."""

import pathlib
from typing import Any

import jax


def parse_window(text: str) -> tuple[int, int]:
  """START and STOP of "START:STOP".

  Raises:
    ValueError: `text` is not two numbers with 1 <= START < STOP.
  """
  first, colon, stop = text.partition(":")
  if not (colon and first.isdecimal() and stop.isdecimal() and 1 <= int(first) < int(stop)):
    raise ValueError(f"`profile_steps` must be START:STOP with 1 <= START < STOP, got {text!r}.")
  return int(first), int(stop)


class ProfileWindow:
  """Traces the steps from `first` up to, not including, `stop`; they count from 1.

  Used as a context manager around a loop, so that a trace is also closed where the loop ends
  within the window. XProf, TensorBoard with its profile plugin and Perfetto read the trace.

  Args:
    path: folder to write to.
    first: first step to trace.
    stop: first step not to trace any more.
  """

  def __init__(self, path: pathlib.Path, first: int, stop: int):
    self.path = path
    self._first, self._stop = first, stop
    self._open = False

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._close()

  def before(self, step: int, state: Any) -> None:
    """Opens or closes the window before `step` is dispatched.

    Args:
      step: the step to come.
      state: what the step before it returned; waited for before the window closes.
    """
    if self._open and step >= self._stop:
      jax.block_until_ready(state)
      self._close()
    elif not self._open and self._first <= step < self._stop:
      jax.block_until_ready(state)
      jax.profiler.start_trace(self.path)
      self._open = True

  def _close(self) -> None:
    if self._open:
      self._open = False
      jax.profiler.stop_trace()
