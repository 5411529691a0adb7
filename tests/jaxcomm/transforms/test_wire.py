"""The compiled update of every method sends what its formula says, over its axis only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm import (
  _axes,
  demo,
  ef21,
  error_feedback,
  int4,
  one_bit_adam,
  powersgd_mean,
  sign_majority,
  zero_one_adam,
)
from jaxcomm.collectives import allgather_pmean_bytes, compressed_pmean_bytes
from jaxcomm.compressors import scaled_sign
from jaxcomm.inspect import collective_bytes
from jaxcomm.transforms import demo_bytes, powersgd_bytes, sign_majority_bytes

N = 4
SHAPES = {"w": (24, 20), "b": (33,)}


def total(formula):
  return sum(formula(shape) for shape in SHAPES.values())


DENSE = total(lambda shape: 2 * (N - 1) / N * 4 * np.prod(shape))
SIGNS = total(lambda shape: compressed_pmean_bytes(shape, N, scaled_sign("rms")))
# name -> (transform, bytes of the branch that sends least, and of the one that sends most)
METHODS = {
  "error_feedback": (
    error_feedback("replica", int4(8)),
    *[total(lambda shape: compressed_pmean_bytes(shape, N, int4(8)))] * 2,
  ),
  "ef21": (
    ef21("replica", int4(8)),
    *[total(lambda shape: allgather_pmean_bytes(shape, N, int4(8)))] * 2,
  ),
  "powersgd": (
    powersgd_mean("replica", 2),
    *[total(lambda shape: powersgd_bytes(shape, N, 2))] * 2,
  ),
  "sign_majority": (
    sign_majority("replica"),
    *[total(lambda shape: sign_majority_bytes(shape, N))] * 2,
  ),
  "demo": (demo(0.1, "replica"), *[total(lambda shape: demo_bytes(shape, N))] * 2),
  "demo_bfloat16": (
    demo(0.1, "replica", compression_chunk=8, compression_topk=3, value_dtype="bfloat16"),
    *[
      total(
        lambda shape: demo_bytes(
          shape, N, compression_chunk=8, compression_topk=3, value_dtype="bfloat16"
        )
      )
    ]
    * 2,
  ),
  "one_bit_adam": (one_bit_adam(0.1, "replica", warmup_steps=5), SIGNS, DENSE),
  "zero_one_adam": (zero_one_adam(0.1, "replica", var_freeze_step=5), 0, DENSE),
}


def replica(tx, grads):
  updates, _ = tx.update(grads, tx.init(grads), grads)
  return updates


@pytest.mark.parametrize("method", METHODS)
def test_rejects_an_unbound_axis_and_leaves_that_are_not_floating_point(method):
  tx = METHODS[method][0]
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    jax.eval_shape(lambda g: replica(tx, g), jnp.ones((24, 20)))
  whole = {"w": jnp.ones((2, 24, 20), jnp.int32)}
  with pytest.raises(ValueError, match=r"must be floating-point arrays, got int32 at \['w'\]"):
    jax.eval_shape(jax.vmap(lambda g: replica(tx, g), axis_name="replica"), whole)


@pytest.mark.slow
def test_nan_and_inf_of_one_replica_show_on_all():
  """The vote alone is made to stand them."""
  txs = {k: tx for k, (tx, *_) in METHODS.items() if k != "sign_majority"}
  grads = np.ones((2, 24, 20), np.float32)
  grads[0, 3, 4], grads[1, 20, 7] = np.nan, np.inf

  def update(g):
    return {k: replica(tx, g) for k, tx in txs.items()}

  for name, got in jax.jit(jax.vmap(update, axis_name="replica"))(grads).items():
    assert not np.isfinite(got[:, 3, 4]).any(), name
    if not name.startswith("demo"):  # the sign of Inf is a number; what is kept of it is NaN
      assert not np.isfinite(got[:, 20, 7]).any(), name


FAST = ("powersgd", "sign_majority", "demo")


@pytest.mark.parametrize(
  "method", [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_sends_what_the_formula_says(method):
  tx, least, most = METHODS[method]
  grads = {k: jnp.ones(shape) for k, shape in SHAPES.items()}
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((N,), ("replica",), axis_types=auto, devices=jax.devices()[:N])

  def local(grads, state):
    grads = _axes.vary(jax.tree.map(lambda g: g, grads), "replica")
    updates, state = tx.update(grads, state, optax.tree.zeros_like(grads))
    return jax.tree.map(lambda x: _axes.vary(x, "replica")[None], (updates, state))

  fun = jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P("replica"))
  report = collective_bytes(jax.jit(fun).lower(grads, tx.init(grads)).compile(), mesh)
  assert {op.axis for op in report.ops} == {"replica"}
  assert (report.always, report.total) == (least, most)
  if method in ("error_feedback", "ef21", "sign_majority"):
    assert {op.dtype for op in report.ops} <= {"u8", "s8"}
  if method == "demo_bfloat16":
    assert {op.dtype for op in report.ops} == {"u16"}
