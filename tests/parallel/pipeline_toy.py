"""A small model with an input, layers and a loss, in one piece and in stages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from parallel import pipeline_loss, pipeline_value_and_grad

LAYERS, WIDTH, VOCAB, LENGTH = 8, 6, 5, 3


def stage(layers, x, data):
  """Residual layers; zeros in, NaN out, as a division by the norm of padding would give."""

  def layer(x, w):
    x = x + jnp.tanh(x @ w["w"]) * data["gain"][:, None, None]
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True)), None

  return jax.lax.scan(layer, x, layers)[0]


def embed(shared, data):
  return shared["table"][data["tokens"]]


def head(shared, x, data):
  """The table is used again, and the mask makes microbatches unequal."""
  logp = jax.nn.log_softmax(x @ shared["table"].T * shared["scale"])
  picked = jnp.take_along_axis(logp, data["targets"][..., None], -1)[..., 0]
  return -(picked * data["mask"]).mean(), {"tokens": data["mask"].mean()}


def make_params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 2  # noqa: E731
  return {"w": draw(LAYERS, WIDTH, WIDTH)}, {"table": draw(VOCAB, WIDTH), "scale": np.float32(2)}


def make_batch(rows):
  rng = np.random.default_rng(1)
  ids = lambda: rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)  # noqa: E731
  mask = rng.integers(0, 2, (rows, LENGTH)).astype(np.float32)
  gain = (1 + np.arange(rows) / rows).astype(np.float32)
  return {"tokens": ids(), "targets": ids(), "mask": mask, "gain": gain}


@jax.jit
def in_one_piece(params, batch):
  """((loss, aux), gradients) on one device."""

  def loss(stages, shared):
    return head(shared, stage(stages, embed(shared, batch), batch), batch)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Toy:
  """A program of `size` stages."""

  size: int
  num_microbatches: int
  schedule: str = "1f1b"
  remat: bool = True
  width: int = WIDTH

  @property
  def mesh(self):
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((self.size,), ("stage",), auto, devices=jax.devices()[: self.size])

  @property
  def options(self):
    return {"num_microbatches": self.num_microbatches, "input_fn": embed, "remat": self.remat}

  def program(self):
    run = pipeline_value_and_grad(stage, head, schedule=self.schedule, **self.options)
    stages, whole = jax.P("stage"), jax.P()
    return jax.jit(
      jax.shard_map(
        run, mesh=self.mesh, in_specs=(stages, whole, whole), out_specs=(whole, (stages, whole))
      )
    )

  def loss_only(self):
    run = pipeline_loss(stage, head, **self.options)
    specs = (jax.P("stage"), jax.P(), jax.P())
    return jax.jit(jax.shard_map(run, mesh=self.mesh, in_specs=specs, out_specs=jax.P()))
