"""FedZip as an optax transform: updates as the server will decode them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.compressors import fedzip_compress, fedzip_decompress
from jaxcomm.transforms._checks import check_floating


class FedZipState(NamedTuple):
  """State of `fedzip`.

  Attributes:
    residual: like the parameters, float32, differs per client: what compression still owes.
      `optax.EmptyState()` without error feedback.
  """

  residual: Any


def fedzip(
  z: Any = 0.2,
  num_clusters: int = 3,
  *,
  num_iters: int = 4,
  pin_zero: bool = True,
  min_size: int = 16,
  error_feedback: bool = False,
) -> optax.GradientTransformation:
  r"""A client's update after Top-z, k-means and decoding, optionally with error feedback.

  .. math:: u = D(C(g + e)), \quad e' = g + e - u

  For updates that are the change of the parameters over a client's local steps (FedAvg) or its
  mean gradient (FedSGD); before the mean over clients and the outer optimizer:
  `optax.chain(fedzip(0.01, error_feedback=True), pmean_over("clients"), optax.sgd(1.0))`.

  Wire: nothing by itself. The message of a client is `fedzip_codec.encode(fedzip_compress(g + e))`,
  `fedzip_bytes` long, about 4 d / 32 bytes at z = 0.2; a mean inside a mesh sends float32 unless it
  compresses by itself. NaN or Inf in a leaf makes that leaf NaN.

  Per client: `residual`. A restore needs the same clients.

  Args:
    z: share to keep, in (0, 1], or a tree of shares, a prefix of the updates.
    num_clusters: K, 1 to 255.
    num_iters: of k-means.
    pin_zero: pruned elements decode to exactly 0.
    min_size: leaves with fewer elements pass unchanged.
    error_feedback: keep what compression lost and add it to the next input. The paper has none;
      below z = 0.1 training needs it.

  Raises:
    ValueError: an argument outside these rules (in update), or an update that is not float32,
      bfloat16 or float16.

  References:
    Malekijoo et al., FedZip, https://arxiv.org/abs/2102.01593.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.transforms import fedzip
    >>> tx = fedzip(0.5, min_size=2, error_feedback=True)
    >>> updates, state = tx.update(jnp.asarray([4.0, 1.0]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), state.residual.tolist()
    ([4.0, 0.0], [0.0, 1.0])
  """

  def init_fn(params):
    check_floating("params", params)
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    return FedZipState(zeros if error_feedback else optax.EmptyState())

  def update_fn(updates, state, params=None):
    del params
    check_floating("updates", updates)
    h = optax.tree.cast(updates, jnp.float32)
    if error_feedback:
      h = optax.tree.add(h, state.residual)
    small = fedzip_compress(
      h, z, num_clusters, num_iters=num_iters, pin_zero=pin_zero, min_size=min_size
    )
    out = jax.tree.map(lambda u, g: u.astype(g.dtype), fedzip_decompress(small), updates)
    if not error_feedback:
      return out, state
    return out, FedZipState(jax.tree.map(lambda a, u: a - u.astype(jnp.float32), h, out))

  return optax.GradientTransformation(init_fn, update_fn)
