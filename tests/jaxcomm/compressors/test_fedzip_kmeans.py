"""k-means of numbers: an independent Lloyd in float64, and what must be kept."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import kmeans_1d, top_z

SIZE = 600


@functools.cache
def compiled(num_clusters, num_iters, pin_zero):
  def cluster(x):
    return kmeans_1d(x, num_clusters, num_iters, pin_zero=pin_zero)

  return jax.jit(cluster)


def cluster(x, num_clusters=3, num_iters=4, pin_zero=False):
  out = compiled(num_clusters, num_iters, pin_zero)(np.asarray(x, np.float32))
  return jax.tree.map(np.asarray, out)


def lloyd(x, num_clusters, num_iters, pin_zero):
  """Element by element: nearest centroid (ties to the lower one), then means; empty ones stay."""
  x = np.asarray(x, np.float64)
  centroids = np.linspace(x.min(), x.max(), num_clusters)
  zero = np.abs(centroids).argmin()
  for _ in range(num_iters):
    if pin_zero:
      centroids[zero] = 0
    labels = np.abs(x[:, None] - centroids).argmin(1)
    for k in set(labels.tolist()):
      centroids[k] = x[labels == k].mean()
  if pin_zero:
    centroids[zero] = 0
  return labels, centroids


def sparse(seed, skew=0.0):
  """A tenth of the values is not zero; long tails, so that small ones come close to zero."""
  x = np.random.default_rng(seed).normal(size=SIZE) ** 3 + skew
  return np.where(np.abs(x) >= np.quantile(np.abs(x), 0.9), x, 0).astype(np.float32)


@pytest.mark.parametrize(
  ("num_clusters", "num_iters", "pin_zero"),
  [
    (3, 4, False),
    (3, 4, True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in ((1, 5, False), (1, 1, True), (16, 1, False), (16, 5, True))
    ),
  ],
)
def test_equals_lloyd(num_clusters, num_iters, pin_zero):
  for seed, skew in ((0, 0.0), (1, 2.0), (2, -5.0)):
    x = sparse(seed, skew)
    labels, centroids = cluster(x, num_clusters, num_iters, pin_zero)
    want_labels, want = lloyd(x, num_clusters, num_iters, pin_zero)
    np.testing.assert_array_equal(labels, want_labels)
    np.testing.assert_allclose(centroids, want, rtol=1e-6, atol=2e-6 * np.abs(x).max())
    if pin_zero:
      assert not np.any(centroids[labels[x == 0]])
    elif num_clusters == 3:
      assert np.all(centroids[labels[x == 0]])  # small values share the cluster of the zeros


@pytest.mark.slow
def test_equals_scikit_learn():
  sklearn = pytest.importorskip("sklearn.cluster")
  x = sparse(3, 1.0)
  start = np.linspace(x.min(), x.max(), 3)[:, None]
  model = sklearn.KMeans(3, init=start, n_init=1, max_iter=4, tol=0, algorithm="lloyd")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it has not converged
    want = model.fit(x[:, None].astype(np.float64)).cluster_centers_[:, 0]
  np.testing.assert_allclose(cluster(x)[1], want, rtol=1e-6, atol=2e-6 * np.abs(x).max())


@pytest.mark.slow
def test_the_error_never_grows_with_iterations():
  x = sparse(4)
  for pin_zero in (False, True):
    errors = []
    for num_iters in (1, 4, 8):
      labels, centroids = cluster(x, 3, num_iters, pin_zero)
      errors.append(((x - centroids[labels]).astype(np.float64) ** 2).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_means_are_kept():
  """Each centroid is the mean of its members, also among values far from zero."""
  x = (1e4 + np.random.default_rng(5).normal(size=SIZE)).astype(np.float32)
  labels, centroids = cluster(x)
  for k in range(3):
    want = x[labels == k].astype(np.float64).mean()
    assert centroids[k] == pytest.approx(want, rel=2**-22)
  decoded = centroids[labels].astype(np.float64).sum()
  assert decoded == pytest.approx(x.astype(np.float64).sum(), rel=2**-22)


def test_means_of_many_equal_signs():
  """2^20 values: a sum in float32 from left to right would err in the third digit."""
  x = np.random.default_rng(6).uniform(0.5, 1.5, 2**20).astype(np.float32)
  (centroid,) = jax.jit(lambda x: kmeans_1d(x, 1, 1)[1])(x)
  assert float(centroid) == pytest.approx(x.astype(np.float64).mean(), rel=1e-6)


@pytest.mark.parametrize(
  "values", [[2.5], [0.0], [0.0, 0.01, 1.0], [1.0, np.nextafter(1, 2, dtype=np.float32), 1e30]]
)
def test_few_values_are_exact(values):
  """Lloyd from equally spaced centroids would merge the two near ones."""
  x = np.resize(np.asarray(values, np.float32), SIZE)
  labels, centroids = cluster(x, 3)
  np.testing.assert_array_equal(centroids[labels], x)
  assert (np.diff(centroids) >= 0).all()


def test_ends_of_float32():
  x = np.asarray([1.0, 0.9, 0.1, 0.0, -0.8, -1.0] * 100, np.float32)
  want_labels, want = cluster(x)
  for factor in (1e-30, 1e30, 3e38):
    labels, centroids = cluster(x * np.float32(factor))
    np.testing.assert_array_equal(labels, want_labels)
    np.testing.assert_allclose(centroids / np.float32(factor), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_not_hidden(bad):
  x = sparse(7)
  x[17] = bad
  for pin_zero in (False, True):
    assert np.isnan(cluster(x, 3, 4, pin_zero)[1]).all()


def test_shapes():
  labels, centroids = jax.eval_shape(kmeans_1d, jnp.zeros((2, 0, 3)))
  assert (labels.shape, labels.dtype, centroids.shape) == ((2, 0, 3), jnp.uint8, (3,))
  assert jax.jit(kmeans_1d)(jnp.zeros((0,)))[1].tolist() == [0.0] * 3
  labels, centroids = jax.jit(kmeans_1d)(jnp.full((1, 1), 3.0, jnp.bfloat16))
  assert (labels.shape, labels.item(), centroids[0]) == ((1, 1), 0, 3.0)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"num_clusters": 0}, "`num_clusters` must be an integer in 1..255, got 0"),
    ({"num_clusters": 256}, "`num_clusters` must be an integer in 1..255, got 256"),
    ({"num_iters": 0}, "`num_iters` must be an integer of at least 1, got 0"),
    ({"x": np.arange(3)}, "`x` must have a floating-point dtype"),
  ],
)
def test_bad_input(kwargs, message):
  with pytest.raises(ValueError, match=message):
    kmeans_1d(**{"x": jnp.ones(3), **kwargs})


@pytest.mark.parametrize("z", [0.01, 0.2, 0.5, 1.0])
def test_top_z_keeps_exactly_the_largest(z):
  rng = np.random.default_rng(8)
  for x in (rng.normal(size=SIZE), np.ones(SIZE), rng.integers(-3, 4, SIZE)):
    x = x.astype(np.float32)
    values, mask = map(np.asarray, jax.jit(lambda x: top_z(x, z))(x))
    kept = SIZE - round(SIZE * (1 - z))
    assert mask.sum() == kept
    np.testing.assert_array_equal(values, np.where(mask, x, 0))
    order = np.argsort(-np.abs(x), kind="stable")  # of equals the first
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:kept]))
    lost = ((x - values).astype(np.float64) ** 2).sum()
    assert lost == pytest.approx((x[order[kept:]].astype(np.float64) ** 2).sum())


def test_top_z_keeps_at_least_one():
  assert jax.jit(lambda x: top_z(x, 0.001))(jnp.asarray([1.0, -2.0]))[1].tolist() == [False, True]


@pytest.mark.parametrize("z", [0, -0.1, 1.5, float("nan"), "half", True])
def test_top_z_rejects(z):
  with pytest.raises(ValueError, match=r"`z` must be a number in \(0, 1\], got"):
    top_z(jnp.ones(3), z)
