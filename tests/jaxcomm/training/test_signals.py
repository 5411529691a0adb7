"""SIGTERM is noted, not obeyed at once, and the handler before is put back."""

import os
import signal
import threading

import pytest

from jaxcomm.training._signals import TerminationSignal


@pytest.fixture
def handler():
  """A handler of the program around us, which must not be lost."""
  noted = []
  before = signal.signal(signal.SIGTERM, lambda *_: noted.append(1))
  yield noted
  signal.signal(signal.SIGTERM, before)


def test_notes_the_signal_and_restores_the_handler(handler):
  outer = signal.getsignal(signal.SIGTERM)
  with TerminationSignal() as stop:
    assert not stop.reached(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reached(2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.received
  assert signal.getsignal(signal.SIGTERM) == outer
  assert handler == []
  os.kill(os.getpid(), signal.SIGTERM)
  assert handler == [1]


def test_restores_the_handler_after_an_error(handler):
  outer = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyError):
    with TerminationSignal():
      raise KeyError
  assert signal.getsignal(signal.SIGTERM) == outer


def test_the_default_handler_comes_back():
  before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
  try:
    with TerminationSignal():
      assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)


def test_does_nothing_in_other_threads(handler):
  outer, seen = signal.getsignal(signal.SIGTERM), []

  def work():
    with TerminationSignal() as stop:
      seen.append((signal.getsignal(signal.SIGTERM) == outer, stop.reached(1)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(True, False)]
