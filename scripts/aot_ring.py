"""Memory and permutes of ring attention over 131,072 tokens, compiled for accelerators not here.

    pip install 'jaxcomm[aot-gpu]'                       # or [aot-tpu]
    python scripts/aot_ring.py --target gpu:h100:1x8     # or tpu:v5e:2x4

Llama 3 8B's attention (32 query and 8 key heads of width 128), bfloat16, batch 1, zigzag over the
devices; and dense attention of the same tokens on one device. Expected: the ring fits, forward and
gradient, and sends W - 1 messages per pass; dense does not.
"""

import argparse
import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.inspect import collective_bytes, target
from parallel import ring_attention, ring_attention_bytes

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
    lowered = jax.jit(function).lower(*args)
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:  # XLA:TPU compiles nothing that does not fit
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      print(f"{mesh.size} devices, {name}: does not fit: {str(e).splitlines()[0]}", flush=True)
      continue
    memory = compiled.memory_analysis()
    assert memory is not None  # which only some back ends lack
    size = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    print(
      f"{mesh.size} devices, {name}: {size / 2**30:,.2f} GiB per device of"
      f" {capacity / 2**30:.1f} ({'fits' if size <= capacity else 'does not fit'};"
      f" temporary {memory.temp_size_in_bytes / 2**30:,.2f})",
      flush=True,
    )
    if mesh.size > 1:
      print(f"  {hops(compiled, mesh, tokens, backward=name != 'forward')}", flush=True)


def hops(compiled, mesh, tokens: int, *, backward: bool) -> str:
  """What is sent, and what W - 1 messages per pass would be."""
  shape = (1, tokens // mesh.size, KEY_HEADS, WIDTH)
  count = functools.partial(ring_attention_bytes, shape, mesh.size, dtype=jnp.bfloat16)
  want = count() + (count(backward=True) if backward else 0)
  wire = collective_bytes(compiled, mesh)
  kinds = ", ".join(wire.by_kind)
  return (
    f"{wire.total:,.0f} bytes sent per device by {kinds}; W - 1 = {mesh.size - 1} messages per"
    f" pass are {want:,}"
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
