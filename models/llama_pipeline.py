"""Llama's loss with the layers in stages over the mesh axis `stage` (`parallel.pipeline`).

Parameters are those of `models.llama`, layers sharded over `stage` on their leading axis L, so that
a checkpoint fits any number of stages. Letters as in `models.llama`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import _llama_layers, llama, losses, rope
from models._llama_config import LlamaConfig
from parallel.context import ContextParallel
from parallel.mesh import DATA, TENSOR
from parallel.pipeline import (
  PipelineParallel,
  check_stages,
  pipeline_loss,
  pipeline_value_and_grad,
)
from parallel.sharding import shard_batch


def loss(
  params: llama.Params,
  batch: dict[str, jax.Array],
  cfg: LlamaConfig,
  *,
  pipeline: PipelineParallel,
  context: ContextParallel | None = None,
  z_loss: float = 0.0,
  step: Any = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`llama.loss`, computed by a pipeline; `jax.value_and_grad` of it runs the schedule.

  In a region that is manual over the axis of stages, layers are this device's. Elsewhere, under
  `jax.jit` or in a training step that is manual over `replica` alone, arrays are whole, and a
  region over the stages (and over `data` and the tokens of `context`) is opened here. Gradients are
  computed together with the loss, and only if asked for; `aux` has no derivatives.

  Wire: that of `pipeline_value_and_grad`, an activation being [b, S, D]; embedding and output
  matrix are on all stages, their gradients summed over stages once in a step. Over `data` gradients
  are summed once in a step, over `fsdp` weights are gathered in every tick.

  Args:
    params: from `llama.init`.
    batch: as in `llama.loss`, every M-th row of a data-parallel shard in one microbatch. The mean
      is over all tokens, however the mask divides them.
    cfg: the config of `params`. `cfg.remat` is about the work inside of a stage.
    pipeline: microbatches and schedule.
    context: as in `llama.loss`.
    z_loss: as in `llama.loss`.
    step: number of the training step, for `pipeline.route`: the arrays of a microbatch then wander
      between replicas, and a replica's loss is about what arrived there.

  Raises:
    ValueError: as in `llama.loss`; or stages do not divide the layers, microbatches the rows;
      or the region is manual over `tensor`, or there is no axis of stages.

  Example:
    >>> from parallel import make_mesh
    >>> cfg, mesh = llama.nano(), make_mesh(devices=jax.devices()[:1])
    >>> params = jax.jit(llama.init, static_argnums=1)(jax.random.key(0), cfg)
    >>> batch = {k: jnp.zeros((4, 8), int) for k in ("tokens", "targets")}
    >>> batch = jax.device_put(batch, jax.NamedSharding(mesh, jax.P()))
    >>> halves = PipelineParallel(num_microbatches=2)
    >>> value, aux = jax.jit(lambda p, b: loss(p, b, cfg, pipeline=halves))(params, batch)
    >>> int(aux["tokens"])
    32
  """
  llama._check_keys(batch)
  tokens_BS = batch["tokens"]
  ids, positions = batch.get("segment_ids"), batch.get("positions")
  llama._check_inputs(tokens_BS, cfg, positions, ids, context)
  mask_BS = batch.get("loss_mask")
  mask_BS = jnp.ones(tokens_BS.shape) if mask_BS is None else mask_BS
  mask_BS = mask_BS.astype(jnp.float32)
  count = mask_BS.sum()
  count = count if context is None else context.psum(count, tokens_BS)
  scale = pipeline.num_microbatches / jnp.where(count > 0, count, 1.0)
  # Divided at the source: a route may part the tokens of a batch.
  data = {k: v for k, v in batch.items() if k != "loss_mask"} | {"weight": mask_BS * scale}
  run = _Run(cfg, pipeline, context, z_loss)
  out: Any = _objective(run, params, jax.lax.stop_gradient(data), jnp.asarray(step))
  value, aux = out
  return value, jax.lax.stop_gradient(aux) | {"tokens": count}


@dataclasses.dataclass(frozen=True)
class _Run:
  """What is static about a loss, and its parts."""

  cfg: LlamaConfig
  pipeline: PipelineParallel
  context: ContextParallel | None
  z_loss: float

  def embed(self, shared, data):
    x_BSD = _llama_layers.embed({"embed_VD": shared["embed_VD"]}, data["tokens"], self.cfg)
    return shard_batch(x_BSD)

  def stage(self, layers, x_BSD, data):
    """This device's layers."""
    cfg, tokens_BS = self.cfg, data["tokens"]
    positions = data.get("positions")
    if positions is None:
      length = tokens_BS.shape[1]
      places_S = jnp.arange(length) if self.context is None else self.context.positions(tokens_BS)
      positions = places_S[None]
    cos_sin = rope.angles(
      positions, rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
    )
    attend, visible = _llama_layers.kernel(
      tokens_BS.shape[1], data.get("segment_ids"), cfg, self.context
    )

    def body(x_BSD, weights):
      y_BSD = _llama_layers.layer(weights, x_BSD, cos_sin, visible, cfg=cfg, attend=attend)
      return shard_batch(y_BSD), None

    if cfg.remat != "none":
      policy = _llama_layers._REMAT_POLICY[cfg.remat]
      body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    if cfg.scan_layers:
      return jax.lax.scan(body, x_BSD, layers)[0]
    for i in range(jax.tree.leaves(layers)[0].shape[0]):
      x_BSD, _ = body(x_BSD, jax.tree.map(lambda p, i=i: p[i], layers))
    return x_BSD

  def head(self, shared, x_BSD, data):
    """Weighted sums, and so terms of the mean over all tokens."""
    logits_BSV = _llama_layers.logits(shared, x_BSD, self.cfg)
    value, aux = losses.cross_entropy(
      logits_BSV, data["targets"], data["weight"], z_loss=self.z_loss
    )
    total = aux.pop("tokens")
    return jax.tree.map(lambda v: v * total, (value, aux))

  def options(self):
    p = self.pipeline
    return {
      "num_microbatches": p.num_microbatches,
      "input_fn": self.embed,
      "axis_name": p.axis_name,
      "remat": p.remat,
      "route": p.route,
    }

  def loss(self, params, data, step):
    """(loss, aux) of this device's rows."""
    stages, shared = _parts(params)
    value = pipeline_loss(self.stage, self.head, **self.options())(stages, shared, data, step)
    return self.over_tokens(value, data)

  def value_and_grad(self, params, data, step):
    """((loss, aux), gradients) of this device's rows."""
    schedule, (stages, shared) = self.pipeline.schedule, _parts(params)
    run = pipeline_value_and_grad(self.stage, self.head, schedule=schedule, **self.options())
    value, (layers, outer) = run(stages, shared, data, step)
    return self.over_tokens(value, data), outer | {"layers": layers}

  def over_tokens(self, value, data):
    return value if self.context is None else self.context.psum(value, data["tokens"])


def _parts(params):
  return params["layers"], {k: v for k, v in params.items() if k != "layers"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _objective(run: _Run, params, data, step) -> Any:
  return _in_region(run, run.loss, params, data, step, with_grads=False)


def _forward(run, params, data, step) -> tuple[Any, Any]:
  return _in_region(run, run.value_and_grad, params, data, step, with_grads=True)


def _backward(run, grads, cotangent):
  del run
  scale, _ = cotangent
  return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), None, None


_objective.defvjp(_forward, _backward)


def _in_region(run: _Run, fn, params, data, step, *, with_grads: bool) -> Any:
  """`fn(params, data, step)` where the stages are manual.

  JAX 0.10 cannot differentiate a manual region within one that is manual over other axes (as
  training is over `replica`): gradients are computed inside, and handed out.
  """
  axis, mesh = run.pipeline.axis_name, jax.typeof(data["tokens"]).sharding.mesh
  _check_mesh(run, params, mesh)
  if axis in mesh.manual_axes:
    return fn(params, data, step)
  if mesh.explicit_axes:

    def call(params, data, step):
      return _in_region(run, fn, params, data, step, with_grads=with_grads)

    grads = jax.tree.map(lambda p: jax.typeof(p).sharding.spec, params)
    with jax.sharding.use_abstract_mesh(mesh):
      auto: Any = jax.sharding.auto_axes(
        call, axes=mesh.explicit_axes, out_sharding=(jax.P(), grads) if with_grads else jax.P()
      )
      return auto(params, data, step)
  rows, tokens = _cut(run, data["tokens"], mesh)
  spec: Any = {name: jax.P() for name in params} | {"layers": jax.P(axis)}

  def local(params, data, step):
    out = fn(params, data, step)
    value, grads = out if with_grads else (out, None)
    value = value if rows is None else jax.lax.psum(value, rows)
    return (value, grads) if with_grads else value

  region: Any = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(spec, jax.P(rows, tokens), jax.P()),
    out_specs=(jax.P(), spec) if with_grads else jax.P(),
    axis_names={axis, rows, tokens} - {None},
  )
  return region(params, data, step)


def _cut(run: _Run, tokens_BS, mesh) -> tuple[str | None, str | None]:
  """Axes of rows and tokens that become manual too.

  Else the compiler would sum gradients over `data` in every tick.
  """
  auto = [name for name in mesh.auto_axes if mesh.shape[name] > 1]
  rows = DATA if DATA in auto else None
  if rows and tokens_BS.shape[0] % mesh.shape[rows]:
    raise ValueError(
      f"`batch` must have rows for each of the {mesh.shape[rows]} devices of axis '{rows}', got"
      f" {tokens_BS.shape[0]}."
    )
  seq = None if run.context is None else run.context.axis_name
  return rows, seq if seq in mesh.auto_axes else None


def _check_mesh(run: _Run, params, mesh) -> None:
  axis = run.pipeline.axis_name
  if axis not in mesh.axis_names:
    raise ValueError(f"`pipeline` needs a mesh with the axis '{axis}', got {mesh.axis_names}.")
  if TENSOR in mesh.manual_axes and mesh.shape[TENSOR] > 1:
    raise ValueError(f"`pipeline` cannot run where '{TENSOR}' is manual: leave it to the compiler.")
  num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
  if axis in mesh.manual_axes:
    num_layers *= mesh.shape[axis]
  check_stages(num_layers, mesh.shape[axis])
