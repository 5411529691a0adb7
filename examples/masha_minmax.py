"""Solve a min-max problem over slow links: distance to the solution against what was sent.

    python examples/masha_minmax.py --out runs/masha2                        # MASHA2 with Top-k
    python examples/masha_minmax.py --out runs/masha1 --method masha1        # MASHA1 with Rand-k
    python examples/masha_minmax.py --out runs/dense --method extragradient --steps 62 --lr 0.42
    python examples/masha_minmax.py --out runs/naive --method extragradient --compressor top_k
    python examples/masha_minmax.py --out runs/masha2 --resume              # after any stop

Eight workers on virtual CPU devices hold different parts of a problem min x max y f(x, y):

- bilinear: a strongly monotone game, whose solution numpy computes;
- adversarial: logistic regression whose inputs an adversary shifts, one shift per class, at a
  quadratic cost.

The loss is the decimal logarithm of the squared distance to the solution (adversarial: of the
squared norm of the mean operator, zero there), relative to the start; -20 is far below what float32
can hold, so points and operators are float64. Messages are float32.

The default takes about 15 seconds on two cores and sends 10,000 values per worker: loss about -22,
with --lr 0.2 about -29. Dense extragradient reaches -16 with as many values (62 steps), naive
compression stops at 0. `scripts/bench_masha.py` compares them all.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import minmax_problems
import numpy as np
from minmax_problems import Problem

from jaxcomm.compressors import Compressor, identity, rand_k, top_k
from jaxcomm.training import (
  Layout,
  RunConfig,
  Task,
  TrainState,
  TrainStep,
  launch,
  run,
  start_devices,
)
from jaxcomm.transforms import (
  ExtragradientTransformation,
  extragradient,
  masha1,
  masha2,
  masha_step,
)
from parallel import make_mesh

P = jax.sharding.PartitionSpec
COMPRESSOR = {"masha1": "rand_k", "masha2": "top_k", "extragradient": "none"}
PER_WORKER = ("local_operator", "worker_error")  # of the states of MASHA; all else is equal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
  """Flags of `masha_minmax.py`."""

  problem: Literal["bilinear", "adversarial"] = "bilinear"
  """what to solve"""
  method: Literal["masha1", "masha2", "extragradient"] = "masha2"
  """how"""
  compressor: Literal["auto", "none", "rand_k", "top_k"] = "auto"
  """of messages; auto: rand_k for masha1, top_k for masha2, none for extragradient"""
  keep_ratio: float = 0.1
  """share of the values that rand_k and top_k send"""
  tau: float | None = None
  """MASHA refreshes with probability 1 - tau per step; default 1 - --keep-ratio"""
  lr: float = 0.1
  """step size"""
  size: int = 40
  """numbers per player of the bilinear game, inputs of the regression"""
  dtype: Literal["float64", "float32"] = "float64"
  """of points and operators"""
  replicas: int = 8
  """workers who hold a part of the problem each"""
  steps: int = 600
  """steps in all"""
  eval_every: int = 0
  """steps between two evaluations, which give the loss again; 0 for never"""
  save_every: int = 200
  """steps between two checkpoints; 0: only at the end"""

  def __post_init__(self):
    super().__post_init__()
    if self.size < 1:
      raise ValueError(f"`size` must be at least 1, got {self.size}.")
    if not 0 < self.keep_ratio < 1:
      raise ValueError(f"`keep_ratio` must be in (0, 1), got {self.keep_ratio}.")
    if self.devices_per_replica != 1:
      names = ("data_parallel", "fsdp", "stages", "seq_shards", "tensor")
      got = ", ".join(f"`{name}` = {getattr(self, name)}" for name in names)
      raise ValueError(f"a replica must have 1 device for so small a problem, got {got}.")
    if self.replica_change is not None:
      raise ValueError("`replica_change` must be None: with other workers it is another problem.")
    build_method(self)  # says what is wrong with the others

  @property
  def refresh_share(self) -> float:
    """Of the steps: those that end in a dense mean."""
    if self.method == "extragradient":
      return 1.0
    return self.keep_ratio if self.tau is None else 1 - self.tau


def build_compressor(config: Config) -> Compressor | None:
  """Of the messages; None for dense extragradient."""
  name = COMPRESSOR[config.method] if config.compressor == "auto" else config.compressor
  if name == "none":
    return None if config.method == "extragradient" else identity()
  return (top_k if name == "top_k" else rand_k)(ratio=config.keep_ratio)


def build_method(config: Config) -> ExtragradientTransformation:
  """The method that the flags ask for, over the axis `replica`."""
  options: dict[str, Any] = {"axis_name": "replica", "seed": config.seed}
  compressor = build_compressor(config)
  if config.method == "extragradient":
    return extragradient(config.lr, compressor, **options)
  assert compressor is not None
  method = masha1 if config.method == "masha1" else masha2
  return method(config.lr, compressor, tau=1 - config.refresh_share, **options)


def values_sent(config: Config, size: int) -> tuple[int, int]:
  """Values that a worker sends in a step, and in the refresh after it."""
  compressor: Any = build_compressor(config)
  name = type(compressor).__name__
  message = compressor.num_kept(size) if name in ("RandK", "TopK") else size
  return message, message if config.method == "extragradient" else size


class WholeProblem:
  """Batches that are all of this process's data, in every step."""

  def __init__(self, data: Any, row_start: int, row_count: int):
    self._rows = jax.tree.map(lambda x: x[row_start : row_start + row_count], data)

  def __iter__(self):
    return self

  def __next__(self):
    return self._rows

  def get_state(self) -> dict[str, int]:
    return {}

  def set_state(self, state: dict[str, int]) -> None:
    del state


def make_layout(problem: Problem, tx: ExtragradientTransformation, mesh: Any, dtype: Any) -> Layout:
  """Where the state lives: on every worker what is its own, everything else once."""
  workers = mesh.shape["replica"]

  def of_worker(data):
    z = jnp.zeros(problem.size, dtype)
    return z, tx.init(z, problem.operator(z, data))

  z, method = jax.eval_shape(jax.vmap(of_worker, axis_name="replica"), problem.data)
  count: Any = jax.ShapeDtypeStruct((workers,), jnp.int32)
  flag = jax.ShapeDtypeStruct((workers,), jnp.bool_)
  opt_state = {"method": method, "values": count, "refreshed": flag}
  shapes = TrainState(count, z, opt_state)
  varying = jax.tree_util.tree_map_with_path(
    lambda path, _: any(getattr(key, "name", None) in PER_WORKER for key in path), shapes
  )

  def place(shape, varies):
    shape_here, spec = (shape.shape, P("replica")) if varies else (shape.shape[1:], P())
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape_here, shape.dtype, sharding=sharding)

  return Layout(
    mesh=mesh,
    num_replicas=workers,
    param_specs=P(),
    varying=varying,
    shapes=jax.tree.map(place, shapes, varying),
  )


def build_step(config: Config, problem: Problem, devices: list[Any]) -> TrainStep:
  """The training step: one step of the method, and its distance to the solution.

  Raises:
    ValueError: there are fewer devices than workers.
  """
  if len(devices) != config.replicas:
    raise ValueError(
      f"`replicas` must not exceed the {len(devices)} devices, got {config.replicas}: with"
      " JAX_PLATFORMS=cpu there are as many virtual ones as needed."
    )
  mesh = make_mesh(replica=config.replicas, devices=devices)
  tx, dtype = build_method(config), jnp.dtype(config.dtype)
  layout = make_layout(problem, tx, mesh, dtype)
  advance = masha_step(problem.operator, tx)
  message, refresh = values_sent(config, problem.size)
  far = float(jax.jit(problem.distance)(jnp.zeros(problem.size, dtype)))

  def loss_at(z):
    relative = problem.distance(z) / far
    return jnp.log10(jnp.maximum(relative, jnp.finfo(jnp.float32).tiny))

  def first(state, batch):
    local = problem.operator(state.params, jax.tree.map(lambda x: x[0], batch))
    sent = jnp.asarray(refresh, jnp.int32)
    opt_state = state.opt_state | {"method": tx.init(state.params, local), "values": sent}
    return TrainState(state.step, state.params, opt_state), {}

  def init(key):
    del key  # the start is zero
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), layout.shapes)
    return layout.over_replicas(first)(blank, problem.data)[0]

  def local_step(state, batch):
    own = jax.tree.map(lambda x: x[0], batch)
    z, method, metrics = advance(state.params, state.opt_state["method"], own)
    refreshed = metrics["refreshed"]
    values = state.opt_state["values"] + message + jnp.where(refreshed, refresh, 0)
    opt_state = {"method": method, "values": values, "refreshed": refreshed}
    found = {"loss": loss_at(z), "operator_change": metrics["operator_change"], "values": values}
    return TrainState(state.step + 1, z, opt_state), found

  def step(state, batch):
    state, metrics = layout.over_replicas(local_step)(state, batch)
    return state, metrics | {"level": state.opt_state["refreshed"].astype(jnp.int32)}

  def evaluate(state, batch):
    del batch
    return {"loss_sum": loss_at(state.params), "tokens": jnp.ones(())}

  return TrainStep(
    init=jax.jit(init, out_shardings=layout.shardings),
    step=jax.jit(step, donate_argnums=0, out_shardings=(layout.shardings, None)),
    evaluate=jax.jit(layout.over_replicas(evaluate, returns_state=False)),
    layout=layout,
    tx=tx,  # pyright: ignore[reportArgumentType]  # the shared code asks it only of stacked replicas
  )


def main(config: Config) -> None:
  """Builds problem, method and mesh, and runs them."""
  devices = start_devices(config)
  jax.config.update("jax_enable_x64", config.dtype == "float64")
  make = getattr(minmax_problems, config.problem)
  problem: Problem = make(config.seed, config.replicas, config.size)
  data = jax.tree.map(lambda x: np.asarray(x, config.dtype), problem.data)
  problem = dataclasses.replace(problem, data=data)
  train_step = build_step(config, problem, devices)
  share = config.refresh_share
  run(
    config,
    Task(
      train_step=train_step,
      batches=WholeProblem(data, **train_step.local_rows(config.replicas)),
      eval_batches=lambda: [next(WholeProblem(data, **train_step.local_rows(config.replicas)))],
      batch_shapes=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data),
      tokens_per_step=0,
      flops_per_step=(2 + share) * config.replicas * problem.flops,
      exchange_shares=(1 - share, share),
      data=problem.provenance,
      title=f"masha_minmax: {problem.name}, {config.method}, {build_compressor(config) or 'dense'}",
    ),
  )


if __name__ == "__main__":
  launch(Config, main, description=__doc__)
