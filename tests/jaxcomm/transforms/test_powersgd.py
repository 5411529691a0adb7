"""PowerSGD against an independent float64 implementation, and against what theory says of it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import _axes, powersgd_mean
from jaxcomm.inspect import collective_bytes
from jaxcomm.transforms import powersgd_bytes
from jaxcomm.transforms._matrices import MatrixView

FIXTURE = np.load(pathlib.Path(__file__).parent / "fixtures" / "powersgd.npz")
P = jax.P


def replicas_mesh(num):
  auto = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((num,), ("replica",), axis_types=auto, devices=jax.devices()[:num])


def from_right(tx, grads, right):
  """A state that starts from this right factor of leaf "w"."""
  state = tx.init(jax.tree.map(lambda g: jnp.asarray(g[0, 0]), grads))
  return state._replace(right={**state.right, "w": jnp.asarray(right.T)})


@pytest.mark.parametrize(
  "rank", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_follows_torchs_hook(roll_out, rank):
  """Four workers, five steps, error feedback, warm start, from a given right factor."""
  tx = powersgd_mean("replica", rank, error="global", min_compression_rate=1.0)
  grads = {"w": FIXTURE["gradients"], "b": FIXTURE["gradients"][..., 0]}
  state = from_right(tx, grads, FIXTURE[f"right_{rank}"])
  means, state = roll_out(tx, grads, context="shard_map", state=state, differs=("residual",))
  np.testing.assert_array_equal(means["w"], np.broadcast_to(means["w"][:1], means["w"].shape))
  np.testing.assert_allclose(means["w"][0], FIXTURE[f"results_{rank}"], atol=1e-5, rtol=0)
  residual = state.residual["w"]
  np.testing.assert_allclose(residual, FIXTURE[f"residuals_{rank}"], atol=1e-5, rtol=0)
  # Vectors go uncompressed: the exact mean, nothing owed.
  np.testing.assert_allclose(means["b"][0], grads["b"].astype(np.float64).mean(0), atol=1e-6)
  assert state.residual["b"] == optax.MaskedNode()


def test_the_local_error_gives_the_same_means(roll_out):
  """And residuals of the same mean, without the differences that "global" piles up."""
  tx = powersgd_mean("replica", 2, min_compression_rate=1.0)
  grads = {"w": FIXTURE["gradients"]}
  state = from_right(tx, grads, FIXTURE["right_2"])
  means, state = roll_out(tx, grads, state=state)
  np.testing.assert_allclose(means["w"][0], FIXTURE["results_2"], atol=1e-5, rtol=0)
  want = FIXTURE["residuals_2"]
  np.testing.assert_allclose(state.residual["w"].mean(0), want.mean(0), atol=1e-5, rtol=0)
  assert np.std(state.residual["w"], axis=0).mean() < 0.8 * np.std(want, axis=0).mean()


OPTIONS = {
  "alternating": {"variant": "alternating"},
  "cold": {"warm_start": False},
  "late": {"start_step": 2},
}


@pytest.mark.parametrize(
  "name", ["alternating", *(pytest.param(n, marks=pytest.mark.slow) for n in ("cold", "late"))]
)
def test_error_feedback_loses_nothing(roll_out, name):
  """sum_t mean_t + mean residual = sum_t mean gradient; exact means before `start_step`."""
  tx = powersgd_mean("replica", 2, min_compression_rate=1.0, **OPTIONS[name])
  means, state = roll_out(tx, FIXTURE["gradients"])
  want = FIXTURE["gradients"].astype(np.float64).mean(0)
  total = means[0].sum(0) + state.residual.mean(0)
  np.testing.assert_allclose(total, want.sum(0), atol=2e-5)
  off, start = np.abs(means[0] - want).max((1, 2)), OPTIONS[name].get("start_step", 0)
  assert (off[start:] > 0.1).all()
  assert (off[:start] < 1e-6).all()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two_sided", "alternating"])
def test_warm_start_converges_to_the_best_projector(roll_out, variant):
  fixed = FIXTURE["gradients"][:2, :1]
  tx = powersgd_mean("replica", 2, variant=variant, error_feedback=False, min_compression_rate=1.0)
  means, _ = roll_out(tx, np.repeat(fixed, 120, 1))
  u, s, vt = np.linalg.svd(fixed[:, 0].astype(np.float64).mean(0))
  best = (u[:, :2] * s[:2]) @ vt[:2]
  np.testing.assert_allclose(means[0, -1], best, atol=1e-4)
  assert np.abs(means[0, 0] - best).max() > 0.1


@pytest.mark.slow
def test_matrices_of_the_rank_are_exact(roll_out):
  rng = np.random.default_rng(0)
  grads = {
    "low": rng.normal(size=(2, 1, 12, 3)) @ rng.normal(size=(3, 10)),  # a row space in common
    "small": rng.normal(size=(2, 1, 3, 10)),
  }
  grads = {k: g.astype(np.float32) for k, g in grads.items()}
  means, _ = roll_out(powersgd_mean("replica", 3, min_compression_rate=0.5), grads)
  for k, g in grads.items():
    np.testing.assert_allclose(means[k][0], g.mean(0), atol=1e-5)


def test_zero_gradients_do_not_lose_the_warm_start(roll_out):
  grads = np.zeros((2, 3, 12, 10), np.float32)
  grads[:, 2, 5, 7] = 1.0  # orthogonal to the unit vectors that QR makes of zeros
  means, _ = roll_out(powersgd_mean("replica", 1, error_feedback=False), grads)
  np.testing.assert_allclose(means[0], grads[0], atol=1e-6)


@pytest.mark.slow
def test_stacked_matrices_are_compressed_one_by_one(roll_out):
  """Layers of a scan: the same as a leaf for each, from the same first factors."""
  grads = np.random.default_rng(1).normal(size=(2, 2, 3, 5, 5, 2)).astype(np.float32)
  view = MatrixView(grads.shape[2:], stacked=1)
  assert (view.num_matrices, view.rows, view.columns) == (3, 5, 10)
  tx = powersgd_mean("replica", 1, stacked=1, min_compression_rate=1.0)
  state = tx.init(jnp.zeros(grads.shape[2:]))
  means, _ = roll_out(tx, grads, state=state)

  layers = {str(i): grads[:, :, i].reshape(2, 2, 5, 10) for i in range(3)}
  tx = powersgd_mean("replica", 1, min_compression_rate=1.0)
  first = tx.init(jax.tree.map(lambda g: jnp.zeros(g.shape[2:]), layers))
  first = first._replace(right={k: state.right[int(k)].reshape(1, 10) for k in layers})
  want, _ = roll_out(tx, layers, state=first)
  for i in range(3):
    np.testing.assert_allclose(means[:, :, i].reshape(2, 2, 5, 10), want[str(i)], atol=1e-5)


@pytest.mark.slow
def test_alternating_sends_one_factor_at_a_time():
  tx = powersgd_mean("replica", 2, variant="alternating")
  grads = jnp.ones((24, 20))
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((4,), ("replica",), axis_types=auto, devices=jax.devices()[:4])
  fun = jax.shard_map(
    lambda g, s: tx.update(_axes.vary(g, "replica"), s)[0], mesh=mesh, in_specs=P(), out_specs=P()
  )
  report = collective_bytes(jax.jit(fun).lower(grads, tx.init(grads)).compile(), mesh)
  assert (report.always, report.total) == (1.5 * 4 * 2 * 20, 1.5 * 4 * 2 * 24)
  assert report.amortised(2) == powersgd_bytes((24, 20), 4, 2, variant="alternating")


def test_the_state_tells_exact_updates(roll_out):
  tx = powersgd_mean("replica", start_step=2)
  for num_updates, exact in ((2, True), (3, False)):
    _, state = roll_out(tx, np.ones((2, num_updates, 3), np.float32))
    assert (state.exact == exact).all()


def test_a_state_for_other_shards_is_refused():
  tx = powersgd_mean("replica", 1, min_compression_rate=1.0, specs={"w": P("fsdp")})
  mesh = jax.sharding.AbstractMesh((2, 2), ("replica", "fsdp"))
  state = tx.init({"w": jnp.ones((8, 6))})
  update = jax.shard_map(
    lambda s, g: tx.update(g, s)[0],
    mesh=mesh,
    in_specs=(P(), P()),
    out_specs=P(),
    axis_names={"replica"},
    check_vma=False,
  )
  with pytest.raises(ValueError, match=r"`specs` and `mesh` must be .* got \(1, 6\)"):
    jax.eval_shape(update, state, {"w": jnp.ones((8, 6))})


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"rank": 0}, r"`rank` must be an integer >= 1, got 0"),
    ({"start_step": -1}, r"`start_step` must be an integer >= 0, got -1"),
    ({"variant": "epfml"}, r"`variant` must be .* got 'epfml'"),
    ({"error": "mean"}, r"`error` must be .* got 'mean'"),
    ({"error": "global", "error_feedback": False}, r"`error` has no effect"),
    ({"variant": "alternating", "warm_start": False}, r"`warm_start` must be True"),
    ({"stacked": {"w": -1}}, r"`stacked` must be an integer >= 0, got -1"),
    ({"min_compression_rate": 0}, r"`min_compression_rate` must be positive, got 0"),
  ],
)
def test_rejects_bad_options(kwargs, message):
  with pytest.raises(ValueError, match=message):
    powersgd_mean("replica", **kwargs)
