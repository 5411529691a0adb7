"""Parameters of a Llama for tests in which their exact numbers do not matter."""

import jax
import numpy as np

from models import llama


def llama_params(cfg):
  """Numbers like `llama.init`'s, but without its generator, which takes longest to compile."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    noise = 0.02 * rng.normal(size=leaf.shape)
    return ("norm" in path[-1].key) + noise.astype(leaf.dtype)

  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  return jax.tree.map_with_path(draw, shapes)
