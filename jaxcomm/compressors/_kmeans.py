"""Lloyd's k-means of numbers, with fixed shapes and a fixed number of iterations."""

import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import check_float

# Beyond this, sums of up to 2^31 numbers and the width of the range could leave float32.
_LARGE = 2.0**90


def kmeans_1d(
  x: jax.Array, num_clusters: int = 3, num_iters: int = 4, *, pin_zero: bool = True
) -> tuple[jax.Array, jax.Array]:
  r"""Replaces numbers by the labels of `num_clusters` centroids.

  Lloyd's iteration from equally spaced centroids between min x and max x:

  .. math:: \ell_i = \mathrm{nearest}(c, x_i), \quad
    c_k = \mathrm{mean}\{x_i : \ell_i = k\}

  `num_iters` times; the labels are those of the last assignment, so that each centroid is the mean
  of its members and the sum of x is kept. Ties go to the lower label; an empty cluster keeps its
  centroid. If x has at most `num_clusters` distinct values, the centroids are these values and
  nothing is lost. NaN or Inf anywhere in x makes all centroids NaN.

  Args:
    x: any shape, floating point; computed in float32.
    num_clusters: K, 1 to 255.
    num_iters: assignments, at least 1.
    pin_zero: if x holds zeros, the centroid of their cluster stays 0 in every iteration, so that
      they decode to 0. Without, small values share the zeros' cluster and pull it away.

  Returns:
    labels, uint8, of the shape of x; and centroids, float32[K], ascending.

  Raises:
    ValueError: `num_clusters` or `num_iters` outside these rules, or `x` is not floating point.

  Source: Malekijoo et al., FedZip, arXiv 2102.01593, with the plain mean for every cluster; pinning
  and the case of few values are ours.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import kmeans_1d
    >>> labels, centroids = kmeans_1d(jnp.asarray([0.0, 4.0, 0.0, -3.0, 4.5, 0.0]))
    >>> labels.tolist(), centroids.tolist()
    ([1, 2, 1, 0, 2, 1], [-3.0, 0.0, 4.25])
  """
  check_clusters(num_clusters, num_iters)
  check_float(x)
  if x.size == 0:
    return jnp.zeros(x.shape, jnp.uint8), jnp.zeros(num_clusters, jnp.float32)
  flat = x.reshape(-1).astype(jnp.float32)
  absmax = jnp.max(jnp.abs(flat))
  scale = jnp.where(absmax > _LARGE, jnp.float32(2.0**-64), jnp.float32(1))
  y = flat * scale  # a power of two: exact
  values, few = _distinct(y, num_clusters)
  lloyd, middles = _lloyd(y, num_clusters, num_iters, pin_zero)
  centroids = jnp.where(few, values, lloyd)
  # Among few values each one is its own border: a middle of two neighbours may round to either.
  labels = _nearest(y, jnp.where(few, values[:-1], middles))
  centroids = jnp.where(jnp.isfinite(absmax), centroids / scale, jnp.nan)
  return labels.astype(jnp.uint8).reshape(x.shape), centroids


def check_clusters(num_clusters: int, num_iters: int) -> None:
  """Raises ValueError unless labels fit a byte and there is at least one assignment."""
  for name, value, most in (("num_clusters", num_clusters, 255), ("num_iters", num_iters, None)):
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not integer or value < 1 or (most is not None and value > most):
      rule = f"an integer in 1..{most}" if most else "an integer of at least 1"
      raise ValueError(f"`{name}` must be {rule}, got {value!r}.")


def _lloyd(
  y: jax.Array, num_clusters: int, num_iters: int, pin_zero: bool
) -> tuple[jax.Array, jax.Array]:
  """Centroids after all iterations, and the borders of the last assignment."""
  start = jnp.linspace(jnp.min(y), jnp.max(y), num_clusters)
  pinned = jnp.arange(num_clusters) == jnp.argmin(jnp.abs(start))
  pinned &= jnp.any(y == 0) if pin_zero else False

  def pin(centroids):
    return jnp.where(pinned, 0.0, centroids)

  def iterate(centroids):
    middles = (centroids[:-1] + centroids[1:]) / 2
    return pin(_means(y, _nearest(y, middles), centroids)), middles

  centroids = jax.lax.fori_loop(0, num_iters - 1, lambda _, c: iterate(c)[0], pin(start))
  return iterate(centroids)


def _nearest(y: jax.Array, borders: jax.Array) -> jax.Array:
  """int32 labels: how many of the ascending borders lie below y."""
  return jnp.searchsorted(borders, y, side="left", method="compare_all")


def _means(y: jax.Array, labels: jax.Array, centroids: jax.Array) -> jax.Array:
  """Mean of each cluster, from distances to the old centroid: less cancellation."""
  member_KN = labels[None] == jnp.arange(centroids.size)[:, None]
  counts = jnp.sum(member_KN, axis=1)
  shift = _sum_rows(jnp.where(member_KN, y[None] - centroids[:, None], 0.0))
  return centroids + shift / jnp.maximum(counts, 1).astype(jnp.float32)


def _sum_rows(x_KN: jax.Array, block: int = 256) -> jax.Array:
  """Sums [K], pairwise above `block` elements: the error grows with log N instead of N."""
  num_blocks = 1 << (-(-x_KN.shape[1] // block) - 1).bit_length()
  x_KN = jnp.pad(x_KN, ((0, 0), (0, num_blocks * block - x_KN.shape[1])))
  sums_KB = x_KN.reshape(-1, num_blocks, block).sum(2)
  while sums_KB.shape[1] > 1:
    half = sums_KB.shape[1] // 2
    sums_KB = sums_KB[:, :half] + sums_KB[:, half:]
  return sums_KB[:, 0]


def _distinct(y: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
  """The `num` smallest distinct values, the last one repeated, and whether there are no more."""

  def next_value(value, _):
    above = jnp.min(jnp.where(y > value, y, jnp.inf))
    return jnp.where(jnp.isinf(above), value, above), value

  last, values = jax.lax.scan(next_value, jnp.min(y), length=num)
  return values, last == values[-1]
