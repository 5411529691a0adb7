"""Training over links that really are slow: step times, bytes on sockets, time to a target loss.

Every run is `examples/train_lm.py` with one process per host of `scripts/netlab`: namespaces with
shaped links, so it needs root. The model is `mini` (5.0M parameters, float32), with 8 sequences of
128 tokens per host. The hosts share the cores of this machine (one thread each where there are no
more cores than hosts): the same steps without any communication (`none`) are measured beside the
methods, which take turns, --repeats times.

    python scripts/bench_network.py --out runs/network                   # resumes where it stopped
    python scripts/bench_network.py --out runs/network --report docs/evidence

Columns of the report, a table per rate:
- s/step: median over repeats of the mean over the timed steps, for methods with rounds a whole one.
- socket, meter: MB that a host sent per step, from its network device (headers included) over the
  run, and from the compiled program.
- peak: the most that a host sent at one go, MB: between two pauses of 0.3 s.
- target: the evaluation loss of `ddp` after 60 steps; how many steps a method takes to reach it,
  and seconds at this rate. Losses do not depend on the rate: they are of runs on unlimited links.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAUSE, QUIET = 0.3, 50e3  # seconds below so many bytes per second end a burst
PERIOD, FRAGMENTS = ("--sync-period", "50"), ("--fragments", "5")
WARMUP = ("--warmup", "20")  # of the runs for losses
AVERAGE = ("--outer-lr", "1.0", "--outer-momentum", "0.0")


@dataclasses.dataclass(frozen=True)
class Method:
  """Flags of `train_lm.py`, the steps that are timed, and the steps until a loss is given up."""

  flags: tuple[str, ...]
  log_every: int  # reading a loss is a message too
  first: int  # steps before the timed ones
  last: int  # the last timed one
  loss_flags: tuple[str, ...] = ()  # in a few rounds momentum only overshoots: plain means
  loss_steps: int = 60


METHODS = {
  "none": Method(("--method", "none"), 10, 10, 60),
  "ddp": Method(("--method", "ddp"), 2, 2, 6),
  "int8": Method(("--method", "ddp", "--compressor", "int8"), 5, 5, 15),
  "int8_overlap": Method(("--method", "ddp", "--compressor", "int8", "--overlap"), 5, 5, 15),
  "powersgd": Method(
    ("--method", "powersgd", "--rank", "4", "--exact-steps", "1"), 5, 5, 15, loss_steps=80
  ),
  "diloco": Method(("--method", "diloco", *PERIOD), 10, 10, 60, AVERAGE, 150),
  "streaming_diloco": Method(
    ("--method", "streaming_diloco", *FRAGMENTS, *PERIOD), 10, 10, 60, AVERAGE, 150
  ),
  "streaming_diloco_20": Method(  # its fragments are never older than 20 steps
    ("--method", "streaming_diloco", *FRAGMENTS, "--sync-period", "20"), 10, 20, 60, AVERAGE, 150
  ),
}


@dataclasses.dataclass(frozen=True)
class Run:
  """What is measured in one go: a speed at a rate, or (rate None) a curve of losses."""

  method: str
  hosts: int
  rate: str | None
  repeat: int = 0

  @property
  def name(self) -> str:
    """Of its files."""
    return f"{self.method}-{self.hosts}x{self.rate or 'any'}-{self.repeat}"


def train(run: Run, folder: pathlib.Path, *flags: Any) -> tuple[dict, list[dict], list[dict]]:
  """Runs `train_lm.py` on all hosts: its summary, its metrics, the bytes every 0.1 s."""
  out, log = folder / run.name, folder / f"{run.name}.bytes.jsonl"
  shutil.rmtree(out, ignore_errors=True)  # of a run that was interrupted
  command = [ROOT / "scripts" / "netlab", "--hosts", run.hosts, "--log", log]
  command += ["--rate", run.rate] if run.rate else []
  command += ["--", sys.executable, ROOT / "examples" / "train_lm.py", "--out", out]
  command += ["--preset", "mini", "--replicas", run.hosts, "--batch-size", 8 * run.hosts]
  command += ["--seq-len", 128, "--save-every", 0, *METHODS[run.method].flags, *flags]
  env = dict(os.environ, JAX_PLATFORMS="cpu")
  if run.hosts >= (os.cpu_count() or 1):
    env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
  with (folder / f"{run.name}.log").open("w") as output:
    done = subprocess.run([str(x) for x in command], env=env, stdout=output, stderr=output)
  if done.returncode:
    text = pathlib.Path(output.name).read_text()
    raise SystemExit(f"error: {run.name} failed:\n{text[-3000:]}")
  shutil.rmtree(out / "checkpoints")  # hundreds of megabytes
  return json.loads((out / "summary.json").read_text()), _rows(out / "metrics.jsonl"), _rows(log)


def _rows(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def measure_speed(run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """Seconds and bytes per step, and the peak."""
  method = METHODS[run.method]
  steps = method.last + 1  # the row of a run's last step is early: nothing runs beside its reading
  flags = ("--steps", steps, "--log-every", method.log_every, "--eval-every", 0)
  summary, metrics, crossed = train(run, folder, *flags)
  timed = [row for row in metrics if method.first < row["step"] <= method.last]
  tokens = 8 * run.hosts * 128
  seconds = sum(method.log_every * tokens / row["tokens_per_s"] for row in timed)
  return {
    "seconds_per_step": seconds / (method.last - method.first),
    "socket_bytes": statistics.mean(crossed[-1]["sent"]) / steps,
    "meter_bytes": summary["wire_bytes_total"] / steps,
    "peak_bytes": peak(crossed),
    "git_commit": summary["git_commit"],
  }


def measure_loss(run: Run, folder: pathlib.Path) -> dict[str, Any]:
  """The curve of evaluation losses, every 10 steps."""
  method = METHODS[run.method]
  flags = ("--steps", method.loss_steps, "--log-every", 10, "--eval-every", 10, *WARMUP)
  summary, metrics, _ = train(run, folder, *flags, *method.loss_flags)
  curve = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
  return {"curve": curve, "git_commit": summary["git_commit"]}


def peak(crossed: Sequence[dict]) -> int:
  """The most that any host sent in a burst: between two pauses of `PAUSE` seconds."""
  most = 0
  for host in range(len(crossed[0]["sent"])):
    burst, quiet = 0, 0.0
    for before, now in itertools.pairwise(crossed):
      sent = now["sent"][host] - before["sent"][host]
      seconds = now["seconds"] - before["seconds"]
      quiet = 0.0 if sent > QUIET * seconds else quiet + seconds
      burst = 0 if quiet >= PAUSE else burst + sent
      most = max(most, burst)
  return most


def measure(args: argparse.Namespace) -> None:
  """Appends what is not there yet to `network.jsonl` in --out."""
  args.out.mkdir(parents=True, exist_ok=True)
  path = args.out / "network.jsonl"
  rows = _rows(path) if path.exists() else []
  done = {Run(**{f.name: row[f.name] for f in dataclasses.fields(Run)}) for row in rows}
  runs = [Run(name, args.hosts, None) for name in args.methods if args.losses]
  runs += [
    Run(name, args.hosts, rate, repeat)
    for repeat in range(args.repeats)
    for rate in args.rates
    for name in args.methods
  ]
  for run in runs:
    if run in done:
      continue
    found = (measure_speed if run.rate else measure_loss)(run, args.out.resolve())
    row = {**dataclasses.asdict(run), **found}
    with path.open("a") as f:
      f.write(json.dumps(row) + "\n")
    shown = f"{found['seconds_per_step']:.3f} s/step" if run.rate else f"{found['curve'][-1]}"
    print(f"{run.name}: {shown}", flush=True)


def report(source: pathlib.Path, target: pathlib.Path) -> None:
  """Prints a table per number of hosts and rate, writes `network.jsonl` and `network.png`."""
  rows = _rows(source / "network.jsonl")
  target.mkdir(parents=True, exist_ok=True)
  (target / "network.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  curves = {(r["hosts"], r["method"]): r["curve"] for r in rows if r["rate"] is None}
  repeats: dict[tuple, list[dict]] = {}
  for row in rows:
    if row["rate"] is not None:
      repeats.setdefault((row["hosts"], row["rate"], row["method"]), []).append(row)
  speeds: dict[tuple, dict[str, dict]] = {}
  for (hosts, rate, name), measured in repeats.items():
    speeds.setdefault((hosts, rate), {})[name] = _medians(measured)
  for (hosts, rate), of_methods in speeds.items():
    print(f"\n{hosts} hosts, {rate}\n")
    _print_table(of_methods, {name: curve for (n, name), curve in curves.items() if n == hosts})
  _draw(speeds, curves, target / "network.png")


def _medians(rows: list[dict]) -> dict[str, float]:
  names = ("seconds_per_step", "socket_bytes", "meter_bytes", "peak_bytes")
  return {name: statistics.median(row[name] for row in rows) for name in names}


def _print_table(speeds: dict[str, dict], curves: dict[str, list]) -> None:
  print("| method | s/step | of none | ddp / it | socket MB | meter MB | peak MB | target: steps |"
        " seconds | ddp / it |")  # fmt: skip
  print("|---|---|---|---|---|---|---|---|---|---|")
  base, ddp = (speeds.get(name, {}).get("seconds_per_step") for name in ("none", "ddp"))
  target = curves["ddp"][-1][1] if "ddp" in curves else None
  ddp_seconds = None if target is None or ddp is None else ddp * curves["ddp"][-1][0]
  for name, row in speeds.items():
    seconds = row["seconds_per_step"]
    steps = None if target is None else _reached(curves.get(name, []), target)
    total = None if steps is None else steps * seconds
    cells = [f"{seconds:.3f}", _ratio(seconds, base), _ratio(ddp, seconds)]
    cells += [f"{row[k] / 1e6:.3f}" for k in ("socket_bytes", "meter_bytes", "peak_bytes")]
    cells += ["-" if steps is None else str(steps), "-" if total is None else f"{total:.0f}"]
    print(f"| {' | '.join([name, *cells, _ratio(ddp_seconds, total)])} |")


def _reached(curve: list, target: float) -> int | None:
  """The first step whose loss is at most `target`."""
  return next((step for step, loss in curve if loss <= target), None)


def _ratio(a: float | None, b: float | None) -> str:
  return "-" if a is None or b is None else f"{a / b:.2f}"


def _draw(speeds: dict[tuple, dict], curves: dict[tuple, list], path: pathlib.Path) -> None:
  """Left: seconds per step by rate; right: loss against time at the slowest rate."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  hosts = max(n for n, _ in speeds)
  rates = sorted((rate for n, rate in speeds if n == hosts), key=_megabits)
  figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
  for name in METHODS:
    points = [
      (_megabits(rate), speeds[hosts, rate][name]["seconds_per_step"])
      for rate in rates
      if name in speeds[hosts, rate]
    ]
    if not points:
      continue
    (line,) = left.plot(*zip(*points), marker="o", label=name)
    if curve := curves.get((hosts, name)):
      times = [step * points[0][1] for step, _ in curve]
      right.plot(times[1:], [loss for _, loss in curve[1:]], marker=".", color=line.get_color())
  left.set(xlabel="link (Mbit/s)", ylabel="seconds per step", xscale="log", yscale="log")
  right.set(xlabel=f"seconds at {rates[0]}", ylabel="evaluation loss (nats/token)", xscale="log")
  left.set_title(f"{hosts} hosts, 5.0M parameters")
  left.legend(fontsize=7)
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def _megabits(rate: str) -> float:
  return float(rate[:-4]) * {"mbit": 1.0, "gbit": 1e3}[rate[-4:]]


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the runs")
  parser.add_argument("--report", type=pathlib.Path, help="folder for table data and picture")
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--rates", nargs="+", default=["10mbit", "100mbit", "1gbit"])
  parser.add_argument("--hosts", type=int, default=4)
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--losses", action=argparse.BooleanOptionalAction, default=True)
  args = parser.parse_args(argv)
  if args.repeats < 1:
    parser.error(f"`repeats` must be at least 1, got {args.repeats}.")
  if args.report:
    report(args.out, args.report)
  else:
    measure(args)


if __name__ == "__main__":
  main()
