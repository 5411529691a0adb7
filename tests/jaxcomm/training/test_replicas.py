"""Named changes of the number of replicas, against NumPy, leaf by leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import pmean_over
from jaxcomm.training import average_replicas, broadcast_replica, make_train_step
from parallel import make_mesh


def _local_statistics():
  """A transform whose state differs per replica, in all kinds of dtypes."""

  def init(params):
    del params
    return {"seen": jnp.zeros((3,), jnp.int32), "low": jnp.zeros((2, 3), jnp.bfloat16),
            "any": jnp.zeros((), jnp.bool_), "shared": jnp.zeros((3,))}  # fmt: skip

  def update(updates, state, params=None):
    del params
    g = updates["w"]
    mean = pmean_over("replica").update(g, optax.EmptyState())[0]
    return {"w": g}, {
      "seen": state["seen"] + (g > 0).astype(jnp.int32),
      "low": state["low"] + g.astype(jnp.bfloat16)[None],
      "any": state["any"] | (g > 0).any(),
      "shared": state["shared"] + mean,
    }

  return optax.GradientTransformation(init, update)


def layout_of(replicas, stacked=False):
  mesh = make_mesh(
    replica=1 if stacked else replicas, devices=jax.devices()[: 1 if stacked else replicas]
  )

  def loss(params, batch):
    return jnp.sum(params["w"]) + 0.0 * jnp.sum(batch), {}

  init = lambda key: {"w": jnp.zeros((3,))}  # noqa: E731
  step = make_train_step(loss, init, _local_statistics(), mesh, num_replicas=replicas)
  return step.layout


def saved_state(layout):
  """Every leaf random, and different on every replica where it has a replica axis."""
  rng = np.random.default_rng(0)

  def draw(shape, varies):
    x = rng.normal(size=shape.shape) * 5
    if shape.dtype == jnp.bool_:
      return jnp.asarray(x > 0).at[0].set(True)
    if jnp.issubdtype(shape.dtype, jnp.integer):
      equal = np.broadcast_to(np.round(x[:1] if varies else x), shape.shape)
      return jnp.asarray(equal, shape.dtype)
    return jnp.asarray(x, shape.dtype)

  return jax.tree.map(draw, layout.shapes, layout.varying)


def test_the_layout_knows_what_differs():
  varying = layout_of(4).varying
  assert varying.params == {"w": True}
  assert varying.opt_state == {"seen": True, "low": True, "any": True, "shared": False}
  assert varying.step is False


@pytest.mark.parametrize(("old", "new", "stacked"), [(4, 2, 0), (2, 4, 0), (4, 1, 0), (4, 8, 1)])
def test_average_is_the_mean_of_floats_and_the_first_of_the_rest(old, new, stacked):
  there, state = layout_of(new, bool(stacked)), saved_state(layout_of(old))
  got = average_replicas(state, there)

  def check(shape, before, after, varies):
    assert (after.shape, after.dtype, after.sharding) == (shape.shape, shape.dtype, shape.sharding)
    before, after = np.asarray(before), np.asarray(after)
    if not varies:
      return np.testing.assert_array_equal(after, before)
    if not jnp.issubdtype(shape.dtype, jnp.floating):
      want = before[0]
    else:
      want = before.astype(np.float64).mean(0)
    for r in range(new):
      tolerance = 2**-8 if shape.dtype == jnp.bfloat16 else 1e-6
      x = after[r].astype(np.float64)
      np.testing.assert_allclose(x, want, rtol=tolerance, atol=tolerance)
      np.testing.assert_array_equal(after[r], after[0])  # to the bit

  jax.tree.map(check, there.shapes, state, got, there.varying)


@pytest.mark.parametrize("index", [0, 2, 3])
@pytest.mark.parametrize(("new", "stacked"), [(2, 0), (8, 0), (2, 1)])
def test_broadcast_copies_one_replica_to_the_bit(index, new, stacked):
  there, state = layout_of(new, bool(stacked)), saved_state(layout_of(4))
  got = broadcast_replica(state, there, index=index)

  def check(shape, before, after, varies):
    assert (after.shape, after.dtype, after.sharding) == (shape.shape, shape.dtype, shape.sharding)
    want = np.broadcast_to(before[index], shape.shape) if varies else before
    np.testing.assert_array_equal(np.asarray(after), np.asarray(want))

  jax.tree.map(check, there.shapes, state, got, there.varying)


def test_bfloat16_is_averaged_in_float32():
  """256 + 1 is 256 in bfloat16: a mean taken there would lose the small ones."""
  there, state = layout_of(2), saved_state(layout_of(4))
  low = jnp.asarray([256.0, 1.0, 1.0, 2.0], jnp.bfloat16)[:, None, None] * jnp.ones((1, 2, 3))
  state = state.replace(opt_state={**state.opt_state, "low": low.astype(jnp.bfloat16)})
  got = average_replicas(state, there).opt_state["low"]
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(got, np.float32), 65.0)


@pytest.mark.parametrize("index", [-1, 4])
def test_broadcast_rejects_a_replica_that_was_not_saved(index):
  with pytest.raises(ValueError, match=rf"`index` must be in \[0, 4\).* got {index}"):
    broadcast_replica(saved_state(layout_of(4)), layout_of(2), index=index)
