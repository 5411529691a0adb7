"""Llama in stages trains like Llama on one device."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm import _axes
from models import llama, llama_pipeline
from parallel import (
  DEFAULT_RULES,
  PipelineParallel,
  RandomRoute,
  make_mesh,
  mesh_specs,
  named_shardings,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")
CFG = dataclasses.replace(
  llama.nano(), vocab_size=96, intermediate_size=96, hidden_size=32, num_layers=4, scan_layers=True
)
ROWS, N = 8, 16


def make_batch():
  """Packed: documents of 5 and 8 tokens, then padding, which takes more of later rows."""
  rng = np.random.default_rng(0)
  ids = np.repeat(np.array([[1, 2, 0]], np.int32), (5, 8, 3), axis=1).repeat(ROWS, 0)
  positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (5, 8, 3)])
  mask = (ids > 0) & (rng.random((ROWS, N)) < np.linspace(1, 0.1, ROWS)[:, None])
  return {
    "tokens": rng.integers(0, CFG.vocab_size, (ROWS, N)).astype(np.int32),
    "targets": rng.integers(0, CFG.vocab_size, (ROWS, N)).astype(np.int32),
    "loss_mask": mask.astype(np.float32),
    "segment_ids": ids,
    "positions": positions[None].repeat(ROWS, 0),
  }


def make_params(cfg=CFG):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes)


def assert_close(got, want, atol=1e-5):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, want)


@functools.partial(jax.jit, static_argnums=2)
def in_one_piece(params, batch, cfg):
  """((loss, aux), gradients)."""
  return jax.value_and_grad(lambda p: llama.loss(p, batch, cfg, z_loss=1e-3), has_aux=True)(params)


def on_one_device(cfg=CFG, first=0, last=ROWS):
  """Of some rows."""
  batch = jax.tree.map(lambda x: x[first:last], make_batch())
  return jax.device_get(in_one_piece(make_params(cfg), batch, cfg))


def place(mesh, params, cfg):
  """Parameters and the batch on the mesh."""
  rules = {**DEFAULT_RULES, "layers": "stage"}
  specs = mesh_specs(llama.specs(cfg), params, mesh, rules)
  params = jax.device_put(params, named_shardings(mesh, specs))
  spec = jax.P(("replica", "data", "fsdp"))
  return params, jax.device_put(make_batch(), jax.NamedSharding(mesh, spec))


def program(mesh, pipeline, cfg):
  """`value_and_grad` in a region of replicas if there are several, as training does."""

  def local(params, batch):
    def loss(params):
      return llama_pipeline.loss(params, batch, cfg, pipeline=pipeline, z_loss=1e-3)

    return jax.value_and_grad(loss, has_aux=True)(params)

  if mesh.shape["replica"] == 1:
    return jax.jit(local)

  def of_replica(params, batch):
    out = local(_axes.vary(params, "replica"), batch)
    return jax.tree.map(lambda x: x[None], out)

  replica = jax.P("replica")
  return jax.jit(
    jax.shard_map(
      of_replica,
      mesh=mesh,
      in_specs=(jax.P(), replica),
      out_specs=replica,
      axis_names={"replica"},
    )
  )


def check(schedule, *, cfg=CFG, num_microbatches=2, **sizes):
  num = int(np.prod(list(sizes.values())))
  mesh = make_mesh(**sizes, devices=jax.devices()[:num])
  pipeline = PipelineParallel(num_microbatches=num_microbatches, schedule=schedule)
  run = program(mesh, pipeline, cfg)
  got = jax.device_get(run(*place(mesh, make_params(cfg), cfg)))
  replicas = mesh.shape["replica"]
  if replicas == 1:
    return assert_close(got, on_one_device(cfg))
  rows = ROWS // replicas
  for r in range(replicas):
    one = jax.tree.map(lambda x, r=r: x[r], got)
    assert_close(one, on_one_device(cfg, r * rows, (r + 1) * rows))


def test_replicas_of_two_stages():
  check("1f1b", replica=2, stage=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_four_stages(schedule):
  """Rows and microbatches with unequal numbers of targets; other splits: `test_splits.py`."""
  check(schedule, stage=4, num_microbatches=4)


@pytest.mark.slow
def test_untied_unrolled_and_recomputed():
  cfg = dataclasses.replace(CFG, tie_embeddings=False, scan_layers=False, remat="full")
  check("1f1b", cfg=cfg, stage=2, num_microbatches=4)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_loss_alone_costs_no_gradient(schedule):
  mesh = make_mesh(stage=2, devices=jax.devices()[:2])
  pipeline = PipelineParallel(num_microbatches=4, schedule=schedule)
  args = place(mesh, make_params(), CFG)
  alone = jax.jit(lambda p, b: llama_pipeline.loss(p, b, CFG, pipeline=pipeline)[0])
  compiled = alone.lower(*args).compile()
  assert compiled.as_text().count(" collective-permute(") == 1
  flops = compiled.cost_analysis()["flops"]
  assert flops < 0.5 * program(mesh, pipeline, CFG).lower(*args).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_route_between_replicas():
  """Equal replicas and batches: a route changes nothing; packed documents travel with tokens."""
  mesh = make_mesh(replica=2, stage=2, devices=jax.devices()[:4])
  params, batch = make_params(), make_batch()
  batch = jax.tree.map(lambda x: np.concatenate((x[:4], x[:4])), batch)
  straight = PipelineParallel(num_microbatches=4, schedule="1f1b")
  routed = dataclasses.replace(straight, route=RandomRoute(seed=1))
  want = jax.device_get(program(mesh, straight, CFG)(params, batch))
  got = jax.device_get(program(mesh, routed, CFG)(params, batch))
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rejects():
  batch = make_batch()

  def trace(batch=batch, cfg=CFG, num_microbatches=2, mesh=None, **sizes):
    num = int(np.prod(list(sizes.values())))
    mesh = mesh or make_mesh(**sizes, devices=jax.devices()[:num])
    pipeline = PipelineParallel(num_microbatches=num_microbatches)
    place = jax.NamedSharding(mesh, jax.P())
    args = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (make_params(cfg), batch)
    )
    jax.eval_shape(lambda p, b: llama_pipeline.loss(p, b, cfg, pipeline=pipeline), *args)

  with pytest.raises(ValueError, match="`num_stages` must divide the number of layers, 4, got 3"):
    trace(stage=3)
  with pytest.raises(ValueError, match="`num_microbatches` must divide the rows of `batch`, got 3"):
    trace(num_microbatches=3, stage=2)
  with pytest.raises(ValueError, match=r"unknown \['mask'\]"):
    trace({**batch, "mask": batch["loss_mask"]}, stage=2)
  with pytest.raises(ValueError, match="`pipeline` needs a mesh with the axis 'stage'"):
    trace(mesh=jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2]))
  few = jax.tree.map(lambda x: x[:3], batch)
  with pytest.raises(ValueError, match="`batch` must have rows for each of the 2 devices"):
    trace(few, stage=2, data=2)
