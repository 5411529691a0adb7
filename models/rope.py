"""Rotary position embedding (RoFormer, arXiv 2104.09864, §3.4), split-half layout.

B batch, S sequence, H heads, C head width, A = C / 2 angles.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
  """Llama-3.1 context extension: long wavelengths are slowed down by `factor`.

  Raises:
    ValueError: a value is not positive, or `low_freq_factor >= high_freq_factor`.
  """

  factor: float  # 8 for Llama 3.1, 32 for Llama 3.2
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_position: int = 8192  # tokens, context length before the extension

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value <= 0:
        raise ValueError(f"`{name}` must be positive, got {value}.")
    if self.low_freq_factor >= self.high_freq_factor:
      raise ValueError(
        f"`low_freq_factor` must be below `high_freq_factor`, got {self.low_freq_factor}"
        f" and {self.high_freq_factor}."
      )


def frequencies(
  head_dim: int, theta: float, scaling: Llama3RopeScaling | None = None
) -> np.ndarray:
  """Angle per position step of each pair of channels.

  Args:
    head_dim: head width C, even.
    theta: base; pair i turns by `theta ** (-2 i / C)` radians a position.
    scaling: Llama-3.1 scaling, or None.

  Returns:
    float64[C / 2], radians per position.

  Example:
    >>> frequencies(4, 100.0)
    array([1. , 0.1])
  """
  inv_A = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  if scaling is None:
    return inv_A
  # Turns of each pair within the original context: many turns are kept, few are slowed down.
  turns_A = scaling.original_max_position * inv_A / (2 * math.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  keep_A = np.clip((turns_A - low) / (high - low), 0, 1)
  return inv_A * (keep_A + (1 - keep_A) / scaling.factor)


def angles(positions_BS: jax.Array, inv_A: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of `position * frequency`, float32[B, S, 1, A] each."""
  angle_BS1A = positions_BS.astype(jnp.float32)[..., None, None] * jnp.asarray(
    inv_A, jnp.float32
  ).reshape(1, 1, 1, -1)
  return jnp.cos(angle_BS1A), jnp.sin(angle_BS1A)


def rotate(x_BSHC: jax.Array, cos_BS1A: jax.Array, sin_BS1A: jax.Array) -> jax.Array:
  """Turns channel pairs (i, i + C / 2) of `x_BSHC` in float32; shape and dtype of `x_BSHC`."""
  a_BSHA, b_BSHA = jnp.split(x_BSHC.astype(jnp.float32), 2, axis=-1)
  turned = (a_BSHA * cos_BS1A - b_BSHA * sin_BS1A, b_BSHA * cos_BS1A + a_BSHA * sin_BS1A)
  return jnp.concatenate(turned, axis=-1).astype(x_BSHC.dtype)
