"""Named axes mean the same under `jax.shard_map` and `jax.vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import _axes, inspect

CONTEXTS = ("vmap", "checked", "unchecked")
X = np.arange(8, dtype=np.float32).reshape(4, 2)


def run(fun, x, context):
  """`fun` on every row of `x`, each on its own replica; results stacked."""
  if context == "vmap":
    return jax.jit(jax.vmap(fun, axis_name="replica"))(x)
  mesh = jax.make_mesh(
    (len(x),), ("replica",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[: len(x)]
  )

  def local(x):
    out = fun(jax.tree.map(lambda a: a[0], x))
    return jax.tree.map(lambda a: _axes.vary(jnp.asarray(a), "replica")[None], out)

  spec = jax.P("replica")
  checked = context == "checked"
  sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=checked)
  return jax.jit(sharded)(x)


def types_in_shard_map(fun, x):
  """The varying axes of each result of `fun`, with replication checks."""
  found = []

  def look(x):
    found.append(jax.tree.map(_axes.varying_axes, fun(x)))
    return jax.tree.map(jnp.zeros_like, x)

  jax.eval_shape(lambda x: run(look, x, "checked"), x)
  return found[-1]


@pytest.mark.parametrize("context", CONTEXTS)
def test_axis_size(context):
  assert run(lambda x: x[0] * 0 + _axes.axis_size("replica"), X, context).tolist() == [4.0] * 4


def test_axis_size_names_an_unbound_axis():
  with pytest.raises(ValueError, match=r"axis `replica` is unbound: call inside jax\.shard_map"):
    _axes.axis_size("replica")
  with pytest.raises(ValueError, match="axis `data` is unbound"):
    jax.vmap(lambda x: x * _axes.axis_size("data"), axis_name="replica")(X)


@pytest.mark.parametrize("context", CONTEXTS)
def test_is_manual(context):
  found = []

  def look(x):
    found.append((_axes.is_manual("replica"), _axes.is_manual("data")))
    return x

  run(look, X, context)
  assert found[-1] == (context != "vmap", False)


@pytest.mark.parametrize("context", CONTEXTS)
def test_vary_changes_no_value(context):
  np.testing.assert_array_equal(run(lambda x: _axes.vary(x, "replica"), X, context), X)
  ones = run(lambda x: _axes.vary({"a": jnp.ones(2)}, "replica"), X, context)
  np.testing.assert_array_equal(ones["a"], np.ones((4, 2)))


def test_vary_changes_types():
  equal, differs = frozenset(), frozenset({"replica"})
  got = types_in_shard_map(lambda x: (x, jnp.ones(2), _axes.vary(jnp.ones(2), "replica")), X)
  assert got == (differs, equal, differs)


@pytest.mark.parametrize("context", CONTEXTS)
def test_all_gather_equal_stacks_all_replicas(context):
  got = run(lambda x: _axes.all_gather_equal({"x": x}, "replica"), X, context)["x"]
  np.testing.assert_array_equal(got, np.broadcast_to(X, (4, 4, 2)))


def test_all_gather_equal_is_typed_as_equal():
  def gather(x):
    return _axes.all_gather_equal({"x": x, "one": jnp.ones(2)}, "replica")

  assert types_in_shard_map(gather, X) == {"x": frozenset(), "one": frozenset()}


@pytest.mark.parametrize("context", CONTEXTS)
def test_pmean_sums_in_float32(context):
  """In bfloat16 the sum 256 + 1 + 1 + 1 would stay 256."""
  x = jnp.asarray([[256.0], [1.0], [1.0], [2.0]], jnp.bfloat16)
  got = run(lambda x: _axes.pmean_f32(x, "replica"), x, context)
  assert got.dtype == jnp.bfloat16
  assert got[:, 0].tolist() == [65.0] * 4


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("taken", [False, True])
def test_cond_takes_a_collective_or_leaves_it(context, taken):
  def fun(x):
    def mean(x):
      return {"x": jax.lax.pmean(x, "replica"), "n": jnp.ones(())}

    def keep(x):
      return {"x": x, "n": jnp.zeros(())}

    return _axes.cond(jnp.asarray(taken), mean, keep, x)

  got = run(fun, X, context)
  np.testing.assert_array_equal(got["x"], np.broadcast_to(X.mean(0), X.shape) if taken else X)
  assert got["n"].tolist() == [float(taken)] * 4


def test_cond_joins_the_types_of_predicate_and_branches():
  equal, differs = frozenset(), frozenset({"replica"})

  def fun(x):
    always = jnp.asarray(True)
    both = _axes.cond(always, lambda x: (x, x.sum() * 0 + 1), lambda x: (x, x.sum()), x)
    one = _axes.cond(always, lambda x: (jax.lax.pmean(x, "replica"), 0), lambda x: (x, 1), x)
    none = _axes.cond(always, lambda a: a, lambda a: -a, jnp.ones(2))
    predicate = _axes.cond(x[0] > 0, lambda a: a, lambda a: -a, jnp.ones(2))
    return both, one, none, predicate

  got = types_in_shard_map(fun, X)
  assert got == ((differs, differs), (differs, equal), equal, differs)


def test_cond_with_a_predicate_that_differs():
  def branch(a):
    return a  # no branch differs, but which one is taken does

  got = run(lambda x: _axes.cond(x[0] > 3, branch, lambda a: -a, jnp.ones(())), X, "checked")
  assert got.tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_a_mean_over_one_device_moves_nothing():
  """Typed as equal, without a collective, also over the axes that shard it; differentiable."""
  sizes, names = (1, 2, 4), ("replica", "fsdp", "tensor")
  mesh = jax.make_mesh(sizes, names, (jax.sharding.AxisType.Auto,) * 3)

  def local(x):
    x = _axes.vary(x, "replica")
    grad = jax.grad(lambda x: jnp.sum(_axes.pmean_f32(x, "replica") * jnp.arange(8.0)[None]))(x)
    return _axes.pmean_f32(2 * x, "replica"), _axes.pmean_f32(grad, "replica")

  sharding = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
  region = jax.shard_map(
    local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), axis_names={"replica"}
  )
  x = jax.device_put(jnp.ones((4, 8)), sharding)
  compiled = jax.jit(region, out_shardings=sharding).lower(x).compile()
  assert inspect.collective_bytes(compiled).ops == ()
  mean, grad = compiled(x)
  np.testing.assert_array_equal(mean, np.full((4, 8), 2.0))
  np.testing.assert_array_equal(grad, np.broadcast_to(np.arange(8.0), (4, 8)))
