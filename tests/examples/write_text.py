"""A text to train on."""

import contextlib
import pathlib
import random
from collections.abc import Iterator

import pytest

WORDS = "alpha beta gamma delta mean replica token wire round step outer inner loss".split()


@contextlib.contextmanager
def write_text(folder: pathlib.Path, *, lines: int) -> Iterator[pathlib.Path]:
  """A file of `lines` random sentences in `folder`, which has the cache of its tokens meanwhile."""
  rng = random.Random(0)
  sentences = (" ".join(rng.choices(WORDS, k=8)) + ".\n\n" for _ in range(lines))
  (folder / "text.txt").write_text("".join(sentences))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAXCOMM_CACHE", str(folder / "cache"))
    yield folder / "text.txt"
