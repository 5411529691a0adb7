"""Min-max problems over slow links: distance to the solution against numbers sent.

    python examples/masha_minmax.py                       # both problems, a table
    python examples/masha_minmax.py --out runs/minmax     # and metrics, summary, picture

Eight workers (stacked on one device by jax.vmap) hold different parts of a problem min x max y f:

- bilinear: a strongly monotone game, whose solution numpy computes; squared distance to it;
- adversarial: logistic regression whose inputs an adversary shifts, one shift per class, at a
  quadratic cost; squared norm of the mean operator, which is zero at the solution.

Dense extragradient, extragradient on compressed operators (naive), MASHA1 with Rand-k and MASHA2
with Top-k run at a few step sizes each until they have sent the same number of values; of each
the best step size is shown. Expected, in half a minute on two cores: after 10,000 values per worker
MASHA is 5 or more orders of magnitude closer to the solution of the bilinear game than dense
extragradient, and naive compression has stopped at 0.1 to 1. Squared distances of 1e-20 need
float64, which this script turns on for itself.
"""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxcomm.compressors import rand_k, top_k
from jaxcomm.training import RunFolder, RunFolderError
from jaxcomm.transforms import extragradient, masha1, masha2, masha_step, saddle_operator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Flags of `masha_minmax.py`."""

  problem: Literal["all", "bilinear", "adversarial"] = "all"
  """what to solve"""
  floats: int = 30_000
  """values that each worker sends, in all"""
  workers: int = 8
  """who hold a part of the problem each"""
  size: int = 40
  """numbers per player of the bilinear game, and inputs of the regression"""
  ratio: float = 0.1
  """share of values that a compressed message holds, and of steps that end in a refresh"""
  dtype: Literal["float64", "float32"] = "float64"
  """of points and operators; messages are float32"""
  seed: int = 0
  """of the problem and of all random choices"""
  points: int = 60
  """lines of metrics.jsonl per method"""
  out: str | None = None
  """run folder: config.json, metrics.jsonl, summary.json, report.png"""

  def __post_init__(self):
    for name in ("floats", "workers", "size", "points"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
    if not 0 < self.ratio < 1:
      raise ValueError(f"`ratio` must be in (0, 1), got {self.ratio}.")
    if self.seed < 0:
      raise ValueError(f"`seed` must be at least 0, got {self.seed}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Operators F_m of the workers, and how far a point is from the solution of their mean."""

  name: str
  ylabel: str
  operator: Callable[[jax.Array, Any], jax.Array]  # (z, data of a worker) -> F_m(z)
  data: Any  # arrays with a leading worker axis
  start: np.ndarray  # z, x and y in one vector
  distance: Callable[[jax.Array, Any], jax.Array]  # (z, data of all) -> scalar
  rates: dict[str, list[float]]  # step sizes to try, of each method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """What one method reached at its best step size."""

  rate: float
  floats: np.ndarray  # values sent per worker so far, after each step
  sent_bytes: np.ndarray
  distance: np.ndarray  # relative to the start

  def at(self, floats: int) -> float:
    """Distance when so many values had been sent."""
    step = np.searchsorted(self.floats, floats, side="right") - 1
    return float(self.distance[step]) if step >= 0 else 1.0


def bilinear(cfg: Config) -> Problem:
  """f_m = |x|^2 / 2 + y^T A_m x + b_m^T x - c_m^T y - |y|^2 / 2."""
  rng, size = np.random.default_rng(cfg.seed), cfg.size
  a = rng.normal(size=(cfg.workers, size, size)) * (4 / size) ** 0.5
  b, c = rng.normal(size=(2, cfg.workers, size))
  mean = a.mean(0)
  jacobian = np.block([[np.eye(size), mean.T], [-mean, np.eye(size)]])
  solution = np.linalg.solve(jacobian, -np.concatenate([b.mean(0), c.mean(0)]))
  lipschitz = float(np.linalg.norm(jacobian, 2))

  def payoff(x, y, data):
    a, b, c = data
    return x @ x / 2 + y @ (a @ x) + b @ x - c @ y - y @ y / 2

  return Problem(
    name="bilinear",
    ylabel="squared distance to the solution",
    operator=on_vector(saddle_operator(payoff), size),
    data=(a, b, c),
    start=np.zeros(2 * size),
    distance=lambda z, data: jnp.sum((z - solution) ** 2),
    rates=rates(lipschitz, compressed=(0.05, 0.1, 0.2)),
  )


def adversarial(cfg: Config) -> Problem:
  """f_m = mean log(1 + exp(-label w^T (input + y_class))) + 0.05 |w|^2 - |y|^2."""
  rng, size, rows = np.random.default_rng(cfg.seed + 1), cfg.size, 64
  direction = rng.normal(size=size) / size**0.5
  labels = np.where(rng.random((cfg.workers, rows)) < 0.5, -1.0, 1.0)
  inputs = rng.normal(size=(cfg.workers, rows, size)) + labels[..., None] * direction
  inputs += 0.5 * rng.normal(size=(cfg.workers, 1, size))  # workers differ

  def payoff(weights, shifts, data):
    inputs, labels = data
    shifted = inputs + shifts.reshape(2, size)[(labels > 0).astype(int)]
    loss = jax.nn.softplus(-labels * (shifted @ weights)).mean()
    return loss + 0.05 * weights @ weights - shifts @ shifts

  operator = on_vector(saddle_operator(payoff), size)
  return Problem(
    name="adversarial",
    ylabel="squared norm of the operator",
    operator=operator,
    data=(inputs, labels),
    start=np.zeros(3 * size),
    distance=lambda z, data: jnp.sum(jax.vmap(operator, (None, 0))(z, data).mean(0) ** 2),
    rates=rates(2.0, compressed=(0.05, 0.1, 0.2)),
  )


def rates(lipschitz: float, compressed: tuple[float, ...]) -> dict[str, list[float]]:
  """Step sizes; those of the dense baseline reach to where it diverges."""
  dense = [share / lipschitz for share in (0.25, 0.5, 0.7, 0.9)]
  others = ("naive Rand-k", "naive Top-k", "MASHA1 Rand-k", "MASHA2 Top-k")
  return {"extragradient": dense} | {name: list(compressed) for name in others}


def on_vector(operator: Callable, size: int) -> Callable[[jax.Array, Any], jax.Array]:
  """An operator on (x, y) as one on the vector of both, so that one message holds both."""

  def of_vector(z, data):
    return jnp.concatenate(operator((z[:size], z[size:]), data))

  return of_vector


def make_method(cfg: Config, name: str, rate: Any):
  """The transformation `name`, and the compressor of its messages (None: dense)."""
  options = {"axis_name": "workers", "seed": cfg.seed}
  compressor = top_k(ratio=cfg.ratio) if "Top-k" in name else rand_k(ratio=cfg.ratio)
  if name == "extragradient":
    return extragradient(rate, **options), None
  if name.startswith("naive"):
    return extragradient(rate, compressor, **options), compressor
  method = masha1 if name.startswith("MASHA1") else masha2
  return method(rate, compressor, tau=1 - cfg.ratio, **options), compressor


def costs(cfg: Config, problem: Problem, name: str) -> tuple[np.ndarray, np.ndarray]:
  """(values, bytes) that a worker sends in a step and in the refresh after it."""
  _, compressor = make_method(cfg, name, 1.0)
  size, width = problem.start.size, np.dtype(cfg.dtype).itemsize
  dense = np.asarray([size, width * size])
  if compressor is None:
    return dense, dense
  message = np.asarray([compressor.num_kept(size), compressor.payload_bytes((size,))])
  return message, message if name.startswith("naive") else dense


def run_method(cfg: Config, problem: Problem, name: str) -> Curve:
  """Runs all step sizes of a method in one program, and returns the best."""
  message, refresh = costs(cfg, problem, name)
  mean = message + refresh * (cfg.ratio if name.startswith("MASHA") else 1)
  steps = math.ceil(1.1 * cfg.floats / mean[0]) + 1  # more than needed: refreshes are random

  def of_worker(rate, data, all_data):
    tx, _ = make_method(cfg, name, rate)
    step = masha_step(problem.operator, tx)

    def advance(carry, _):
      z, state, metrics = step(*carry, data)
      return (z, state), (problem.distance(z, all_data), metrics["refreshed"])

    z = jnp.asarray(problem.start, cfg.dtype)
    carry = z, tx.init(z, problem.operator(z, data))
    return jax.lax.scan(advance, carry, length=steps)[1]

  def of_rate(rate, data):
    workers = jax.vmap(of_worker, (None, 0, None), axis_name="workers")(rate, data, data)
    return jax.tree.map(lambda x: x[0], workers)  # all hold the same

  data = jax.tree.map(lambda x: jnp.asarray(x, cfg.dtype), problem.data)
  tried = jnp.asarray(problem.rates[name], cfg.dtype)
  distance, refreshed = map(np.asarray, jax.jit(jax.vmap(of_rate, (0, None)))(tried, data))
  start = float(problem.distance(jnp.asarray(problem.start, cfg.dtype), data))
  first = (
    refresh if name.startswith(("naive", "extra")) else costs(cfg, problem, "extragradient")[0]
  )
  sent = first + np.cumsum(message + refreshed[0][:, None] * refresh, axis=0)
  kept = sent[:, 0] <= cfg.floats
  distance = np.where(np.isfinite(distance), distance, np.inf)[:, kept] / start
  best = int(np.argmin(distance[:, -1]))
  return Curve(
    rate=float(tried[best]),
    floats=sent[kept, 0],
    sent_bytes=sent[kept, 1],
    distance=distance[best],
  )


def marks(cfg: Config) -> list[int]:
  """Numbers of values at which the table shows distances."""
  return [cfg.floats // 15, cfg.floats // 3, cfg.floats]


def show(cfg: Config, problem: Problem, curves: dict[str, Curve]) -> None:
  print(f"\n{problem.name}: {problem.ylabel} (relative) after so many values sent per worker")
  print(f"{'method':<16}{'step size':>10}" + "".join(f"{m:>12,}" for m in marks(cfg)))
  for name, curve in curves.items():
    cells = "".join(f"{curve.at(m):>12.1e}" for m in marks(cfg))
    print(f"{name:<16}{curve.rate:>10.3f}{cells}", flush=True)


def log(cfg: Config, folder: RunFolder, problem: Problem, curves: dict[str, Curve]) -> None:
  for name, curve in curves.items():
    steps = np.unique(np.linspace(0, curve.floats.size - 1, cfg.points).astype(int))
    for i in steps:
      row = {
        "step": int(i) + 1,
        "floats": int(curve.floats[i]),
        "wire_bytes_total": int(curve.sent_bytes[i]),
      }
      folder.log(
        {"problem": problem.name, "method": name} | row | {"distance": float(curve.distance[i])}
      )


def summarise(cfg: Config, results: dict[str, dict[str, Curve]], seconds: float) -> dict[str, Any]:
  def of(curve: Curve) -> dict[str, Any]:
    return {"rate": curve.rate, "distance": {str(m): curve.at(m) for m in marks(cfg)}}

  return {
    "results": {p: {name: of(c) for name, c in curves.items()} for p, curves in results.items()},
    "wall_seconds": round(seconds, 2),
    "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "numpy")},
  }


def plot(folder: RunFolder, results: dict[str, dict[str, Curve]], labels: dict[str, str]) -> None:
  """`report.png`: one panel per problem."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.5 * len(results), 4))
  panels = figure.subplots(1, len(results), squeeze=False)[0]
  for axes, (name, curves) in zip(panels, results.items()):
    for method, curve in curves.items():
      axes.plot(curve.floats, np.maximum(curve.distance, 1e-32), lw=1.2, label=method)
    axes.set(title=name, xlabel="values sent per worker", ylabel=labels[name], yscale="log")
    axes.grid(alpha=0.3)
  panels[0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(folder.path / "report.png", dpi=120)
  print(f"report: {folder.path / 'report.png'}")


def main(cfg: Config) -> dict[str, dict[str, Curve]]:
  started = time.perf_counter()
  folder = None if cfg.out is None else RunFolder(cfg.out, dataclasses.asdict(cfg))
  with jax.enable_x64(cfg.dtype == "float64"):
    makers = {"bilinear": bilinear, "adversarial": adversarial}
    chosen = makers if cfg.problem == "all" else {cfg.problem: makers[cfg.problem]}
    results, labels = {}, {}
    for name, make in chosen.items():
      problem = make(cfg)
      print(f"{name}: {problem.start.size} parameters, {cfg.workers} workers", flush=True)
      results[name] = {m: run_method(cfg, problem, m) for m in problem.rates}
      labels[name] = problem.ylabel
      show(cfg, problem, results[name])
      if folder is not None:
        log(cfg, folder, problem, results[name])
  if folder is not None:
    folder.summarise(summarise(cfg, results, time.perf_counter() - started))
    plot(folder, results, labels)
    folder.close()
  return results


if __name__ == "__main__":
  try:
    main(tyro.cli(Config, description=__doc__))
  except RunFolderError as e:
    raise SystemExit(f"error: {e}") from e
