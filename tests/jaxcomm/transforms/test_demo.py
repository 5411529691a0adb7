"""DeMo against an independent float64 implementation, and its parts against their definitions."""

import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from jaxcomm import _axes, demo
from jaxcomm.transforms.demo import _Chunks, _largest_divisor, _mean_of_senders

FIXTURE = np.load(pathlib.Path(__file__).parent / "fixtures" / "demo.npz")
NAMES = ("matrix", "vector")


def linear(params, grads):
  return sum(jnp.sum(params[k] * grads[k]) for k in params)


def flat_vector(x):
  """The fixture's vectors are matrices of one row."""
  return {**x, "vector": x["vector"].reshape(*x["vector"].shape[:-2], -1)}


@pytest.mark.parametrize("context", [pytest.param("vmap", marks=pytest.mark.slow), "shard_map"])
def test_follows_the_published_algorithm(train, context):
  grads = flat_vector({k: FIXTURE[f"{k}_gradients"] for k in NAMES})
  start = flat_vector({k: jnp.asarray(FIXTURE[f"{k}_start"]) for k in NAMES})
  want = flat_vector({k: FIXTURE[f"{k}_parameters"] for k in NAMES})
  deltas = flat_vector({k: FIXTURE[f"{k}_deltas"] for k in NAMES})
  tx = demo(
    lambda count: jnp.asarray(FIXTURE["rates"])[count], "replica", compression_decay=0.9,
    compression_topk=3, compression_chunk=8, weight_decay=0.1,
  )  # fmt: skip
  got = train(tx, linear, start, grads, context=context)
  for k in NAMES:
    np.testing.assert_array_equal(
      got.params[k], np.broadcast_to(got.params[k][:1], got.params[k].shape)
    )
    np.testing.assert_allclose(got.params[k][0], want[k], atol=1e-5, rtol=0)
    np.testing.assert_allclose(got.state.opt_state[0].delta[k], deltas[k], atol=1e-5, rtol=0)
  assert not got.layout.varying.params["matrix"]


def test_the_mean_is_over_those_who_sent():
  """Coefficient 0 from both of two replicas, 1 from the first only, 3 from the second only."""
  everyone = {
    "index": jnp.asarray([[[0, 1]], [[3, 0]]], jnp.uint16),
    "value": jnp.asarray([[[2.0, 4.0]], [[8.0, 6.0]]]),
  }
  mean = jax.jit(_mean_of_senders, static_argnums=1)(everyone, (1, 5))
  assert mean.tolist() == [[4.0, 4.0, 0.0, 8.0, 0.0]]


@pytest.mark.parametrize(("n", "side"), [(127, 1), (50257, 29), (128002, 41), (4096, 64), (48, 48)])
def test_chunks_are_the_largest_divisors(n, side):
  assert _largest_divisor(n, 64) == side


@pytest.mark.parametrize("shape", [(), (10,), (6, 8), (2, 3, 4)])
def test_the_transform_is_the_orthonormal_cosine_transform(shape):
  chunks = _Chunks(shape, 5)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  q = np.asarray(jax.jit(chunks.transform)(x))
  (rows, columns), (a, b) = chunks.grid, chunks.sides
  assert (rows * a) * (columns * b) == x.size
  blocks = x.reshape(rows, a, columns, b).swapaxes(1, 2)
  want = scipy.fft.dctn(blocks.astype(np.float64), norm="ortho", axes=(2, 3))
  np.testing.assert_allclose(q, want.reshape(q.shape), atol=2e-6)
  np.testing.assert_allclose(jax.jit(chunks.inverse)(q), x, atol=2e-6)


GRADS = np.random.default_rng(3).normal(size=(2, 4, 8, 12)).astype(np.float32)


@pytest.mark.parametrize(
  "value_dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_what_is_not_sent_is_kept(roll_out, value_dtype):
  """delta + what was sent = decayed delta + rate * gradient; bfloat16 sends values of 8 bits."""
  tx = demo(1.0, "replica", compression_topk=4, compression_chunk=4, value_dtype=value_dtype)
  _, state = roll_out(tx, GRADS[:, :1])
  sent = scipy.fft.dctn(
    (GRADS[:, 0] - state[0].delta).reshape(2, 2, 4, 3, 4).swapaxes(2, 3), norm="ortho", axes=(3, 4)
  ).reshape(12, 16)
  kept = np.abs(sent) > 1e-5
  assert (kept.sum(1) == 4).all()
  rounded = np.asarray(jnp.asarray(sent[kept], jnp.bfloat16).astype(jnp.float32))
  exact = np.abs(rounded - sent[kept]).max() < 1e-6
  assert exact == (value_dtype == "bfloat16")


def test_everything_sent_is_sign_descent(roll_out):
  """On the mean gradient and without momentum, whatever the decay: nothing is left to decay."""
  tx = demo(0.5, "replica", compression_decay=0.9, compression_topk=20, compression_chunk=4)
  got, state = roll_out(tx, GRADS)
  want = -0.5 * np.sign(GRADS.astype(np.float64).mean(0))
  np.testing.assert_array_equal(got, np.broadcast_to(want, got.shape))
  assert np.abs(state[0].delta).max() < 1e-6


@pytest.mark.parametrize("topk", [32, pytest.param(512, marks=pytest.mark.slow)])
def test_few_coefficients_of_noise_decide_few_signs(roll_out, topk):
  """k of K coefficients hold a share s of the energy (Parseval), and of normal ones the sign of
  an element is right with probability 1 - arccos(sqrt(s)) / pi: 59 % of all for k = 32, K = 4096.
  """
  noise = np.random.default_rng(5).normal(size=(1, 1, 256, 256)).astype(np.float32)
  got, state = roll_out(demo(1.0, "replica", compression_topk=topk), noise)
  chunks = noise.reshape(4, 64, 4, 64).swapaxes(1, 2)
  energy = np.square(scipy.fft.dctn(chunks.astype(np.float64), norm="ortho", axes=(2, 3)))
  energy = np.sort(energy.reshape(16, 4096))
  lost = energy[:, :-topk].sum() / energy.sum()
  np.testing.assert_allclose(
    np.square(state[0].delta, dtype=float).sum() / energy.sum(), lost, rtol=1e-5
  )
  right = (np.sign(noise) == -got).mean()
  sigma = 0.5 / np.sqrt(noise.size)
  assert abs(right - (1 - np.arccos(np.sqrt(1 - lost)) / np.pi)) < 5 * sigma
  assert right < (0.6 if topk == 32 else 0.78)


@pytest.mark.slow
def test_more_dimensions_are_rows_and_columns(roll_out):
  tx = demo(0.5, "replica", compression_topk=2, compression_chunk=4)
  want, _ = roll_out(tx, GRADS)
  got, _ = roll_out(tx, GRADS.reshape(2, 4, 2, 4, 12))
  np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"compression_decay": 1.0}, r"`compression_decay` must be in \[0, 1\), got 1.0"),
    ({"compression_topk": 0}, r"`compression_topk` must be an integer >= 1, got 0"),
    ({"compression_chunk": 0}, r"`compression_chunk` must be an integer >= 1, got 0"),
    ({"value_dtype": "int8"}, r"`value_dtype` must be .*got 'int8'"),
    ({"weight_decay": -0.1}, r"`weight_decay` must be at least 0, got -0.1"),
  ],
)
def test_rejects_bad_options(kwargs, message):
  with pytest.raises(ValueError, match=message):
    demo(0.1, "replica", **kwargs)


def test_warns_of_chunks_of_one_and_of_averaged_gradients():
  tx = demo(0.1, "replica")
  mesh = jax.sharding.AbstractMesh((2,), ("replica",))

  def update(grad, average):
    state = tx.init(grad)
    state = (state[0]._replace(delta=_axes.vary(state[0].delta, "replica")), *state[1:])
    return tx.update(grad if average else _axes.vary(grad, "replica"), state, grad)[0]

  def trace(n, average):
    fun = jax.shard_map(
      lambda g: update(g, average), mesh=mesh, in_specs=jax.P(), out_specs=jax.P()
    )
    jax.eval_shape(fun, jax.ShapeDtypeStruct((n,), jnp.float32))

  with pytest.warns(UserWarning, match="no compression along the 127 elements"):
    trace(127, False)
  with pytest.warns(UserWarning, match="equal on all replicas: `demo` must get"):
    trace(64, True)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    trace(64, False)
