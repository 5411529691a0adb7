"""The model on meshes: automatic and explicit axes, replicas by shard_map, fsdp inside."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxcomm import _axes
from models import llama
from parallel import batch_spec, make_mesh, mesh_specs, named_shardings
from tests.models.llama_params import llama_params

CFG = dataclasses.replace(
  llama.nano(), vocab_size=96, num_layers=2, intermediate_size=96, scan_layers=True
)
TYPES = pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit], ids=str)


def types_and(name, fast):
  """Both types of axes by False and True for `name`; the pair `fast` is in the fast suite."""
  pairs = [(t, x) for t in (AxisType.Auto, AxisType.Explicit) for x in (False, True)]
  params = [
    pytest.param(*pair, marks=() if pair == fast else pytest.mark.slow, id=f"{pair[0]}-{pair[1]}")
    for pair in pairs
  ]
  return pytest.mark.parametrize(("axis_types", name), params)


COLLECTIVE = re.compile(
  r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def make_params():
  return llama_params(CFG)


def make_batch(rows=8):
  stream = np.random.default_rng(0).integers(0, CFG.vocab_size, (rows, 17)).astype(np.int32)
  mask = (np.arange(rows * 16).reshape(rows, 16) % 5 > 0).astype(np.float32)
  segments = np.repeat(np.array([[1] * 7 + [2] * 9], np.int32), rows, 0)
  positions = np.repeat(np.array([[*range(7), *range(9)]], np.int32), rows, 0)
  return {
    "tokens": stream[:, :-1],
    "targets": stream[:, 1:],
    "loss_mask": mask,
    "segment_ids": segments,
    "positions": positions,
  }


def loss_and_grads(params, batch, cfg=CFG):
  (value, _), grads = jax.value_and_grad(lambda p: llama.loss(p, batch, cfg), has_aux=True)(params)
  return value, grads


def on_mesh(mesh):
  """Sharded parameters and batch, and the shardings of the parameters."""
  params = make_params()
  shardings = named_shardings(mesh, mesh_specs(llama.specs(CFG), params, mesh))
  params = jax.device_put(params, shardings)
  batch = jax.device_put(make_batch(), jax.NamedSharding(mesh, batch_spec(mesh)))
  return params, batch, shardings


def assert_close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), got, want)


@pytest.mark.slow
@TYPES
def test_sharded_init_draws_the_same_numbers(axis_types):
  mesh = make_mesh(fsdp=8, axis_types=axis_types)
  shardings = on_mesh(mesh)[2]
  init = jax.jit(llama.init, static_argnums=1, out_shardings=shardings)
  params = init(jax.random.key(0), CFG)
  want = jax.jit(llama.init, static_argnums=1)(jax.random.key(0), CFG)
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert params["layers"]["q_DHC"].sharding.spec == jax.P(None, "fsdp")
  assert params["layers"]["attn_norm_D"].sharding.is_fully_replicated
  local = params["layers"]["gate_DF"].addressable_shards[0].data
  assert local.shape == (2, 8, 96)
  assert jax.tree.map(lambda p: p.sharding, params) == shardings


@types_and("set_mesh", fast=(AxisType.Auto, False))
def test_fsdp_equals_one_device(axis_types, set_mesh):
  mesh = make_mesh(data=2, fsdp=4, axis_types=axis_types)
  params, batch, shardings = on_mesh(mesh)
  step = jax.jit(loss_and_grads, out_shardings=(None, shardings))
  if set_mesh:
    with jax.set_mesh(mesh):
      got = step(params, batch)
  else:
    got = step(params, batch)
  assert_close(got, jax.jit(loss_and_grads)(make_params(), make_batch()))


@TYPES
def test_forward_gathers_weights_and_never_moves_activations(axis_types):
  mesh = make_mesh(data=2, fsdp=4, axis_types=axis_types)
  params, batch, _ = on_mesh(mesh)
  forward = jax.jit(lambda p, t: llama.apply(p, t, CFG)[0])
  compiled = forward.lower(params, batch["tokens"]).compile()
  assert set(COLLECTIVE.findall(compiled.as_text())) == {"all-gather"}
  logits = compiled(params, batch["tokens"])
  assert logits.addressable_shards[0].data.shape == (1, 16, CFG.vocab_size)


@types_and("differ", fast=(AxisType.Explicit, True))
def test_manual_over_replica(axis_types, differ):
  """Parameters typed as equal or as differing, batch split over replica, data and fsdp."""
  mesh = make_mesh(replica=2, data=2, fsdp=2, axis_types=axis_types)
  params, batch, shardings = on_mesh(mesh)

  def local_step(params, batch):
    if differ:
      params = _axes.vary(params, "replica")
    value, grads = loss_and_grads(params, batch)
    # Equal parameters: the sum over replicas is the transpose of their use by each.
    grads = jax.tree.map(lambda g: jax.lax.pmean(g, "replica") if differ else g / 2, grads)
    return jax.lax.pmean(value, "replica"), grads

  step = jax.shard_map(
    local_step,
    mesh=mesh,
    in_specs=(jax.P(), jax.P("replica")),
    out_specs=jax.P(),
    axis_names={"replica"},
  )
  got = jax.jit(step, out_shardings=(None, shardings))(params, batch)

  halves = [jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], make_batch()) for i in range(2)]
  parts = [jax.jit(loss_and_grads)(make_params(), half) for half in halves]
  assert_close(got, jax.tree.map(lambda a, b: (np.asarray(a) + np.asarray(b)) / 2, *parts))


@pytest.mark.parametrize(
  ("axis_types", "scan", "remat"),
  [
    (AxisType.Auto, True, "full"),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        (AxisType.Auto, True, "none"),
        (AxisType.Explicit, False, "none"),
        (AxisType.Explicit, True, "full"),
      )
    ),
  ],
)
def test_replicas_with_their_own_parameters(axis_types, scan, remat):
  """Each replica trains alone: no collective over `replica`, as many results as replicas."""
  cfg = dataclasses.replace(CFG, remat=remat, scan_layers=scan)
  mesh = make_mesh(replica=2, axis_types=axis_types)
  stacked = jax.tree.map(lambda p: np.stack([p, 1.5 * p]), make_params())
  batch = make_batch()

  def local_step(params, batch):
    params = jax.tree.map(lambda p: p[0], params)
    return jax.tree.map(lambda x: x[None], loss_and_grads(params, batch, cfg))

  spec = jax.P("replica")
  step = jax.jit(
    jax.shard_map(
      local_step, mesh=mesh, in_specs=(spec, spec), out_specs=spec, axis_names={"replica"}
    )
  )
  sharding = jax.NamedSharding(mesh, spec)
  compiled = step.lower(*jax.device_put((stacked, batch), sharding)).compile()
  assert not COLLECTIVE.findall(compiled.as_text())
  values, grads = jax.device_get(compiled(*jax.device_put((stacked, batch), sharding)))
  for i in range(2):
    own = jax.tree.map(lambda x, i=i: x[i], stacked)
    half = jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], batch)
    got = values[i], jax.tree.map(lambda x, i=i: x[i], grads)
    assert_close(got, jax.jit(loss_and_grads)(own, half))


@pytest.mark.slow
@TYPES
def test_a_batch_that_the_axes_do_not_divide_still_runs(axis_types):
  mesh = make_mesh(fsdp=4, axis_types=axis_types)
  params, _, _ = on_mesh(mesh)
  tokens = make_batch(3)["tokens"]
  got = jax.jit(lambda p, t: llama.apply(p, t, CFG)[0])(params, tokens)
  want = jax.jit(lambda p, t: llama.apply(p, t, CFG)[0])(make_params(), tokens)
  assert_close(got, want)


@pytest.mark.slow
def test_replicas_stacked_by_vmap_on_an_inner_mesh():
  mesh = make_mesh(data=2, fsdp=2)
  shardings = jax.tree.map(
    lambda s: jax.NamedSharding(mesh, jax.P(None, *s.spec)), on_mesh(mesh)[2]
  )
  stacked = jax.tree.map(lambda p: np.stack([p, 1.5 * p]), make_params())
  batch = jax.tree.map(lambda x: x.reshape(2, 4, -1), make_batch())
  args = (
    jax.device_put(stacked, shardings),
    jax.device_put(batch, jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))),
  )
  values, grads = jax.device_get(jax.jit(jax.vmap(loss_and_grads, axis_name="replica"))(*args))
  for i in range(2):
    own = jax.tree.map(lambda x, i=i: x[i], (stacked, batch))
    got = values[i], jax.tree.map(lambda x, i=i: x[i], grads)
    assert_close(got, jax.jit(loss_and_grads)(*own))
