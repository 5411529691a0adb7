"""What every compressor is: a value with static fields that turns an array into a message."""

import abc
import math
from typing import Any

import jax
import jax.numpy as jnp

Payload = dict[str, Any]
"""Arrays by name; those of a composed compressor are nested."""


Key = Any
"""A `jax.random` key, or None where nothing is drawn."""


class Compressor(abc.ABC):
  """A map from arrays to messages (payloads) and back, with its constants.

  The two classes of convergence theory, for every finite array x:

  - unbiased, U(omega): E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2;
  - contractive, B(alpha): E||C(x) - x||^2 <= (1 - alpha) ||x||^2, with 0 < alpha <= 1.

  Other papers write q = 1 + omega or delta = 1 / alpha. The constants leave out what float32 itself
  loses: its rounding (2^-24 relative per operation), and numbers outside of the range that a class
  states.

  Implementations are frozen dataclasses whose fields are static, so they hash and compare by
  value and may be closed over by `jax.jit`. All arithmetic is float32. An instance holds no
  state; what a method carries between calls (error feedback) belongs to the method. NaN and Inf
  are never hidden: what they touch decodes to NaN or Inf.

  A new compressor writes `_encode`, `_decode` and `_num_bytes`; `_omega` and `unbiased`, or
  `_alpha`; `needs_key` and `_variance` if it draws random numbers; and `shared_key` if all devices
  must draw the same.
  """

  @property
  def unbiased(self) -> bool:
    """Whether E C(x) = x."""
    return False

  @property
  def needs_key(self) -> bool:
    """Whether `compress` draws random numbers."""
    return False

  @property
  def shared_key(self) -> bool:
    """Whether all devices must give `compress` the same key, and `decompress` needs it too."""
    return False

  @property
  def omega(self) -> float | None:
    """Variance constant for every size; None if biased, or if it grows with the size."""
    return self._omega_or_none(math.inf)

  @property
  def alpha(self) -> float | None:
    """Contraction constant for every size; None when none is known to hold for all."""
    return self._alpha_or_none(math.inf)

  @property
  def q(self) -> float | None:
    """1 + omega: E||C(x)||^2 <= q ||x||^2."""
    return None if self.omega is None else 1 + self.omega

  @property
  def delta(self) -> float | None:
    """1 / alpha."""
    return None if self.alpha is None else 1 / self.alpha

  def omega_at(self, size: int) -> float | None:
    """`omega` for arrays of `size` elements; None if biased."""
    return self._omega_or_none(size)

  def alpha_at(self, size: int) -> float | None:
    """`alpha` for arrays of `size` elements; None when none is known."""
    return self._alpha_or_none(size)

  def compress(self, key: jax.Array | None, x: jax.Array) -> Payload:
    """The message for `x` (any shape, float dtype): exactly the arrays that cross the wire.

    `key` is a `jax.random` key; None is allowed where the compressor draws nothing. Raises
    ValueError if the key is missing, `x` is not floating point, or a field does not fit its size.
    """
    check_float(x)
    if key is None and self.needs_key:
      raise ValueError(f"`key` must be a jax.random key for {self}, got None.")
    return self._encode(key, _flat(x))

  def decompress(
    self,
    payload: Payload,
    shape: tuple[int, ...],
    dtype: Any = jnp.float32,
    *,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """The array of `shape` and `dtype` that `payload` stands for.

    `key` is the one given to `compress`; it is read only where `shared_key` is true.
    """
    if key is None and self.shared_key:
      raise ValueError(f"`key` must be the key that {self} compressed with, got None.")
    size = math.prod(shape)
    if size == 0:
      return jnp.zeros(shape, dtype)
    return self._decode(payload, size, key).reshape(shape).astype(dtype)

  def payload_bytes(self, shape: tuple[int, ...], dtype: Any = jnp.float32) -> int:
    """Exact size in bytes of the payload of an array of `shape`, whatever its dtype."""
    del dtype
    return self._num_bytes(math.prod(shape))

  def variance(self, x: jax.Array) -> jax.Array:
    """E||C(x) - x||^2 given x, exact but for float32 rounding: float32[], any shape of `x`.

    The square of the error for compressors that draw nothing. Squares of magnitudes outside of
    1e-19 to 1e19 leave float32. Raises ValueError for compositions that have no closed form.
    """
    check_float(x)
    return self._variance(_flat(x))

  def omega_of_mean(self, num_inputs: int, size: int | None = None) -> float:
    """omega of the mean of `num_inputs` independent compressions of equal inputs: omega / n.

    In general E||mean C(x_i) - mean x_i||^2 <= omega / n^2 sum ||x_i||^2. Devices that share a key
    err alike: no gain, omega stays. Raises ValueError for biased compressors.
    """
    omega = self._omega(math.inf if size is None else size)
    if math.isinf(omega):
      raise ValueError(f"`omega_of_mean` needs an unbiased compressor with an omega, got {self}.")
    return omega if self.shared_key else omega / num_inputs

  def variance_of_mean(self, x_ND: jax.Array) -> jax.Array:
    """E||mean C(x_i) - mean x_i||^2 over the rows of x_ND, compressed independently: float32[].

    Raises ValueError for biased compressors, whose errors do not cancel, and for shared keys.
    """
    if not self.unbiased or self.shared_key:
      raise ValueError(f"`variance_of_mean` needs independent unbiased errors, got {self}.")
    return jax.vmap(self.variance)(x_ND).sum() / x_ND.shape[0] ** 2

  # What a compressor writes; sizes are numbers of elements, x_D is flat and float32.

  @abc.abstractmethod
  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    """The payload of x_D, also of size 0."""

  @abc.abstractmethod
  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    """float32[size], for size > 0."""

  @abc.abstractmethod
  def _num_bytes(self, size: int) -> int:
    """Bytes of the payload of `size` elements."""

  def _omega(self, size: float) -> float:
    """omega at `size`, which may be inf: then for every size. inf stands for no constant."""
    del size
    return math.inf

  def _alpha(self, size: float) -> float:
    """alpha at `size`, which may be inf: then for every size. 0 stands for no constant."""
    return max(0.0, 1 - self._omega(size))

  def _variance(self, x_D: jax.Array) -> jax.Array:
    if self.needs_key:
      raise ValueError(f"`variance` has no closed form for {self}.")
    return squared_norm(self._roundtrip(None, x_D) - x_D)

  def _roundtrip(self, key: Key, x_D: jax.Array) -> jax.Array:
    return self._decode(self._encode(key, x_D), x_D.size, key) if x_D.size else x_D

  def _omega_or_none(self, size: float) -> float | None:
    omega = self._omega(size)
    return None if math.isinf(omega) else omega

  def _alpha_or_none(self, size: float) -> float | None:
    return self._alpha(size) or None


def check_float(x: jax.Array) -> None:
  """Raises ValueError unless `x` has a floating-point dtype."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"`x` must have a floating-point dtype, got {x.dtype}.")


def _flat(x: jax.Array) -> jax.Array:
  return jnp.asarray(x).reshape(-1).astype(jnp.float32)


def squared_norm(x: jax.Array) -> jax.Array:
  """||x||^2, float32[]."""
  return jnp.sum(jnp.square(x))


def split_key(key: Key, num: int = 2) -> Any:
  """`num` keys, or as many times None."""
  return [None] * num if key is None else jax.random.split(key, num)
