"""Training: the step builder, the loop, checkpoints and run folders."""

from jaxcomm.training._layout import Layout, TrainState
from jaxcomm.training._step import TrainStep, make_train_step

__all__ = ["Layout", "TrainState", "TrainStep", "make_train_step"]
