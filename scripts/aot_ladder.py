"""Which all-reduces of a ladder run beside matrix products, compiled for accelerators not here.

    pip install 'jaxcomm[aot-gpu]'                          # or [aot-tpu]
    python scripts/aot_ladder.py --target gpu:h100:1x8      # or tpu:v5e:2x4

Layers of Llama 3 8B's shape, bfloat16, weights cut over all devices by hand, abstract parameters.
Prints for each program its all-reduces in order (the first is that of the embedding): how many
matrix products run between start and end, or why none does; "overlapped" means smaller kernels
only. Seen on gpu:h100:1x8, forward: unrolled, every all-reduce of the ladder but the last has 2 or
3; scanned, both in the loop's body have; of the standard model none has any.
"""

import argparse
import dataclasses
import importlib.metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.inspect import overlap_report, target
from jaxcomm.training import overlap_options
from jaxcomm.training._compiler_options import change_options
from models import ladder, llama
from parallel import mesh_specs
from parallel.mesh import TENSOR


def build_config(residual: Any, layers: int, scan: bool) -> ladder.LadderConfig:
  """Llama 3 8B with fewer layers; its small vocabulary hides nothing."""
  base = dataclasses.replace(
    llama.llama3_8b(), num_layers=layers, vocab_size=1024, param_dtype="bfloat16", scan_layers=scan
  )
  fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
  return ladder.LadderConfig(**fields, residual=residual)


def compile_pass(cfg: ladder.LadderConfig, mesh, batch: int, seq_len: int, gradient: bool):
  """The compiled program, of one batch on all devices."""
  shapes = jax.eval_shape(lambda: ladder.init(jax.random.key(0), cfg))
  specs = mesh_specs(ladder.specs(cfg), shapes, mesh)
  tokens = jax.ShapeDtypeStruct(
    (batch, seq_len), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P())
  )
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)),
    shapes,
    specs,
  )

  def local(params, tokens):
    if not gradient:
      return ladder.apply(params, tokens, cfg)[0]
    batch = {"tokens": tokens, "targets": tokens}
    return jax.grad(lambda p: ladder.loss(p, batch, cfg)[0])(params)

  out = specs if gradient else jax.P(None, None, TENSOR)
  program = jax.shard_map(local, mesh=mesh, in_specs=(specs, jax.P()), out_specs=out)
  options = overlap_options(mesh.devices.flat[0])
  return jax.jit(program).lower(params, tokens).compile(compiler_options=options)


def describe(compiled, mesh) -> str:
  """The number of matrix products beside each large all-reduce, or the reason for none."""
  found = overlap_report(compiled, mesh).collectives
  large = [c for c in found if c.kind == "all-reduce" and c.bytes > 1e5]
  rows = [
    (str(c.num_matmuls) if c.num_matmuls else c.reason) + (f" (x{c.times})" if c.times > 1 else "")
    for c in large
  ]
  return f"{len(large)} all-reduces, matrix products beside each: {', '.join(rows)}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", default="gpu:h100:1x8", help="as jaxcomm.inspect.target takes it")
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--seq-len", type=int, default=1024)
  parser.add_argument("--residuals", nargs="+", default=["standard", "ladder", "parallel"])
  parser.add_argument("--compiler-options", nargs="*", default=[], metavar="NAME=VALUE")
  flags = parser.parse_args()
  change_options(flags.compiler_options)
  chosen = target(flags.target)
  mesh = jax.sharding.Mesh(np.array(chosen.devices), (TENSOR,))
  print(f"{chosen.name}, {flags.layers} layers, JAX {importlib.metadata.version('jax')}")
  for residual in flags.residuals:
    for scan in (False, True):
      for gradient in (False, True):
        cfg = build_config(residual, flags.layers, scan)
        compiled = compile_pass(cfg, mesh, flags.batch, flags.seq_len, gradient)
        name = f"{residual}, {'scanned' if scan else 'unrolled'}"
        name += ", gradient" if gradient else ", forward"
        print(f"{name}: {describe(compiled, mesh)}", flush=True)


if __name__ == "__main__":
  main()
