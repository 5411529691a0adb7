"""Pipeline parallelism: layers in stages over a mesh axis, microbatches flow through them.

GPipe (arXiv 1811.06965) and 1F1B in lockstep (arXiv 2104.04473), in one program for all devices.
S stages, M microbatches of b rows.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax

from parallel import _pipeline_1f1b, _pipeline_gpipe
from parallel._pipeline_parts import (
  InputFn,
  Line,
  LossFn,
  StageFn,
  split,
  sum_like,
  total,
  vary_alike,
)
from parallel.mesh import STAGE
from parallel.routing import RandomRoute

Schedule = Literal["gpipe", "1f1b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineParallel:
  """How a model is cut into stages and a batch into microbatches; a model takes it as `pipeline`.

  Raises:
    ValueError: no positive number of microbatches, or an unknown schedule.
  """

  num_microbatches: int  # M, of the rows of one data-parallel shard
  schedule: Schedule = "gpipe"  # 1f1b: inputs held do not grow with M
  axis_name: str = STAGE
  remat: bool = True  # gpipe: keep only the inputs of stages; 1f1b always does
  route: RandomRoute | None = None  # random routes between replicas

  def __post_init__(self):
    if self.num_microbatches < 1:
      raise ValueError(f"`num_microbatches` must be at least 1, got {self.num_microbatches}.")
    _check_schedule(self.schedule)


def _check_schedule(schedule):
  if schedule == "zb":
    raise ValueError(
      "`schedule` must be 'gpipe' or '1f1b', got 'zb': gradients of weights apart would need each"
      " forward pass a third time, which costs M and saves S - 1."
    )
  if schedule not in ("gpipe", "1f1b"):
    raise ValueError(f"`schedule` must be 'gpipe' or '1f1b', got {schedule!r}.")


def pipeline(
  stage_fn: StageFn,
  *,
  num_microbatches: int,
  input_fn: InputFn | None = None,
  axis_name: str = STAGE,
  remat: bool = True,
  route: RandomRoute | None = None,
) -> Callable[..., jax.Array]:
  """`f(stage_params, shared, batch, step=0) -> [B, ...]`, the output of the last stage.

  To be called in a region that is manual over `axis_name`. The other stages get zeros. JAX
  differentiates it: the backward pass is GPipe's.

  Wire: each device sends `M + S - 1` inputs of a stage, and as many gradients in the backward pass.

  Args:
    stage_fn: `(stage_params, x, data) -> x` of equal shape and dtype: this device's layers on one
      microbatch. `data` is `batch` of these rows. It must not communicate over `axis_name`, and
      finite inputs must have finite derivatives.
    num_microbatches: M, divides the rows of `batch`; with M < S more than half of the time is idle.
    input_fn: `(shared, data) -> x` for the first stage, cheap, as all stages compute it; default
      `data` itself.
    axis_name: of the stages.
    remat: keep only the inputs of stages for the backward pass.
    route: random routes between replicas; rows of `batch` then travel too.

  Raises:
    ValueError: the rows cannot be divided, `stage_fn` changes shape or dtype or communicates over
      `axis_name`, or the axis is unbound.

  Example:
    >>> run = pipeline(lambda w, x, _: w * x, num_microbatches=2)
    >>> from parallel import make_mesh
    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> types = {"in_specs": (jax.P("stage"), jax.P(), jax.P()), "out_specs": jax.P("stage")}
    >>> run = jax.jit(jax.shard_map(run, mesh=mesh, **types))
    >>> run(jax.numpy.full(1, 3.0), (), jax.numpy.arange(4.0)).tolist()
    [0.0, 3.0, 6.0, 9.0]
  """
  line = _line(stage_fn, num_microbatches, input_fn, axis_name, remat, route)

  def run(stage_params, shared, batch, step=0):
    _warn(line)
    stage_params, shared, batch = vary_alike(axis_name, stage_params, shared, batch)
    ys, _ = _pipeline_gpipe.outputs(
      line, stage_params, shared, split(batch, num_microbatches), step
    )
    return ys.swapaxes(0, 1).reshape(-1, *ys.shape[2:])

  return run


def pipeline_loss(
  stage_fn: StageFn,
  loss_fn: LossFn,
  *,
  num_microbatches: int,
  input_fn: InputFn | None = None,
  axis_name: str = STAGE,
  remat: bool = True,
  route: RandomRoute | None = None,
) -> Callable[..., tuple[jax.Array, Any]]:
  """`f(stage_params, shared, batch, step=0) -> (loss, aux)`, without gradients: for evaluation.

  Arguments and results are those of `pipeline_value_and_grad`. Outputs are dealt out to all stages,
  which compute `loss_fn` on M / S microbatches each.

  Wire: as `pipeline`, and a reduce-scatter of M outputs.
  """
  line = _line(stage_fn, num_microbatches, input_fn, axis_name, remat, route)

  def run(stage_params, shared, batch, step=0):
    _warn(line)
    stages, shared, batch = vary_alike(axis_name, stage_params, shared, batch)
    value = _pipeline_gpipe.local_loss(line, loss_fn, stages, shared, batch, step)
    return total(value, axis_name)

  return run


def pipeline_value_and_grad(
  stage_fn: StageFn,
  loss_fn: LossFn,
  *,
  num_microbatches: int,
  schedule: Schedule = "1f1b",
  input_fn: InputFn | None = None,
  axis_name: str = STAGE,
  remat: bool = True,
  route: RandomRoute | None = None,
) -> Callable[..., tuple[tuple[jax.Array, Any], tuple[Any, Any]]]:
  """`f(stage_params, shared, batch, step=0) -> ((loss, aux), (stage_grads, shared_grads))`.

  To be called in a region that is manual over `axis_name`. Gradients have the types of their
  parameters: those of `shared` are summed over stages, and all over further manual axes over which
  the parameters are equal, once, after the last tick; types say which (`check_vma`). It cannot be
  differentiated.

  Wire: `gpipe`, as `pipeline` both ways, and one reduce-scatter and all-gather of the outputs of M
  microbatches, with which all stages share the work of `loss_fn`. `1f1b`: `M + S - 1` inputs of a
  stage forward, as many gradients back. Then the gradients of `shared`.

  Args:
    stage_fn: as in `pipeline`.
    loss_fn: `(shared, x, data) -> (loss, aux)` of one microbatch: floats, averaged over them.
    num_microbatches: as in `pipeline`.
    schedule: "gpipe" holds the inputs of all `M + S - 1` ticks; "1f1b" those of 2 S - 1, and every
      stage computes `loss_fn` of every microbatch, since all wait for the last one.
    input_fn: as in `pipeline`.
    axis_name: of the stages.
    remat: for "gpipe"; "1f1b" keeps only the inputs of stages anyway.
    route: random routes between replicas; `step` then numbers the draws.

  Raises:
    ValueError: as in `pipeline`, or the schedule is unknown.
    TypeError: the result is differentiated.

  Example:
    >>> square = lambda shared, y, data: ((y**2).mean(), {})
    >>> run = pipeline_value_and_grad(lambda w, x, _: w * x, square, num_microbatches=2)
    >>> from parallel import make_mesh
    >>> mesh, stages, whole = make_mesh(devices=jax.devices()[:1]), jax.P("stage"), jax.P()
    >>> types = {"in_specs": (stages, whole, whole), "out_specs": (whole, (stages, whole))}
    >>> run = jax.jit(jax.shard_map(run, mesh=mesh, **types))
    >>> (loss, _), (grad, _) = run(jax.numpy.full(1, 3.0), (), jax.numpy.ones(4))
    >>> float(loss), float(grad[0])
    (9.0, 6.0)
  """
  _check_schedule(schedule)
  line = _line(stage_fn, num_microbatches, input_fn, axis_name, remat, route)

  def run(stage_params, shared, batch, step=0):
    _warn(line)
    params = _not_differentiated((stage_params, shared))
    stages, outer, batch = vary_alike(axis_name, *params, batch)
    if schedule == "1f1b":
      value, grads = _pipeline_1f1b.local_value_and_grad(line, loss_fn, stages, outer, batch, step)
    else:
      local = functools.partial(_pipeline_gpipe.local_loss, line, loss_fn)
      grad_fn = jax.value_and_grad(local, argnums=(0, 1), has_aux=True)
      value, grads = grad_fn(stages, outer, batch, step)
    of_stage = sum_like(grads[0], stage_params, known=frozenset((axis_name,)))
    of_shared = sum_like(total(grads[1], axis_name), shared, known=frozenset((axis_name,)))
    return total(value, axis_name), (of_stage, of_shared)

  return run


def stack_stages(layer_params: Any, num_stages: int) -> Any:
  """[L, ...] to [S, L / S, ...], layer by layer in order.

  Layers sharded over the stages on their axis L need none of it: each device then has its own.

  Raises:
    ValueError: `num_stages` does not divide the layers.

  Example:
    >>> stack_stages(jax.numpy.arange(6), 3).tolist()
    [[0, 1], [2, 3], [4, 5]]
  """

  def leaf(x):
    check_stages(x.shape[0], num_stages)
    return x.reshape(num_stages, -1, *x.shape[1:])

  return jax.tree.map(leaf, layer_params)


def unstack_stages(stage_params: Any) -> Any:
  """[S, L / S, ...] to [L, ...], the inverse of `stack_stages`: what checkpoints should hold.

  Example:
    >>> unstack_stages(stack_stages(jax.numpy.arange(4), 2)).tolist()
    [0, 1, 2, 3]
  """
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stage_params)


def check_stages(num_layers: int, num_stages: int) -> None:
  """Raises ValueError unless the stages can have equal numbers of layers."""
  if num_stages < 1 or num_layers % num_stages:
    raise ValueError(
      f"`num_stages` must divide the number of layers, {num_layers}, got {num_stages}: add layers"
      " or take fewer stages."
    )


def _line(stage_fn, num_microbatches, input_fn, axis_name, remat, route) -> Line:
  PipelineParallel(num_microbatches=num_microbatches)  # checks it
  return Line(
    stage_fn=stage_fn,
    input_fn=input_fn or (lambda shared, data: data),
    axis_name=axis_name,
    num_microbatches=num_microbatches,
    remat=remat,
    route=route,
  )


def _warn(line: Line) -> None:
  if line.num_microbatches < line.size:
    warnings.warn(
      f"`num_microbatches` = {line.num_microbatches} is less than the {line.size} stages: they are"
      " idle for more than half of the time.",
      stacklevel=3,
    )


@jax.custom_jvp
def _not_differentiated(tree: Any) -> Any:
  return tree


@_not_differentiated.defjvp
def _refuse(primals, tangents):
  raise TypeError(
    "`pipeline_value_and_grad` has computed the gradients already and cannot be differentiated:"
    " use them, or differentiate `pipeline_loss`."
  )
