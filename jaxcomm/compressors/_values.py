"""How single values travel in sparse messages: as float32, or as the bits of bfloat16."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.compressors._base import Key, squared_norm

ValueDtype = Literal["float32", "bfloat16"]

_GAP = 2.0**-7  # between bfloat16 numbers from 1 up
_LOW_BITS = np.uint32(0xFFFF)  # those that bfloat16 lacks


def check_dtype(value_dtype: str) -> None:
  """Raises ValueError for an unknown `value_dtype`."""
  if value_dtype not in ("float32", "bfloat16"):
    raise ValueError(f"`value_dtype` must be 'float32' or 'bfloat16', got {value_dtype!r}.")


def num_bytes(value_dtype: ValueDtype) -> int:
  return 4 if value_dtype == "float32" else 2


def omega(value_dtype: ValueDtype) -> float:
  """Of stochastic rounding: between neighbours a and b at most (b - a)^2 / (4 a b) x^2."""
  return 0.0 if value_dtype == "float32" else _GAP**2 / (4 * (1 + _GAP))


def alpha(value_dtype: ValueDtype) -> float:
  """Of rounding to nearest."""
  return 1.0 if value_dtype == "float32" else 1 - (_GAP / 2 / (1 + _GAP / 2)) ** 2


def encode(x: jax.Array, value_dtype: ValueDtype, key: Key) -> jax.Array:
  """float32, or uint16 of the same shape: stochastic rounding if there is a key, else nearest."""
  if value_dtype == "float32":
    return x
  if key is not None:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape) & _LOW_BITS
    up = jax.lax.bitcast_convert_type(bits & ~_LOW_BITS, jnp.float32)
    x = jnp.where(jnp.isfinite(x), up, x)
  return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def decode(values: jax.Array, value_dtype: ValueDtype) -> jax.Array:
  """The inverse of `encode`: float32."""
  if value_dtype == "float32":
    return values
  return jax.lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)


def variance(x: jax.Array, value_dtype: ValueDtype, stochastic: bool) -> jax.Array:
  """E||decode(encode(x)) - x||^2, float32[]."""
  if value_dtype == "float32":
    return jnp.zeros(())
  if not stochastic:
    return squared_norm(decode(encode(x, value_dtype, None), value_dtype) - x)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  low = jax.lax.bitcast_convert_type(bits & ~_LOW_BITS, jnp.float32)
  high = jax.lax.bitcast_convert_type((bits & ~_LOW_BITS) + _LOW_BITS + 1, jnp.float32)
  return jnp.sum((x - low) * (high - x))
