"""FedZip of trees: what is decoded, its size, and trees that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import (
  FedZipLeaf,
  RawLeaf,
  fedzip_bytes,
  fedzip_codec,
  fedzip_compress,
  fedzip_decompress,
  fedzip_finite,
  kmeans_1d,
  top_z,
)
from jaxcomm.compressors._fedzip_bits import METHODS
from jaxcomm.compressors.fedzip_codec import FedZipError


def make_delta():
  rng = np.random.default_rng(0)
  return {
    "conv": {
      "kernel": jnp.asarray(rng.normal(size=(20, 30)), jnp.float32),
      "bias": jnp.asarray(rng.normal(size=30), jnp.bfloat16),
    },
    "scale": jnp.asarray(rng.normal(size=()), jnp.float16),
    "none": jnp.zeros((0, 3)),
  }


@pytest.fixture(scope="module")
def compressed():
  """What jit computes: the compressed tree, its decoded form, its sizes, and two references."""

  def compress(delta):
    shares = {"conv": {"kernel": 0.2, "bias": 1.0}, "scale": 0.2, "none": 0.2}
    small = fedzip_compress(delta, shares)
    sizes = {m: fedzip_bytes(small, m) for m in ("raw", "auto")}
    kept, mask = top_z(delta["conv"]["kernel"], 0.2)
    return small, fedzip_decompress(small), sizes, (kmeans_1d(kept), mask), fedzip_finite(small)

  return jax.jit(compress)(make_delta())


@pytest.fixture(scope="module")
def small(compressed):
  return compressed[0]


def test_leaves(compressed):
  delta, (small, out, _, (clusters, mask), finite) = make_delta(), compressed
  assert isinstance(small["conv"]["bias"], FedZipLeaf)  # 30 elements: at least min_size
  assert isinstance(small["scale"], RawLeaf)
  same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), out, delta)
  assert all(jax.tree.leaves(same))
  labels, centroids = map(np.asarray, clusters)
  kernel = np.asarray(out["conv"]["kernel"])
  np.testing.assert_array_equal(kernel, centroids[labels])
  assert not np.any(kernel[~np.asarray(mask)])
  assert out["scale"] == delta["scale"]
  assert len(set(out["conv"]["bias"].tolist())) == 3  # not pruned, but clustered
  assert finite


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_bytes_decode_to_the_same_tree(compressed, method):
  small, out, sizes, *_ = compressed
  data = fedzip_codec.encode(small, method)
  assert len(data) == int(sizes.get(method, len(data)))
  back = fedzip_codec.decode(data, make_delta())
  for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(out)):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got.astype(np.float32), np.asarray(want).astype(np.float32))
  assert [x.size for x in fedzip_codec.decode(data)] == [x.size for x in jax.tree.leaves(out)]
  assert len(data) >= int(sizes["auto"])


def test_report_counts_what_is_sent(small):
  report = fedzip_codec.compression_report(small)
  assert set(report) == {"conv/kernel", "conv/bias", "scale", "none", "total"}
  total = report["total"]
  assert total.bytes == len(fedzip_codec.encode(small)) - 12
  assert total.size == 631
  assert total.ratio == 4 * 631 / total.bytes
  assert total.ratio < total.ratio_paper
  assert report["conv/kernel"].entropy_bytes < report["conv/kernel"].bytes


def test_nan_is_not_hidden_and_not_sent():
  w = np.ones(40, np.float32)
  w[3] = np.nan

  def compress(delta):
    small = fedzip_compress(delta)
    return small, fedzip_decompress(small)["w"], fedzip_finite(small)

  small, out, finite = jax.jit(compress)({"w": w, "v": np.ones(40, np.float32)})
  assert not finite
  assert np.isnan(out).all()
  with pytest.raises(ValueError, match=r"leaf 'w': `centroids` must be finite.*weight 0"):
    fedzip_codec.encode(small)


def test_decode_into_another_tree(small):
  data, delta = fedzip_codec.encode(small), make_delta()
  wrong = {
    "leaf 'conv/kernel': expected at most n=599": delta
    | {"conv": delta["conv"] | {"kernel": jnp.zeros(599)}},
    "leaf 'conv/kernel': expected n=601, got 600": delta
    | {"conv": delta["conv"] | {"kernel": jnp.zeros(601)}},
    "expected 5 leaves, got 4": delta | {"more": jnp.zeros(1)},
    "other names or shapes": delta | {"conv": delta["conv"] | {"kernel": jnp.zeros((30, 20))}},
  }
  for message, like in wrong.items():
    with pytest.raises(FedZipError, match=message):
      fedzip_codec.decode(data, like)
  renamed = {**delta}
  renamed["scales"] = renamed.pop("scale")
  with pytest.raises(FedZipError, match="other names or shapes"):
    fedzip_codec.decode(data, renamed)
  with pytest.raises(FedZipError, match="must end here, 1 bytes are left"):
    fedzip_codec.decode(data + b"\0", delta)
  with pytest.raises(FedZipError, match="expected at most n="):
    fedzip_codec.decode(data, max_elements=100)
  with pytest.raises(FedZipError, match="a tree starts with b'FZT1'"):
    fedzip_codec.decode(data[12:], delta)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"z": 0.0}, r"`z` must be a number in \(0, 1\]"),
    ({"num_clusters": 300}, "`num_clusters` must be an integer in 1..255"),
    ({"min_size": -1}, "`min_size` must be an integer of at least 0"),
    ({"delta": {"a": {"b": jnp.arange(20)}}}, "`delta` must be of dtype float32.*int32 at a/b"),
  ],
)
def test_bad_input(change, message):
  with pytest.raises(ValueError, match=message):
    fedzip_compress(**{"delta": {"w": jnp.ones(20)}, **change})


def test_too_large():
  big = jax.ShapeDtypeStruct((2**26 + 1,), jnp.float32)
  with pytest.raises(ValueError, match=r"at most 2\*\*26 elements"):
    jax.eval_shape(fedzip_compress, {"w": big})


def test_encode_is_for_the_host():
  with pytest.raises(ValueError, match=r"cannot be called under jax\.jit"):
    jax.eval_shape(lambda d: fedzip_codec.encode(fedzip_compress(d)), {"w": jnp.ones(20)})
  with pytest.raises(ValueError, match=r"must come from fedzip_compress, got .* at w"):
    fedzip_codec.encode({"w": np.ones(20)})
