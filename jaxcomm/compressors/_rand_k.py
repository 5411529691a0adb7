"""Rand-k: k values at random."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _values
from jaxcomm.compressors._base import Key, Payload, squared_norm
from jaxcomm.compressors._sparse import Index, Sparse


@dataclasses.dataclass(frozen=True)
class RandK(Sparse):
  r"""Keeps exactly k values, a uniform choice without replacement, times d / k: unbiased.

  .. math:: E\|C(x) - x\|^2 = (d / k - 1) \|x\|^2, \quad \omega = d / k - 1

  Unscaled the values stay as they are, which is contractive: E||C(x) - x||^2 = (1 - k / d) ||x||^2.
  With `ratio`, k = ceil(ratio d), and the constants hold at every size with d / k = 1 / ratio; with
  `k` there are none for all sizes, see `omega_at` and `alpha_at`. Values as bfloat16 are rounded
  stochastically if scaled (omega grows by 1.5e-5 d / k), else to nearest.

  With `shared_support` all devices draw the same places from the key that they share, and no
  indices are sent. Then `shared_key` is true: `compress` must not get a key that differs by
  device, and `decompress` needs the same key. Values of all devices may be summed as they are, k
  floats: `support`, `values`, a sum, and `expand`. But the errors of the devices are alike: the
  mean of n has omega, not omega / n.

  Payload for d elements: `values` float32[k] (or uint16[k], the bits of bfloat16), and without
  `shared_support` also `indices`, uint8[about k ceil(log2 d) / 8] (packed, see `_packing`) or
  int32[k] (plain).

  An array with NaN or Inf decodes to NaN on its support, whether or not the bad element is in it.
  The choice sorts d random numbers.

  Attributes:
    k: how many values; or
    ratio: share of the values, in (0, 1].
    index: "packed" or "plain".
    value_dtype: "float32" or "bfloat16".
    scaled: whether values are multiplied by d / k.
    shared_support: whether the places come from a key that all devices share.

  Raises:
    ValueError: a field outside these rules, k > d, no key, or `x` is not floating point.

  Source: Stich et al., Sparsified SGD with Memory (arXiv 1809.07599), definition 2.1.
  """

  scaled: bool = True
  shared_support: bool = False

  @property
  def unbiased(self) -> bool:
    return self.scaled

  @property
  def needs_key(self) -> bool:
    return True

  @property
  def shared_key(self) -> bool:
    return self.shared_support

  @property
  def sends_indices(self) -> bool:
    return not self.shared_support

  def gain(self, size: int) -> float:
    """d / k if scaled, else 1."""
    return size / self.num_kept(size) if self.scaled and size else 1.0

  def support(self, key: jax.Array, size: int) -> jax.Array:
    """Which of `size` elements are kept: int32[k], a uniform choice without replacement."""
    if size == 0:
      return jnp.zeros(0, jnp.int32)
    kept = self.num_kept(size)
    return jax.random.choice(key, size, (kept,), replace=False).astype(jnp.int32)

  def _support(self, key: Key, x_D: jax.Array) -> jax.Array:
    return self.support(key, x_D.size)

  def values(self, x_D: jax.Array, support_K: jax.Array) -> jax.Array:
    """The kept values of x_D, before scaling: float32[k]; NaN if x_D holds NaN or Inf."""
    return jnp.where(jnp.isfinite(x_D).all(), x_D[support_K], jnp.nan)

  def unpack_support(self, payload: Payload, size: int, key: Key) -> jax.Array:
    if self.sends_indices:
      return super().unpack_support(payload, size, key)
    return self.support(key, size)

  def _omega(self, size: float) -> float:
    if not self.scaled or self._share(size) == 0:
      return math.inf
    return (1 + _values.omega(self.value_dtype)) / self._share(size) - 1

  def _alpha(self, size: float) -> float:
    if self.scaled:
      return super()._alpha(size)
    return self._share(size) * _values.alpha(self.value_dtype)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """Scaled, d / k (||x||^2 + rounding) - ||x||^2; else its mean over what is kept or dropped."""
    total, share = squared_norm(x_D), self._share(x_D.size)
    rounding = _values.variance(x_D, self.value_dtype, self.rounds_up_and_down)
    if self.scaled:
      return (1 / share - 1) * total + rounding / share
    return (1 - share) * total + share * rounding

  def variance_of_mean(self, x_ND: jax.Array) -> jax.Array:
    """As in the base class; with a shared support that of the mean: (d / k - 1) ||mean x||^2."""
    if self.shared_support and self.scaled and self.value_dtype == "float32":
      return self.variance(x_ND.astype(jnp.float32).mean(0))
    return super().variance_of_mean(x_ND)


def rand_k(
  k: int | None = None,
  ratio: float | None = None,
  *,
  scaled: bool = True,
  shared_support: bool = False,
  index: Index = "packed",
  value_dtype: _values.ValueDtype = "float32",
) -> RandK:
  """k values at random: 4 bytes per value kept, and ceil(log2 d) / 8 for its place; see `RandK`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import rand_k
  >>> compressor, key = rand_k(2, shared_support=True), jax.random.key(0)
  >>> payload = compressor.compress(key, jnp.ones(8))  # the same key on all devices
  >>> sorted(compressor.decompress(payload, (8,), key=key).tolist())
  [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, 4.0]
  >>> compressor.payload_bytes((8,)), rand_k(2).payload_bytes((8,)), compressor.omega_at(8)
  (8, 10, 3.0)
  """
  return RandK(k, ratio, index, value_dtype, scaled, shared_support)
