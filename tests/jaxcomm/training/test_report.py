"""What is shown of a run: lines without a terminal, and the picture."""

import matplotlib.image
import pytest

from jaxcomm.training import Progress, RunFolder, format_bytes, plot_report

ROWS = [
  {"step": 0, "eval_loss": 5.0},
  {"step": 1, "loss": 4.0, "tokens_per_s": 10.0, "wire_bytes": 5.0, "wire_bytes_total": 5.0},
  {"step": 2, "loss": 3.0, "tokens_per_s": 1234.5, "wire_bytes": 5.0, "wire_bytes_total": 1e4},
  {"step": 3, "loss": 2.0, "tokens_per_s": 10.0, "wire_bytes": 0.0, "wire_bytes_total": 1e4},
  {"step": 4, "loss": 1.0, "eval_loss": 1.5, "tokens_per_s": 10.0, "wire_bytes_total": 2e4},
]


def shown(capsys, rows, **kwargs):
  with Progress(4, **kwargs) as progress:
    for row in rows:
      progress.advance(row["step"])
      progress.report(row)
  return capsys.readouterr().out.splitlines()


def test_lines_hold_what_was_logged(capsys):
  lines = shown(capsys, ROWS, seconds=0.0)
  assert lines[0] == "step      0/4  eval_loss 5.0000"
  assert lines[2] == "step      2/4  loss 3.0000  1,234 tokens/s  sent 10.00 kB/device"
  assert "loss 1.0000  eval_loss 1.5000" in lines[4]
  assert len(lines) == 5


def test_few_lines_but_always_evaluations_and_the_end(capsys):
  lines = shown(capsys, ROWS, seconds=1e9)
  assert [line.split()[1] for line in lines] == ["0/4", "4/4"]


def test_quiet(capsys):
  assert shown(capsys, ROWS, seconds=0.0, quiet=True) == []


class Terminal:
  """Makes rich believe in a terminal."""

  def __init__(self, stream):
    self._stream = stream

  def isatty(self):
    return True

  def __getattr__(self, name):
    return getattr(self._stream, name)


def test_a_bar_on_a_terminal(capsys, monkeypatch):
  import sys

  monkeypatch.setattr("sys.stdout", Terminal(sys.stdout))
  monkeypatch.setenv("TERM", "xterm")
  text = "\n".join(shown(capsys, ROWS))
  assert "4/4" in text
  assert "eval_loss 1.5000" in text


@pytest.mark.parametrize(
  ("value", "text"),
  [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (2.5e6, "2.50 MB"), (7e9, "7.00 GB"),
   (1e12, "1.00 TB"), (3e15, "3000.00 TB"), (-2000, "-2.00 kB")],
)  # fmt: skip
def test_bytes_in_decimal_units(value, text):
  assert format_bytes(value) == text


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], []])
@pytest.mark.parametrize("dense", [0.0, 1e6])
def test_the_picture_is_a_png(tmp_path, rows, dense):
  """Also of a run that logged little or nothing."""
  folder = RunFolder(tmp_path, {})
  for row in rows:
    folder.log(row)
  folder.close()
  path = plot_report(tmp_path, title="a run", dense_bytes_per_step=dense)
  assert path == tmp_path / "report.png"
  assert path.read_bytes().startswith(b"\x89PNG\r\n")
  image = matplotlib.image.imread(path)
  assert image.shape[0] > 300
  assert image.shape[1] > 900
  assert image.std() > 0.01
