"""`examples/train_lm.py` as a process of its own, but it trains `small_lm`."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "examples")]

import train_lm  # noqa: E402

from jaxcomm.training import launch  # noqa: E402
from tests.examples import small_lm  # noqa: E402

train_lm.llama = small_lm
launch(train_lm.Config, train_lm.main, description=train_lm.__doc__)
