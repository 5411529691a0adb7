"""An unbiased compressor made contractive."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxcomm.compressors._base import Compressor, Key, Payload, squared_norm


@dataclasses.dataclass(frozen=True)
class Contractive(Compressor):
  r"""C(x) / (1 + omega) for an unbiased C with any omega: alpha = 1 / (1 + omega).

  omega is that at the size of the array. Payload: that of `compressor`; the receiver divides.

  Attributes:
    compressor: unbiased.

  Raises:
    ValueError: `compressor` is not unbiased.

  Source: Safaryan et al. (arXiv 2002.08958), section 2, and Beznosikov et al. (arXiv 2002.12410).
  """

  compressor: Compressor

  def __post_init__(self):
    check_unbiased("compressor", self.compressor)

  @property
  def needs_key(self) -> bool:
    return self.compressor.needs_key

  @property
  def shared_key(self) -> bool:
    return self.compressor.shared_key

  def _alpha(self, size: float) -> float:
    return 1 / (1 + self.compressor._omega(size))

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    return self.compressor._encode(key, x_D)

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    return self.compressor._decode(payload, size, key) * jnp.float32(self._alpha(size))

  def _num_bytes(self, size: int) -> int:
    return self.compressor._num_bytes(size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    """With a = 1 / (1 + omega): a^2 times that of `compressor` plus (1 - a)^2 ||x||^2."""
    a = self._alpha(x_D.size)
    return a**2 * self.compressor._variance(x_D) + (1 - a) ** 2 * squared_norm(x_D)


def check_unbiased(name: str, compressor: Compressor) -> None:
  """Raises ValueError, naming the argument, unless `compressor` is unbiased."""
  if not compressor.unbiased:
    raise ValueError(
      f"`{name}` must be unbiased, U(omega), got the biased, at most contractive B(alpha),"
      f" {compressor}."
    )


def contractive(compressor: Compressor) -> Contractive:
  """`compressor` / (1 + omega), contractive; see `Contractive`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.compressors import contractive, rand_k
  >>> compressor = contractive(rand_k(ratio=0.25))  # omega = 3: four times the values, divided by 4
  >>> payload = compressor.compress(jax.random.key(0), jnp.ones(4))
  >>> sorted(compressor.decompress(payload, (4,)).tolist()), compressor.alpha
  ([0.0, 0.0, 0.0, 1.0], 0.25)
  """
  return Contractive(compressor)
