"""Two hops: who owns what, when they are one hop, and what they cost in precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import hierarchical_psum_scatter, quantized_psum_scatter

AXES = ("gpu", "node")
KEY = jax.random.key(5)


def stack(fn, n_node, n_gpu):
  """jit of `fn` over arrays [n_node, n_gpu, ...], on one device."""
  del n_node, n_gpu
  return jax.jit(jax.vmap(jax.vmap(fn, axis_name="gpu"), axis_name="node"))


def test_ownership_is_that_of_the_flat_psum_scatter(on_nodes):
  """On (2, 4) devices, chunk i * 4 + j on device (i, j); sums of small integers are exact."""
  x = np.random.default_rng(0).integers(-1, 2, (2, 4, 16, 3)).astype(np.float32)
  equal = np.broadcast_to(x[:1, :1] * 127, x.shape)  # so that partial sums stay on the grid

  def local(xs):
    x, equal = xs
    flat = functools.partial(jax.lax.psum_scatter, axis_name=("node", "gpu"), tiled=True)
    return {
      "exact": (hierarchical_psum_scatter(x, AXES, bits=None), flat(x)),
      "rounded": (
        hierarchical_psum_scatter(equal, AXES, bits={"gpu": 8, "node": 4}, block_size=8),
        flat(equal),
      ),
      "padded": (
        hierarchical_psum_scatter(x[:9], AXES, bits=None),
        flat(jnp.pad(x[:9], ((0, 7), (0, 0)))),
      ),
      "dimension": (
        hierarchical_psum_scatter(x.T, AXES, bits=None, scatter_dimension=1),
        flat(x).T,
      ),
      "untiled": (
        hierarchical_psum_scatter(x[:8], AXES, bits=None, tiled=False),
        flat(x[:8])[0],
      ),
    }

  got = on_nodes(local, (2, 4))[0]((x, equal))
  for name, (ours, flat) in got.items():
    if name == "rounded":  # the second scale, 508 / 7, is rounded up
      np.testing.assert_allclose(ours, flat, rtol=2**-15, err_msg=name)
    else:
      np.testing.assert_array_equal(ours, flat, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4), (4, 1)])
def test_one_axis_alone_is_the_one_shot(sizes, stacked, bits_of):
  x = stacked(4, (9, 5))
  options = {"bits": 4, "block_size": 16}
  two = stack(lambda v: hierarchical_psum_scatter(v, AXES, **options), *sizes)
  one = jax.jit(
    jax.vmap(lambda v: quantized_psum_scatter(v, "replica", **options), axis_name="replica")
  )
  got = two(x.reshape(*sizes, 9, 5)).reshape(4, 3, 5)
  np.testing.assert_array_equal(bits_of(got), bits_of(one(x)))


@pytest.mark.slow
def test_three_axes_and_the_derivative(stacked):
  """The transpose of the sum is the gather; through the rounding, the identity."""
  x, ct = stacked(8, (9, 5)), stacked(8, (2, 5), seed=1)
  axes = ("gcd", "gpu", "node")

  def local(x, ct):
    def scatter(x):
      return hierarchical_psum_scatter(x, axes, bits=8, backward_bits=None)

    y, pull = jax.vjp(scatter, x)
    return y, pull(ct)[0]

  fn = local
  for axis in axes:
    fn = jax.vmap(fn, axis_name=axis)
  y, gathered = jax.jit(fn)(x.reshape(2, 2, 2, 9, 5), ct.reshape(2, 2, 2, 2, 5))
  exact = np.asarray(x).sum(0)
  got = np.asarray(y).reshape(16, 5)
  np.testing.assert_allclose(got[:9], exact, atol=8 * np.abs(x).max() / 127)
  assert not np.any(got[9:])
  whole = np.asarray(ct).reshape(16, 5)[:9]
  np.testing.assert_array_equal(gathered, np.broadcast_to(whole, (2, 2, 2, 9, 5)))


@pytest.mark.slow
@pytest.mark.parametrize("hadamard", [None, 32])
def test_two_hops_err_twice_as_much_as_one(hadamard, stacked):
  """Noise of all devices and hops is independent: the squared errors add up."""
  sizes = (2, 4)
  x = stacked(8, (8 * 2048,))
  options = {"bits": 4, "block_size": 128, "rounding": "stochastic", "hadamard": hadamard}

  def local(v):
    return hierarchical_psum_scatter(v, AXES, key=KEY, **options)

  got = np.asarray(stack(local, *sizes)(x.reshape(*sizes, -1)), np.float64).reshape(-1)
  exact = np.asarray(x, np.float64).sum(0)
  assert ((got - exact) ** 2).sum() / (exact**2).sum() == pytest.approx(2 * 2.8e-2, rel=0.15)


@pytest.mark.slow
def test_a_rotation_helps_where_outliers_rule(stacked):
  """One element of 50 in a block: without rotation the others are lost in its step.

  The outliers cancel in the sum, so that the second hop has none.
  """
  x = np.array(stacked(8, (8 * 256,)))
  x[::2, ::128], x[1::2, ::128] = 50.0, -50.0
  exact = x.astype(np.float64).sum(0)

  def error(hadamard):
    options = {"bits": 4, "block_size": 128, "hadamard": hadamard}
    fn = stack(lambda v: hierarchical_psum_scatter(v, AXES, **options), 2, 4)
    return np.square(np.asarray(fn(x.reshape(2, 4, -1))).reshape(-1) - exact).sum()

  assert error(32) < error(None) / 2
