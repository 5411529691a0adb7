"""Compressing and decompressing in one compiled program per compressor and size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

KEY = jax.random.key(0)


@functools.cache
def _both(compressor, dtype):
  def both(key, x):
    payload = compressor.compress(key, x)
    return payload, compressor.decompress(payload, x.shape, dtype, key=key)

  return jax.jit(both)


@pytest.fixture(scope="session")
def both():
  """both(compressor, x, key=, dtype=) -> (payload, decoded), as numpy."""

  def run(compressor, x, key=KEY, dtype=jnp.float32):
    return jax.tree.map(np.asarray, _both(compressor, dtype)(key, x))

  return run


@pytest.fixture(scope="session")
def roundtrip(both):
  """roundtrip(compressor, x, key=, dtype=) -> decoded, as numpy."""
  return lambda *args, **kwargs: both(*args, **kwargs)[1]


@pytest.fixture(scope="session")
def normal():
  """Gaussian float32: normal(shape, seed=0)."""
  return lambda shape, seed=0: np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def _variance(compressor):
  return jax.jit(compressor.variance)


@pytest.fixture(scope="session")
def relative_variance():
  """relative_variance(compressor, x): the stated expected squared error, per ||x||^2."""

  def relative(compressor, x):
    return float(_variance(compressor)(x)) / np.square(x, dtype=np.float64).sum()

  return relative
