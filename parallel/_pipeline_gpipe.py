"""GPipe (arXiv 1811.06965): one loop over ticks, which JAX turns round for the backward pass."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel._pipeline_parts import Line, LossFn, check_stage, read, split, where


def outputs(line: Line, stage_params: Any, shared: Any, batch: Any, step: Any) -> Any:
  """(outputs [M, b, ...], data of the same microbatches), true at the last stage, else zeros.

  Data is None unless it travels. `batch` is split; all arguments differ over the same axes.
  """

  def tick(received, t):
    microbatch = t - line.rank
    x, data = line.enter(shared, batch, microbatch, received)
    message = line.leave(line.stage_fn(stage_params, x, data), data)
    done = line.last & line.valid(microbatch)
    return line.forward(message, t, step), where(done, message, line.empty(message[0], batch))

  x = line.input_fn(shared, read(batch, 0))
  check_stage(line, stage_params, x, read(batch, 0))
  if line.remat:
    tick = jax.checkpoint(tick, prevent_cse=False)
  ticks = jnp.arange(line.num_microbatches + line.size - 1)
  _, sent = jax.lax.scan(tick, line.empty(x, batch), ticks)
  return jax.tree.map(lambda y: y[line.size - 1 :], sent)


def local_loss(
  line: Line, loss_fn: LossFn, stage_params: Any, shared: Any, batch: Any, step: Any
) -> tuple[jax.Array, Any]:
  """This stage's part of (loss, aux): outputs are dealt out, so that all stages share the head."""
  batch = split(batch, line.num_microbatches)
  ys, datas = outputs(line, stage_params, shared, batch, step)
  count = -(-line.num_microbatches // line.size)
  first = line.rank * count
  ys, datas = (_deal(line, tree, count) for tree in (ys, datas))

  def add(sums, i):
    y = read(ys, i)
    data = read(batch, first + i) if datas is None else read(datas, i)
    value = loss_fn(shared, y, data)
    share = jax.tree.map(lambda v: v / line.num_microbatches, value)
    return jax.tree.map(jnp.add, sums, where(line.valid(first + i), share, zeros)), None

  if line.remat:
    add = jax.checkpoint(add, prevent_cse=False)
  shapes = jax.eval_shape(loss_fn, shared, read(ys, 0), read(batch, 0))
  zeros = zeros_of(shapes, like=ys)
  return jax.lax.scan(add, zeros, jnp.arange(count))[0]


def zeros_of(shapes: Any, like: jax.Array) -> Any:
  """Zeros that differ over the axes of `like`."""
  return _axes.vary_like(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), like)


def _deal(line: Line, tree: Any, count: int) -> Any:
  """`count` of the last stage's microbatches to each stage, in order; the last one fills up."""

  def leaf(x):
    if line.size == 1:
      return x
    fill = jnp.repeat(x[-1:], count * line.size - x.shape[0], axis=0)
    x = jnp.concatenate((x, fill))
    return jax.lax.psum_scatter(x, line.axis_name, scatter_dimension=0, tiled=True)

  return jax.tree.map(leaf, tree)
