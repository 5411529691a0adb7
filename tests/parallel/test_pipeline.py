"""Pipelines against the same model in one piece."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.inspect import collective_bytes
from parallel import (
  PipelineParallel,
  pipeline,
  pipeline_loss,
  pipeline_value_and_grad,
  stack_stages,
  unstack_stages,
)
from tests.parallel import pipeline_toy as toy
from tests.parallel.pipeline_toy import Toy

pytestmark = pytest.mark.filterwarnings("ignore:`num_microbatches` = .* is less than")


def check(case: Toy, compiled=None):
  params, batch = toy.make_params(), toy.make_batch(2 * case.num_microbatches)
  got = (compiled or case.program())(*params, batch)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6),
    jax.device_get(got),
    jax.device_get(toy.in_one_piece(params, batch)),
  )


def cases():
  """S in 1, 2, 4, 8 and M in 1, 2, 3, S, 2 S + 1; schedules take turns."""
  pairs = [(s, m) for s in (1, 2, 4, 8) for m in sorted({1, 2, 3, s, 2 * s + 1})]
  for number, (size, num) in enumerate(pairs):
    yield Toy(size=size, num_microbatches=num, schedule=("gpipe", "1f1b")[number % 2])


@pytest.mark.slow
@pytest.mark.parametrize(
  "case", list(cases()), ids=lambda c: f"{c.schedule}-S{c.size}-M{c.num_microbatches}"
)
def test_is_the_model_in_one_piece(case, quick_compile):
  with quick_compile():
    check(case)


@pytest.mark.parametrize(("schedule", "hops"), [("gpipe", [1, 1]), ("1f1b", [1, 2, 1])])
def test_hops_per_tick(schedule, hops):
  """GPipe one each way; 1F1B one each way in a tick with both passes; none to oneself."""
  case = Toy(size=4, num_microbatches=6, schedule=schedule)
  compiled = lower(case).compile()
  bodies = re.split(r"\n(?=%|ENTRY)", compiled.as_text())
  counts = [len(re.findall(r" collective-permute(?:-start)?\(", body)) for body in bodies]
  assert sorted(c for c in counts if c) == sorted(hops)
  pairs = re.findall(r"source_target_pairs=\{(.*?)\}[,\s]", compiled.as_text())
  assert pairs
  assert all("{3,0}" not in p and "{0,3}" not in p for p in pairs)
  assert "collective_permute" not in lower(dataclasses.replace(case, size=1)).as_text()
  one_way = (case.num_microbatches + case.size - 1) * 2 * toy.LENGTH * toy.WIDTH * 4
  assert collective_bytes(compiled, case.mesh).by_kind["collective-permute"] == 2 * one_way
  check(case, compiled)


def lower(case: Toy):
  return case.program().lower(*toy.make_params(), toy.make_batch(2 * case.num_microbatches))


def memory(schedule, num_microbatches, *, remat=True):
  """Bytes of temporary arrays per device; the inputs, 6 KiB a microbatch, weigh most."""
  case = Toy(size=2, num_microbatches=num_microbatches, schedule=schedule, remat=remat)
  batch = jax.tree.map(lambda x: np.repeat(x, 16, 1) if x.ndim > 1 else x,
                       toy.make_batch(16 * num_microbatches))  # fmt: skip
  return case.program().lower(*toy.make_params(), batch).compile().memory_analysis()


@pytest.mark.slow
def test_memory_of_1f1b_does_not_grow():
  few, many = (memory("1f1b", m).temp_size_in_bytes for m in (8, 32))
  one_input = 16 * 16 * toy.LENGTH * toy.WIDTH * 4
  tokens = 24 * 16 * 16 * toy.LENGTH * 3 * 4
  assert many - few < tokens + one_input


@pytest.mark.slow
def test_memory_of_gpipe_grows():
  slope = {
    remat: (memory("gpipe", 32, remat=remat).temp_size_in_bytes
            - memory("gpipe", 8, remat=remat).temp_size_in_bytes) / 24
    for remat in (True, False)
  }  # fmt: skip
  one_input = 16 * 16 * toy.LENGTH * toy.WIDTH * 4
  assert slope[True] > one_input
  assert slope[False] > slope[True] + one_input * toy.LAYERS / 2


def test_layers_in_stages_and_back():
  layers = {"w": jnp.arange(24.0).reshape(6, 4)}
  stages = stack_stages(layers, 3)
  assert stages["w"].shape == (3, 2, 4)
  np.testing.assert_array_equal(unstack_stages(stages)["w"], layers["w"])
  with pytest.raises(ValueError, match="`num_stages` must divide the number of layers, 6, got 4"):
    stack_stages(layers, 4)


@functools.cache
def two_stages():
  return Toy(size=2, num_microbatches=2).mesh


def in_region(run, *args):
  whole = jax.P()
  specs = (jax.P("stage"), whole, whole)
  region = jax.shard_map(run, mesh=two_stages(), in_specs=specs, out_specs=whole)
  return jax.jit(region)(*args)


def trace(run, batch=None):
  args = (*toy.make_params(), toy.make_batch(4) if batch is None else batch)
  return jax.eval_shape(lambda *a: in_region(lambda *b: run(*b)[0], *a), *args)


OPTIONS = {"num_microbatches": 2, "input_fn": toy.embed}


@pytest.mark.slow
def test_loss_alone_and_its_derivative():
  """`pipeline_loss` runs no backward pass, and JAX differentiates it, unlike the other one."""
  args = (*toy.make_params(), toy.make_batch(4))
  want, grads = toy.in_one_piece(args[:2], args[2])
  loss = pipeline_loss(toy.stage, toy.head, **OPTIONS)

  def both(stages, shared, batch):
    (value, aux), grad = jax.value_and_grad(loss, argnums=1, has_aux=True)(stages, shared, batch)
    return value, aux, grad

  value, aux, grad = in_region(both, *args)
  np.testing.assert_allclose(value, want[0], rtol=0, atol=1e-6)
  np.testing.assert_allclose(aux["tokens"], want[1]["tokens"], rtol=0, atol=1e-6)
  np.testing.assert_allclose(grad["table"], grads[1]["table"], rtol=0, atol=1e-6)


def test_1f1b_cannot_be_differentiated():
  run = pipeline_value_and_grad(toy.stage, toy.head, **OPTIONS)

  def again(stages, shared, batch):
    return jax.grad(lambda shared: run(stages, shared, batch)[0][0])(shared), None

  with pytest.raises(TypeError, match="has computed the gradients already"):
    trace(again)


def test_rejects():
  def make(**changes):
    options = {"stage_fn": toy.stage, "loss_fn": toy.head, **OPTIONS, **changes}
    return pipeline_value_and_grad(options.pop("stage_fn"), options.pop("loss_fn"), **options)

  for schedule in ("zb", "dualpipe"):
    with pytest.raises(ValueError, match=f"`schedule` must be 'gpipe' or '1f1b', got '{schedule}'"):
      make(schedule=schedule)
  with pytest.raises(ValueError, match="`num_microbatches` must be at least 1, got 0"):
    PipelineParallel(num_microbatches=0)
  with pytest.raises(ValueError, match="`num_microbatches` must divide the rows of `batch`, got 2"):
    trace(make(), toy.make_batch(5))
  with pytest.raises(ValueError, match="`stage_fn` must keep the shape and dtype"):
    trace(make(stage_fn=lambda w, x, data: toy.stage(w, x, data).astype(jnp.bfloat16)))
  with pytest.raises(ValueError, match="`stage_fn` must not communicate over 'stage'"):
    trace(make(stage_fn=lambda w, x, data: jax.lax.pmean(toy.stage(w, x, data), "stage")))
  with pytest.raises(ValueError, match="axis `stage` is unbound"):
    make()(*toy.make_params(), toy.make_batch(4))
  with pytest.warns(UserWarning, match="`num_microbatches` = 1 is less than the 2 stages"):
    trace(make(num_microbatches=1))


@pytest.mark.slow
def test_outputs_are_those_of_the_last_stage():
  run = pipeline(toy.stage, **OPTIONS)
  params, batch = toy.make_params(), toy.make_batch(4)
  specs = (jax.P("stage"), jax.P(), jax.P())
  program = jax.shard_map(run, mesh=two_stages(), in_specs=specs, out_specs=jax.P("stage"))
  first, last = np.split(np.asarray(jax.jit(program)(*params, batch)), 2)
  np.testing.assert_array_equal(first, 0.0)
  want = jax.jit(lambda p, b: toy.stage(p[0], toy.embed(p[1], b), b))(params, batch)
  np.testing.assert_allclose(last, want, rtol=0, atol=1e-6)
