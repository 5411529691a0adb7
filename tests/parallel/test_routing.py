"""Random routes: bijections that derivatives follow back, and a pipeline that goes by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel import RandomRoute, pipeline_value_and_grad, random_route
from tests.parallel import pipeline_toy as toy

TABLE = ((1, 0, 3, 2), (3, 2, 1, 0), (1, 2, 3, 0))


@functools.cache
def replicas():
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((4,), ("replica",), auto, devices=jax.devices()[:4])


def on_replicas(fn):
  spec = jax.P("replica")
  return jax.jit(jax.shard_map(fn, mesh=replicas(), in_specs=(spec, jax.P()), out_specs=spec))


@pytest.mark.parametrize("route", [RandomRoute(), RandomRoute(kind="table", table=TABLE)])
def test_there_and_back(route):
  """Each step is a permutation, the inverse returns it, and the derivative goes that way."""

  def local(x, step):
    go = functools.partial(random_route, route=route, step=step, microbatch=1, boundary=2)
    there, pull = jax.vjp(go, x)
    return jnp.stack((there, go(there, inverse=True), *pull(there)), 1)

  program, x = on_replicas(local), np.arange(4.0, dtype=np.float32)
  seen = set()
  for step in range(20):
    there, back, grad = np.asarray(program(x, step)).T
    np.testing.assert_array_equal(back, x)
    np.testing.assert_array_equal(grad, x)
    seen.add(tuple(there.astype(int)))
    np.testing.assert_array_equal(there, np.asarray(program(x, step))[:, 0])  # as after a resume
  rows = TABLE if route.table else [tuple((r + q) % 4 for r in range(4)) for q in range(4)]
  assert seen == {tuple(np.argsort(row)) for row in rows}


def test_draws_depend_on_step_microbatch_and_boundary():
  @jax.jit
  @functools.partial(jax.vmap, axis_name="replica", out_axes=None, in_axes=None, axis_size=4)
  def draws(seed_of_all):
    route = RandomRoute(seed=3)
    each = jax.vmap(route.draw)
    n = jnp.arange(64) + seed_of_all
    return each(n, 0 * n, 0 * n), each(0 * n, n, 0 * n), each(0 * n, 0 * n, n)

  for numbers in draws(0):
    assert set(np.bincount(numbers, minlength=4) > 4) == {True}
  first, second, third = (np.asarray(x) for x in draws(0))
  assert (first != second).any()
  assert (second != third).any()


def stacked_program(num_stages, schedule, route, num_replicas=2):
  auto = (jax.sharding.AxisType.Auto,) * 2
  size = num_stages * num_replicas
  mesh = jax.make_mesh(
    (num_replicas, num_stages), ("replica", "stage"), auto, devices=jax.devices()[:size]
  )
  run = pipeline_value_and_grad(
    toy.stage, toy.head, input_fn=toy.embed, num_microbatches=3, schedule=schedule, route=route
  )

  def local(stages, shared, batch, step):
    stages, shared, batch = jax.tree.map(lambda x: x[0], (stages, shared, batch))
    return jax.tree.map(lambda x: x[None], run(stages, shared, batch, step))

  stages, shared = jax.P("replica", "stage"), jax.P("replica")
  return jax.jit(
    jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(stages, shared, shared, jax.P()),
      out_specs=(shared, (stages, shared)),
    )
  )


def twice(tree, num=2):
  return jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], num, 0), tree)


@pytest.mark.parametrize(
  ("schedule", "num_stages"),
  [("1f1b", 2), pytest.param("gpipe", 4, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("quickly_compiled")
def test_identical_replicas_feel_nothing(schedule, num_stages):
  stages, shared = toy.make_params()
  stages = jax.tree.map(lambda w: w[: 2 * num_stages], stages)
  args = twice((stages, shared, toy.make_batch(6)))
  straight = stacked_program(num_stages, schedule, None)(*args, 0)
  routed = stacked_program(num_stages, schedule, RandomRoute(seed=1))
  for step in range(3):
    jax.tree.map(np.testing.assert_array_equal, routed(*args, step), straight)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gradients_return_along_the_same_edges(schedule):
  """Replicas that differ: a plain walk of every microbatch, by the drawn routes."""
  num, M, step, route = 2, 3, 5, RandomRoute(seed=2)
  rng = np.random.default_rng(3)
  stages, shared = jax.tree.map(
    lambda x: (x * rng.uniform(0.5, 1.5, x.shape)).astype(np.float32), twice(toy.make_params())
  )
  batch = jax.tree.map(lambda x: np.stack((x[:6], x[6:])), toy.make_batch(12))

  @jax.jit
  @functools.partial(jax.vmap, axis_name="replica", axis_size=num, in_axes=None, out_axes=None)
  def shifts(m):
    return jax.vmap(lambda m: route.draw(step, m, 0))(m)

  drawn = np.asarray(shifts(np.arange(M)))

  half = toy.LAYERS // 2

  def at(tree, i):
    return jax.tree.map(lambda x: x[i], tree)

  def total(stages, shared):
    losses = [0.0] * num
    for m in range(M):
      for r in range(num):
        to = (r + drawn[m]) % num
        data = jax.tree.map(lambda x, r=r, m=m: x[r, m::M], batch)
        x = toy.embed(at(shared, r), data)
        x = toy.stage(jax.tree.map(lambda w, r=r: w[r, :half], stages), x, data)
        x = toy.stage(jax.tree.map(lambda w, to=to: w[to, half:], stages), x, data)
        losses[to] += toy.head(at(shared, to), x, data)[0] / M
    return sum(losses), jnp.stack(losses)

  grads, losses = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(stages, shared)
  (got, _), got_grads = stacked_program(2, schedule, route)(stages, shared, batch, step)
  assert len(set(drawn.tolist())) == 2  # some go straight, some do not
  np.testing.assert_allclose(got, losses, rtol=0, atol=1e-6)
  for g, w in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads)):
    np.testing.assert_allclose(g, w, rtol=0, atol=1e-6)


def test_one_replica_is_a_route():
  x = jax.vmap(lambda x: random_route(x, RandomRoute(), step=1), axis_name="replica")(jnp.ones(1))
  assert x.tolist() == [1.0]


def test_rejects():
  with pytest.raises(ValueError, match="`kind` must be 'shift' or 'table', got 'ring'"):
    RandomRoute(kind="ring")  # type: ignore[arg-type]
  with pytest.raises(ValueError, match="`table` belongs to kind 'table'"):
    RandomRoute(table=TABLE)
  with pytest.raises(ValueError, match=r"`table` must have permutations .* got \(0, 0\)"):
    RandomRoute(kind="table", table=((0, 0),))
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    random_route(jnp.ones(2), RandomRoute(), step=0)
  wrong = RandomRoute(kind="table", table=((1, 0),))
  with pytest.raises(ValueError, match="rows of length 4, the size of axis 'replica'"):
    jax.eval_shape(on_replicas(lambda x, step: random_route(x, wrong, step=step)), jnp.ones(4), 0)

  def own_step(x, step):
    return random_route(x, RandomRoute(), step=step + jax.lax.axis_index("replica"))

  with pytest.raises(ValueError, match="must be equal on all devices, differs on"):
    jax.eval_shape(on_replicas(own_step), jnp.ones(4), 0)
