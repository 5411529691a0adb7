"""The modelled timeline against sums made by hand."""

import dataclasses
import json

import pytest

from jaxcomm import inspect
from tests.jaxcomm.inspect.hlo_programs import (
  MATMUL,
  done,
  dot,
  read_fixture,
  root,
  square_program,
  start,
)

SENT = inspect.all_reduce_bytes(4 * 256 * 256, 8)
# A product takes one second, an all-reduce two.
MACHINE = inspect.Machine(
  name="slow",
  peak_flops=MATMUL,
  hbm_bandwidth=1e18,
  memory_bytes=1,
  link_bandwidth=SENT / 2,
  link_latency=0.0,
)


def timeline(*lines, machine=MACHINE):
  return inspect.modelled_timeline(inspect.overlap_report(square_program(*lines)), machine)


def test_what_runs_beside_an_all_reduce_is_hidden():
  hidden = timeline(
    start("s", "p"), dot("a", "p", "p"), done("d", "s"), dot("b", "d", "a"), root("b", "b")
  )
  assert hidden.seconds == pytest.approx(3)
  assert (hidden.computing, hidden.communicating) == pytest.approx((2, 2))
  assert hidden.exposed == pytest.approx(1)
  assert hidden.hidden_share == pytest.approx(0.5)


def test_a_chain_takes_the_sum_and_two_collectives_wait_for_each_other():
  chain = timeline(dot("a", "p", "p"), start("s", "a"), done("d", "s"), root("d", "d"))
  assert chain.seconds == pytest.approx(3)
  assert chain.hidden_share == pytest.approx(0)
  two = timeline(start("s", "p"), start("t", "p"), done("d", "s"), done("e", "t"), root("d", "e"))
  assert two.seconds == pytest.approx(4)


def test_latency_counts_the_steps_of_the_ring():
  machine = dataclasses.replace(MACHINE, link_latency=1.0)
  assert timeline(start("s", "p"), done("d", "s"), root("d", "d"), machine=machine).seconds == (
    pytest.approx(2 + 2 * 7)
  )


def test_a_group_on_two_hosts_takes_the_network():
  machine = dataclasses.replace(MACHINE, devices_per_host=4, network_bandwidth=SENT / 20)
  spread = timeline(start("s", "p"), done("d", "s"), root("d", "d"), machine=machine)
  assert spread.seconds == pytest.approx(20)


def test_loops_multiply():
  """The gathers, scatters and products of all layers, whatever the compiler put outside a loop."""
  report = inspect.overlap_report(read_fixture("gpu/fsdp_grad"))
  model = inspect.modelled_timeline(report, inspect.H100)
  products = 3 * (2 + 1 + 4) * 2 * 1024 * 4096 * 4096 / inspect.H100.peak_flops
  sent = sum(c.bytes * c.times for c in report.collectives) / inspect.H100.link_bandwidth
  steps = sum(c.times for c in report.collectives)  # of two devices: one step each
  assert model.communicating == pytest.approx(sent + steps * inspect.H100.link_latency)
  assert products < model.computing < 2 * products
  assert max(model.computing, model.communicating) <= model.seconds
  assert model.seconds <= model.computing + model.communicating
  spans = sum(s.end - s.start for s in model.spans if s.engine == "compute")
  assert spans == pytest.approx(model.computing)


def test_sensitivity_names_the_constants():
  report = inspect.overlap_report(read_fixture("tpu/ladder"))
  head, *lines = inspect.sensitivity(report, inspect.TPU_V5E).splitlines()
  assert "197 TFLOP/s" in head
  assert "90 GB/s" in head
  times = [float(line.split()[3]) for line in lines]
  assert times == sorted(times, reverse=True)
  assert len(set(times)) == 3


def test_machine_without_a_rate_raises():
  with pytest.raises(ValueError, match="`link_bandwidth` must be positive, got 0"):
    dataclasses.replace(MACHINE, link_bandwidth=0)


@pytest.mark.slow
def test_trace_and_picture(tmp_path):
  report = inspect.overlap_report(read_fixture("gpu/fsdp_grad"))
  model = inspect.modelled_timeline(report, inspect.H100)
  model.save_chrome_trace(tmp_path / "trace.json")
  trace = json.loads((tmp_path / "trace.json").read_text())
  events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
  assert len(events) == len(model.spans)
  assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(1e6 * model.seconds)
  assert "H100" in trace["otherData"]["modelled with"]
  model.plot(tmp_path / "timeline.png")
  assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"
