"""Memory and permutes of ring attention over 131,072 tokens, compiled for accelerators not here.

    pip install 'jaxcomm[aot-gpu]'                       # or [aot-tpu]
    python scripts/aot_ring.py --target gpu:h100:1x8     # or tpu:v5e:2x4

Llama 3 8B's attention (32 query and 8 key heads of width 128), bfloat16, batch 1, zigzag over the
devices; and dense attention of the same tokens on one device. Expected: the ring fits, forward and
gradient, with W - 1 permutes per pass; dense does not.
"""

import argparse
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.inspect import collective_bytes, target
from parallel import ring_attention

HEADS, KEY_HEADS, WIDTH = 32, 8, 128


def attention(mesh, tokens: int):
  """The function and its arguments: over the ring, or dense where the mesh has one device."""
  if mesh.size == 1:
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
  else:
    spec = jax.P(None, "seq")
    local = functools.partial(ring_attention, axis_name="seq", layout="zigzag")
    attend = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
  cut = jax.NamedSharding(mesh, jax.P(None, "seq"))
  shapes = ((1, tokens, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
  return attend, [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=cut) for s in shapes]


def passes(attend):
  """The forward pass, and the forward pass with the gradient of all inputs."""

  def loss(*args):
    return attend(*args).astype(jnp.float32).sum()

  return {"forward": attend, "forward and gradient": jax.value_and_grad(loss, argnums=(0, 1, 2))}


def report(mesh, tokens: int, capacity: int) -> None:
  """Compiles both passes and prints a line for each."""
  attend, args = attention(mesh, tokens)
  for name, function in passes(attend).items():
    compiled = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # which only some back ends lack
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    wire = collective_bytes(compiled, mesh)
    permutes = len({op.name for op in wire.ops if op.kind == "collective-permute"})
    runs = sum({op.name: op.times for op in wire.ops}.values())
    print(
      f"{mesh.size} devices, {name}: {size / 2**30:,.2f} GiB per device of"
      f" {capacity / 2**30:.1f} ({'fits' if size <= capacity else 'does not fit'};"
      f" temporary {memory.temp_size_in_bytes / 2**30:,.2f}); {permutes} collective-permutes run"
      f" {runs} times, {wire.total / 2**20:,.0f} MiB sent per device",
      flush=True,
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", default="gpu:h100:1x8", help="as jaxcomm.inspect.target takes it")
  parser.add_argument("--tokens", type=int, default=131_072)
  flags = parser.parse_args()
  chosen = target(flags.target)
  print(f"{chosen.name}, {flags.tokens:,} tokens, JAX {importlib.metadata.version('jax')}")
  for devices in (chosen.devices, chosen.devices[:1]):
    mesh = jax.sharding.Mesh(np.array(devices), ("seq",))
    report(mesh, flags.tokens, chosen.memory_bytes)


if __name__ == "__main__":
  main()
