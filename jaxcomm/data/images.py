"""Small image sets: Fashion-MNIST through `fetch`, the digits that come with scikit-learn."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import math
import os
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from jaxcomm.data._extras import require
from jaxcomm.data._fetch import fetch, read_source
from jaxcomm.data.documents import check_split

if TYPE_CHECKING:
  import grain

_DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
_DIGITS_SHA256 = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
_DIGITS_HINT = 'pip install "jaxcomm[images]"'
_CLOTHES = (
  "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """One split of an image set; element i is `{"image": uint8[H, W, 1], "label": int32[]}`.

  Attributes:
    images: uint8[N, H, W, 1], from 0 to `max_value`.
    labels: int32[N], in `[0, len(classes))`.
    max_value: what full intensity is, 255 or 16.
    classes: their names.
    source: name of the set.
    licence: of the data.
  """

  images: np.ndarray
  labels: np.ndarray
  max_value: int
  classes: tuple[str, ...]
  source: str
  licence: str

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    return {"image": self.images[index], "label": self.labels[index]}

  def sha256(self) -> str:
    """Hash of all pixels and labels."""
    return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

  def dataset(self) -> grain.MapDataset:
    """Its elements, for `batches`; needs the extra `train`."""
    return require("grain").MapDataset.source(self)


def load_images(
  source: str, *, split: str, cache_dir: str | os.PathLike[str] | None = None
) -> Images:
  """One split of `source`.

  - `"digits"`: 8 x 8 pixels from 0 to 16; 1437, 180 and 180 images for train, validation and test,
    cut in their order. Needs the extra `images`.
  - `"fashion-mnist"`: 28 x 28 pixels from 0 to 255; 55000, 5000 and 10000 images. The test split is
    its own, validation the last of its training images. Needs
    `python -m jaxcomm.data fetch fashion-mnist`.

  Args:
    source: see above.
    split: "train", "validation" or "test".
    cache_dir: where `fetch` put the set; default as there.

  Raises:
    ValueError: `source` or `split` is unknown, or a file is damaged.
    FileNotFoundError: the set was not fetched.
    ImportError: scikit-learn is not installed.

  Example:
    >>> train = load_images("digits", split="train")
    >>> train.images.shape, train.images.dtype, int(train.labels[0])
    ((1437, 8, 8, 1), dtype('uint8'), 0)
  """
  check_split(split)
  if source == "digits":
    return _digits(split)
  if source == "fashion-mnist":
    return _fashion_mnist(split, cache_dir)
  raise ValueError(f"`source` must be one of digits, fashion-mnist, got {source!r}.")


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
  """An array in the IDX format (LeCun, 1998), plain or gzipped, of unsigned bytes.

  Raises:
    ValueError: the file is damaged, holds another type, or more or less than its header says.
  """
  data = Path(path).read_bytes()
  try:
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
  except (OSError, EOFError, zlib.error) as e:
    raise ValueError(f"`{path}` is damaged: {e}.") from e
  if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
    raise ValueError(
      f"`{path}` must start with the IDX header of unsigned bytes, got {data[:4]!r}."
    )
  shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
  start = 4 + 4 * len(shape)
  if len(data) - start != math.prod(shape):
    raise ValueError(
      f"`{path}` must hold {math.prod(shape)} bytes for shape {shape}, got {len(data) - start}."
    )
  return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _fashion_mnist(split: str, cache_dir: str | os.PathLike[str] | None) -> Images:
  folder = fetch("fashion-mnist", cache_dir=cache_dir, offline=True)
  prefix = "t10k" if split == "test" else "train"
  images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
  labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
  part = {"train": slice(-5000), "validation": slice(-5000, None), "test": slice(None)}[split]
  return Images(
    images[part, ..., None],
    labels[part].astype(np.int32),
    255,
    _CLOTHES,
    "fashion-mnist",
    read_source(folder)["licence"],
  )


def _digits(split: str) -> Images:
  """Read from the package's own file; scikit-learn itself is not imported."""
  try:
    package = importlib.metadata.distribution("scikit-learn")
    data = Path(str(package.locate_file(_DIGITS_FILE))).read_bytes()
  except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as e:
    raise ImportError(f"the digits come with scikit-learn: {_DIGITS_HINT}") from e
  text = gzip.decompress(data)
  if hashlib.sha256(text).hexdigest() != _DIGITS_SHA256:
    warnings.warn(
      f"the digits of scikit-learn {package.version} differ from the documented ones.",
      stacklevel=3,
    )
  table = np.loadtxt(text.decode("ascii").splitlines(), delimiter=",").astype(np.uint8)
  part = {"train": slice(1437), "validation": slice(1437, 1617), "test": slice(1617, None)}[split]
  return Images(
    table[part, :64].reshape(-1, 8, 8, 1),
    table[part, 64].astype(np.int32),
    16,
    tuple("0123456789"),
    "digits",
    "CC-BY-4.0",  # Alpaydin and Kaynak (1998), UCI Machine Learning Repository
  )
