"""The compressed mean takes every compressor: equal bits for all, and nothing unaccounted for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm import compressed_mean
from jaxcomm.compressors import (
  bernoulli,
  chain_compressors,
  contractive,
  fp8,
  hadamard,
  induced,
  int4,
  natural,
  qsgd,
  rand_k,
  scaled_sign,
  top_k,
  top_z_kmeans,
)

REPLICAS, SIZE = 4, 32
SOME = {
  "top_k": top_k(ratio=0.25),
  "rand_k_shared": rand_k(ratio=0.25, shared_support=True),
  "scaled_sign": scaled_sign(),
}
OTHERS = {
  "rand_k": rand_k(ratio=0.25),
  "contractive": contractive(rand_k(ratio=0.25, shared_support=True)),
  "bernoulli": bernoulli(p=0.5),
  "rms_sign": scaled_sign("rms"),
  "qsgd": qsgd(7, bucket_size=8),
  "natural": natural(),
  "fp8": fp8(),
  "hadamard": hadamard(int4(8)),
  "induced": induced(top_k(ratio=0.25), rand_k(ratio=0.25)),
  "chain": chain_compressors(qsgd(7, bucket_size=8), top_k(ratio=0.25)),
  "top_z_kmeans": top_z_kmeans(),
}
CASES = [pytest.param("SOME", name, "two_hop") for name in SOME] + [
  pytest.param(group, name, "all_gather", marks=pytest.mark.slow)
  for group in ("SOME", "OTHERS")
  for name in globals()[group]
]
GRADS = np.random.default_rng(6).normal(size=(REPLICAS, SIZE)).astype(np.float32)
GRADS[:, 0] = 20.0  # the largest on all devices, so Top-k agrees on something


@functools.cache
def means(group, algorithm):
  """All compressors of a group in one program: means [R, d] and residuals [R, d]."""
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((REPLICAS,), ("replica",), axis_types=auto, devices=jax.devices()[:REPLICAS])

  def local(grad):
    out = {}
    for name, compressor in globals()[group].items():
      tx = compressed_mean("replica", compressor, algorithm=algorithm, error_feedback=True)
      mean, state = tx.update(grad[0], tx.init(grad[0]))
      out[name] = mean[None], state.residual[None]
    return out

  spec = jax.P("replica")
  fun = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
  return jax.tree.map(np.asarray, fun(jnp.asarray(GRADS)))


@pytest.mark.filterwarnings("ignore:`compressor` should be contractive")
@pytest.mark.parametrize(("group", "name", "algorithm"), CASES)
def test_every_compressor(group, name, algorithm):
  mean, residual = means(group, algorithm)[name]
  for other in mean:
    np.testing.assert_array_equal(other, mean[0])
  exact = GRADS.astype(np.float64).mean(0)
  np.testing.assert_allclose(mean[0] + residual.mean(0), exact, atol=2e-5)
  assert np.abs(mean[0] - exact).max() > 1e-3
  if name == "rand_k_shared" and algorithm == "all_gather":  # as many as one device sends
    assert np.count_nonzero(mean[0]) == SIZE // 4
  if name == "top_k" and algorithm == "all_gather":
    assert SIZE // 4 < np.count_nonzero(mean[0]) <= SIZE
