"""Top-z and k-means with a payload of fixed shape: the same values, and the bytes that are said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.collectives import allgather_pmean
from jaxcomm.compressors import fedzip_compress, fedzip_decompress, top_z_kmeans

CASES = {
  "default": top_z_kmeans(),
  "dense": top_z_kmeans(1.0, 4),
  "paper": top_z_kmeans(0.1, pin_zero=False),
  "one": top_z_kmeans(0.3, 1),
}


@pytest.mark.parametrize(
  "name", [c if c == "default" else pytest.param(c, marks=pytest.mark.slow) for c in CASES]
)
def test_decodes_to_what_fedzip_decodes(name, both, normal):
  compressor = CASES[name]
  x = normal((7, 19)) ** 3
  payload, got = both(compressor, x)
  options = {"num_clusters": compressor.num_clusters, "pin_zero": compressor.pin_zero}
  reference = jax.jit(lambda x: fedzip_decompress(fedzip_compress(x, compressor.z, **options)))
  np.testing.assert_array_equal(got, reference(x))
  assert sum(a.nbytes for a in payload.values()) == compressor.payload_bytes((7, 19))


def test_bytes_by_hand():
  # 20 of 100 values: 7 bits each in parts of 1, 2 and 4, 21 labels of 2 bits, 3 centroids.
  assert top_z_kmeans().payload_bytes((100,)) == (3 + 5 + 10) + 6 + 12
  assert top_z_kmeans(1.0, 2).payload_bytes((8,)) == 3 + 1 + 8  # nothing is pruned
  for size in (0, 1, 2):
    payload = jax.eval_shape(top_z_kmeans().compress, None, jnp.zeros(size))
    want = sum(a.size * a.dtype.itemsize for a in payload.values())
    assert top_z_kmeans().payload_bytes((size,)) == want


@pytest.mark.slow
def test_is_a_message_of_collectives(both, normal):
  x, compressor = normal((2, 133)), top_z_kmeans(0.1)
  mean = jax.jit(jax.vmap(lambda v: allgather_pmean(v, "data", compressor), axis_name="data"))(x)
  want = (both(compressor, x[0])[1] + both(compressor, x[1])[1]) / 2
  np.testing.assert_allclose(mean[0], want, rtol=1e-6)


def test_claims_no_constant():
  assert top_z_kmeans().alpha is None
  assert top_z_kmeans().omega is None
  assert not top_z_kmeans().unbiased


@pytest.mark.parametrize(
  ("arguments", "message"),
  [((0.0,), r"`z` must be a number in \(0, 1\]"), ((0.5, 0), "`num_clusters` must be an integer")],
)
def test_bad_input(arguments, message):
  with pytest.raises(ValueError, match=message):
    top_z_kmeans(*arguments)
