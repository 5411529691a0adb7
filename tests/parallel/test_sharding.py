import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from parallel import (
  DEFAULT_RULES,
  batch_spec,
  call_with_auto_axes,
  gather_fsdp,
  make_mesh,
  mesh_specs,
  named_shardings,
  shard_batch,
)

P = jax.P


def abstract(**sizes):
  return jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def leaf(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def spec_of(logical, shape, mesh, rules=DEFAULT_RULES):
  return mesh_specs({"w": logical}, {"w": leaf(*shape)}, mesh, rules)["w"]


def test_default_rules_shard_embed_over_fsdp():
  mesh = abstract(replica=2, data=2, fsdp=4)
  assert spec_of(P("layers", "embed", "mlp"), (3, 8, 5), mesh) == P(None, "fsdp")
  assert spec_of(P("layers", "mlp", "embed"), (3, 5, 8), mesh) == P(None, None, "fsdp")
  assert spec_of(P("layers", "norm"), (3, 7), mesh) == P()
  assert spec_of(P(None, "embed"), (3, 8), mesh) == P(None, "fsdp")
  assert spec_of(P(), (3, 8), mesh) == P()


@pytest.mark.parametrize("mesh", [abstract(replica=4), abstract(replica=4, data=1, fsdp=1)])
def test_missing_and_trivial_axes_are_dropped(mesh):
  assert spec_of(P("embed", "mlp"), (7, 5), mesh) == P()


def test_a_rule_may_name_several_axes():
  mesh = abstract(data=2, fsdp=4, tensor=2)
  rules = dict(DEFAULT_RULES, embed=("data", "fsdp"), mlp="tensor")
  assert spec_of(P("embed", "mlp"), (8, 6), mesh, rules) == P(("data", "fsdp"), "tensor")
  with pytest.raises(ValueError, match=r"size 12, which must be divisible by 8, .* data\*fsdp"):
    spec_of(P("embed", "mlp"), (12, 6), mesh, rules)


def test_structure_is_kept():
  mesh = abstract(fsdp=2)
  logical = {"a": P("embed"), "b": [P("norm"), {"c": P("vocab", "embed")}]}
  shapes = {"a": leaf(4), "b": [leaf(3), {"c": leaf(5, 6)}]}
  want = {"a": P("fsdp"), "b": [P(), {"c": P(None, "fsdp")}]}
  assert mesh_specs(logical, shapes, mesh) == want


@pytest.mark.parametrize(
  ("logical", "shape", "rules", "message"),
  [
    (P("embed"), (6,), {}, r"\['w'\]: dimension 0 \('embed'\) has size 6, .* by 4, .* fsdp"),
    (P("embed", "mlp"), (8, 8), {"mlp": "fsdp"}, r"the mesh axes \['fsdp'\] twice in \['w'\]"),
    (P("embed", "mlp"), (8,), {}, r"of \['w'\] has 2 names for shape \(8,\)"),
    (P("width"), (8,), {}, r"no entry for the logical axis 'width' of \['w'\]"),
  ],
)
def test_rejects_bad_leaves(logical, shape, rules, message):
  with pytest.raises(ValueError, match=message):
    spec_of(logical, shape, abstract(data=2, fsdp=4), dict(DEFAULT_RULES, **rules))


def test_named_shardings_place_arrays():
  mesh = make_mesh(fsdp=4)
  shardings = named_shardings(mesh, {"w": P("fsdp"), "g": P()})
  placed = jax.device_put({"w": np.arange(8.0), "g": np.ones(3)}, shardings)
  assert [s.data.shape for s in placed["w"].addressable_shards] == [(2,)] * 4
  assert placed["g"].sharding.is_fully_replicated


def test_batch_spec():
  assert batch_spec(make_mesh()) == P(("replica", "data", "fsdp"))
  assert batch_spec(abstract(data=2, tensor=2)) == P(("data",))
  assert batch_spec(abstract(tensor=2)) == P()


def test_shard_batch_constrains_the_compiler():
  mesh = make_mesh(data=2, fsdp=4)
  x = jax.device_put(np.ones((8, 4)), jax.NamedSharding(mesh, P()))
  got = jax.jit(lambda x: shard_batch(2 * x))(x)
  assert got.sharding.is_equivalent_to(jax.NamedSharding(mesh, P(("data", "fsdp"))), 2)
  np.testing.assert_array_equal(got, 2.0)


def test_gather_fsdp_constrains_the_compiler():
  mesh = make_mesh(fsdp=4)
  x = jax.device_put(np.ones((8, 4)), jax.NamedSharding(mesh, P(None, "fsdp")))
  got = jax.jit(lambda x: gather_fsdp(2 * x, 1))(x)
  assert got.sharding.is_fully_replicated


@pytest.mark.parametrize("rows", [3, 8])
def test_hints_do_nothing_without_a_mesh(rows):
  x = jnp.ones((rows, 4))
  lowered = jax.jit(lambda x: gather_fsdp(shard_batch(x), 1)).lower(x)
  assert "sharding_constraint" not in lowered.as_text()


def test_shard_batch_leaves_uneven_batches_alone():
  mesh = make_mesh(fsdp=4)
  x = jax.device_put(np.ones((6, 4)), jax.NamedSharding(mesh, P()))
  assert "sharding_constraint" not in jax.jit(shard_batch).lower(x).as_text()


def test_call_with_auto_axes_keeps_gradient_shardings():
  mesh = make_mesh(data=2, fsdp=2, axis_types=AxisType.Explicit)
  w = jax.device_put(np.arange(12.0).reshape(4, 3), jax.NamedSharding(mesh, P("fsdp")))
  x = jax.device_put(np.ones((8, 4)), jax.NamedSharding(mesh, P(("data", "fsdp"))))

  def matmul(w, x):  # as it stands, an error on Explicit axes: both sides use fsdp
    return x @ w

  def total(w, x):
    y = call_with_auto_axes(matmul, w, x, out_spec=P("data"))
    assert jax.typeof(y).sharding.spec == P("data", None)
    return jnp.square(y).sum() / 2

  grad = jax.jit(jax.grad(total))(w, x)
  want = np.ones((4, 8)) @ (np.ones((8, 4)) @ np.arange(12.0).reshape(4, 3))
  np.testing.assert_array_equal(grad, want)
  assert jax.typeof(grad).sharding.spec == P("fsdp", None)


def test_call_with_auto_axes_is_the_call_itself_on_automatic_axes():
  mesh = make_mesh(fsdp=2)
  x = jax.device_put(np.ones(4), jax.NamedSharding(mesh, P("fsdp")))
  traced = jax.make_jaxpr(lambda x: call_with_auto_axes(jnp.sin, x, out_spec=P()))(x)
  assert [eqn.primitive.name for eqn in traced.eqns] == ["sin"]
