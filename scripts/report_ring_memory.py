"""Temporary memory of ring attention, forward and backward, per device, of compiled programs.

    python scripts/report_ring_memory.py     # compiles for virtual CPU devices, runs nothing

32 query heads and 8 key heads of width 128, bfloat16, zigzag, tokens cut over the devices. XLA:CPU
widens bfloat16 products to float32. Expected: it follows the tokens of a device, not the sequence.
"""

import functools

import jax
import jax.numpy as jnp

from parallel import ring_attention

CASES = ((32_768, 8), (65_536, 4), (131_072, 8))  # tokens of the sequence, devices


def memory(tokens: int, num_devices: int) -> int:
  """Bytes of temporary memory per device."""
  mesh = jax.make_mesh((num_devices,), ("seq",), devices=jax.devices()[:num_devices])
  cut = jax.NamedSharding(mesh, jax.P(None, "seq"))
  heads = (32, 8, 8)
  args = [jax.ShapeDtypeStruct((1, tokens, h, 128), jnp.bfloat16, sharding=cut) for h in heads]
  attend = functools.partial(ring_attention, axis_name="seq", layout="zigzag")

  def gradients(*args):
    return jax.grad(lambda *args: attend(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))(*args)

  spec = jax.P(None, "seq")
  local = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3)
  analysis = jax.jit(local).lower(*args).compile().memory_analysis()
  assert analysis is not None  # which only some back ends lack
  return analysis.temp_size_in_bytes


def main() -> None:
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(n for _, n in CASES))
  print(f"JAX {jax.__version__}")
  for tokens, num_devices in CASES:
    size = memory(tokens, num_devices) / 2**20
    print(f"{tokens:>8,} tokens, {num_devices} devices: {size:,.0f} MiB")


if __name__ == "__main__":
  main()
