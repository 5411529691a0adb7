"""Image sets, and the IDX reader against a parser of its own."""

import gzip
import importlib.metadata
import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import batches, load_images, read_idx


def idx(values):
  return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def read_idx_by_hand(data):
  """One number after the other, by the standard library."""
  _, _, dims = struct.unpack_from(">HBB", data)
  shape = struct.unpack_from(f">{dims}I", data, 4)
  return shape, [b for (b,) in struct.iter_unpack(">B", data[4 + 4 * dims :])]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=3), st.booleans(), st.integers(0, 255))
def test_read_idx_equals_an_independent_parser(tmp_path_factory, shape, packed, first):
  values = (np.arange(math.prod(shape)) * 7 + first).astype(np.uint8).reshape(shape)
  path = tmp_path_factory.mktemp("idx") / "a"
  path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
  want_shape, want = read_idx_by_hand(idx(values))
  got = read_idx(path)
  assert (got.shape, got.dtype) == (want_shape, np.uint8)
  assert got.ravel().tolist() == want


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "must start with the IDX header of unsigned bytes, got b''"),
    (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "must start with the IDX header"),
    (b"\0\0\x08\3\0\0\0\1", "must start with the IDX header"),
    (idx(np.zeros((2, 3), np.uint8))[:-1], r"must hold 6 bytes for shape \[2, 3\], got 5"),
    (idx(np.zeros(2, np.uint8)) + b"1", r"must hold 2 bytes for shape \[2\], got 3"),
    (gzip.compress(idx(np.zeros(99, np.uint8)))[:-9], "is damaged"),
  ],
)
def test_bad_idx(tmp_path, content, message):
  (tmp_path / "a").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read_idx(tmp_path / "a")


@pytest.mark.slow  # scikit-learn takes seconds to import
def test_digits():
  pytest.importorskip("sklearn")
  parts = {s: load_images("digits", split=s) for s in ("train", "validation", "test")}
  assert [len(p) for p in parts.values()] == [1437, 180, 180]
  images = np.concatenate([p.images for p in parts.values()])
  labels = np.concatenate([p.labels for p in parts.values()])
  from sklearn.datasets import load_digits

  want = load_digits()
  np.testing.assert_array_equal(images[..., 0], want.images)
  np.testing.assert_array_equal(labels, want.target)
  train = parts["train"]
  assert (train.images.dtype, train.labels.dtype, train.max_value) == (np.uint8, np.int32, 16)
  batch = next(batches(train.dataset(), batch_size=32, seed=0))
  assert batch["image"].shape == (32, 8, 8, 1)
  assert batch["label"].shape == (32,)


def test_what_is_refused(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="`source` must be one of digits, fashion-mnist, got 'cats'"):
    load_images("cats", split="train")
  with pytest.raises(ValueError, match="`split` must be one of"):
    load_images("digits", split="dev")
  with pytest.raises(FileNotFoundError, match=r"-m jaxcomm\.data fetch fashion-mnist`"):
    load_images("fashion-mnist", split="train", cache_dir=tmp_path)

  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", absent)
  with pytest.raises(ImportError, match=r'pip install "jaxcomm\[images\]"'):
    load_images("digits", split="train")
