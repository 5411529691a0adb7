"""Programs run by several processes, and by virtual devices of one process, to be compared."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm import _axes, collectives, compressed_mean, e3m0, int4, int8, pmean_over, transforms
from jaxcomm.collectives import quantized_pmean

P = jax.sharding.PartitionSpec
Program = Callable[[jax.Array], jax.Array]
SIZE = 5003  # elements per device: prime, so that chunks and blocks are padded


def inputs(num_devices: int, size: int = SIZE) -> np.ndarray:
  """float32[N, size], a row per device, of mixed magnitude."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((num_devices, size)) * np.exp(rng.standard_normal((num_devices, size)))
  return x.astype(np.float32)


def on_mesh(program: Program, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
  """`program` of the local row, lifted to float32[N, size] sharded over `replica`."""

  def local(x):
    return _axes.vary(program(x[0]), "replica")[None]

  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("replica"), out_specs=P("replica")))


def _transform(tx) -> Program:
  """Two updates, so that residuals and counters take part."""

  def program(x):
    state = tx.init(x)
    first, state = tx.update(x, state)
    second, _ = tx.update(x * 0.5, state)
    return jnp.concatenate([first, second])

  return program


def _training(tx) -> Program:
  """Four steps from the local row, whose gradient is itself."""

  def program(x):
    params, state = x, tx.init(x)
    for _ in range(4):
      updates, state = tx.update(params, state, params)
      params = optax.apply_updates(params, updates)
    return params

  return program


def _gossip() -> dict[str, Program]:
  """Two replicas have one partner; what differs is how its message is used."""
  ring, inner = collectives.ring(), optax.sgd(0.1)
  return {
    "gossip_mix": lambda x: collectives.gossip_mix(x, "replica", ring, steps=3),
    "noloco": _training(transforms.noloco(inner, sync_period=2)),
    "sgp": _training(transforms.sgp(inner)),
    "sgp_overlap": _training(transforms.sgp(inner, overlap=True)),
    "dfedsam": _training(transforms.dfedsam(inner, ring, sync_period=2)),
  }


def _next_in_ring(x):
  n = jax.lax.axis_size("replica")
  return jax.lax.ppermute(x, "replica", [(i, (i + 1) % n) for i in range(n)])


def _rows(x):
  """One row for each device, padded."""
  n = jax.lax.axis_size("replica")
  return jnp.pad(x, (0, -x.size % n)).reshape(n, -1)


def _compressed() -> dict[str, Program]:
  """With feedback the first update is the plain one: one compressor without it is enough."""
  compressors = {
    "int8": int8(),
    "int4": int4(),
    "int4_stochastic": int4(rounding="stochastic"),
    "e3m0": e3m0(),
  }
  return {
    f"{algorithm}_{name}_{'feedback' if feedback else 'plain'}": _transform(
      compressed_mean("replica", compressor, algorithm=algorithm, error_feedback=feedback)
    )
    for algorithm in ("two_hop", "all_gather")
    for name, compressor in compressors.items()
    for feedback in ((False, True) if name == "int8" else (True,))
  }


def _quantized() -> dict[str, Program]:
  scatter = functools.partial(collectives.quantized_psum_scatter, axis_name="replica")
  return {
    "quantized_psum": lambda x: collectives.quantized_psum(x, "replica", bits="fp8"),
    "quantized_all_gather": lambda x: collectives.quantized_all_gather(x, "replica", bits=4),
    "quantized_psum_scatter": functools.partial(scatter, hadamard=32),
    "quantized_psum_scatter_ring": functools.partial(scatter, algorithm="ring"),
    "quantized_all_to_all": lambda x: collectives.quantized_all_to_all(_rows(x), "replica", 0, 1),
  }


PROGRAMS: dict[str, Program] = {
  "psum": lambda x: jax.lax.psum(x, "replica"),
  "pmean_over": _transform(pmean_over("replica")),
  "psum_scatter": lambda x: jax.lax.psum_scatter(_rows(x), "replica"),
  "all_gather": lambda x: jax.lax.all_gather(x, "replica"),
  "all_to_all": lambda x: jax.lax.all_to_all(_rows(x), "replica", 0, 0),
  "ppermute": _next_in_ring,
  "quantized_pmean_8": lambda x: quantized_pmean(x, "replica", bits=8),
  "quantized_pmean_4": lambda x: quantized_pmean(x, "replica", bits=4),
  "quantized_pmean_gradient": jax.grad(
    lambda x: (quantized_pmean(x, "replica", bits=8) ** 2).sum()
  ),
  **_gossip(),
  **_quantized(),
  **_compressed(),
}

MILLION = 2**20
# name -> float32 elements per device, program; each sends 4 MB or more per device.
WIRES: dict[str, tuple[int, Program]] = {
  "psum": (4 * MILLION, PROGRAMS["psum"]),
  "quantized_pmean_8": (8 * MILLION, PROGRAMS["quantized_pmean_8"]),
  "quantized_pmean_4": (8 * MILLION, PROGRAMS["quantized_pmean_4"]),
  "ppermute": (2 * MILLION, PROGRAMS["ppermute"]),
  "all_gather": (2 * MILLION, PROGRAMS["all_gather"]),
  "all_to_all": (4 * MILLION, PROGRAMS["all_to_all"]),
  "psum_scatter": (4 * MILLION, PROGRAMS["psum_scatter"]),
}
