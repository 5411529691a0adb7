"""Which all-reduces of a ladder run beside matrix products, compiled for accelerators not here.

    pip install 'jaxcomm[aot-gpu]'                          # or [aot-tpu]
    python scripts/aot_ladder.py --target gpu:h100:1x8      # or tpu:v5e:2x4, tpu:v5p:4x4x4
    python scripts/aot_ladder.py --preset llama3_70b --out aot.jsonl     # skips what is in the file

Layers of the preset's shape, bfloat16, abstract parameters, weights cut over eight devices by hand;
a target with more of them has several such groups, each with its own rows of the batch.
Prints for each program its all-reduces in order (the first is that of the embedding): how many
matrix products run between start and end, or why none does; "overlapped" means smaller kernels
only. What was seen is in docs/methods/ladder.md.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.inspect import overlap_report, target
from jaxcomm.training import overlap_options
from jaxcomm.training._compiler_options import change_options
from models import ladder, llama
from parallel import mesh_specs
from parallel.mesh import DATA, TENSOR

GROUP = 8  # devices that the weights are cut over


def build_config(preset: str, residual: Any, layers: int, scan: bool) -> ladder.LadderConfig:
  """The preset with fewer layers; its small vocabulary hides nothing."""
  base = dataclasses.replace(
    getattr(llama, preset)(),
    num_layers=layers, vocab_size=1024, param_dtype="bfloat16", scan_layers=scan,
  )  # fmt: skip
  fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
  return ladder.LadderConfig(**fields, residual=residual)


def compile_pass(cfg: ladder.LadderConfig, mesh, batch: int, seq_len: int, gradient: bool):
  """The compiled program, of `batch` rows per group of devices."""
  shapes = jax.eval_shape(lambda: ladder.init(jax.random.key(0), cfg))
  specs = mesh_specs(ladder.specs(cfg), shapes, mesh)
  tokens = jax.ShapeDtypeStruct(
    (batch * mesh.shape[DATA], seq_len), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P(DATA))
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

  out = specs if gradient else jax.P(DATA, None, TENSOR)
  program = jax.shard_map(local, mesh=mesh, in_specs=(specs, jax.P(DATA)), out_specs=out)
  options = overlap_options(mesh.devices.flat[0])
  return jax.jit(program).lower(params, tokens).compile(compiler_options=options)


def large_all_reduces(compiled, mesh) -> list[dict[str, Any]]:
  """Of each all-reduce between the devices of a group: what runs beside it, or why nothing does."""
  found = overlap_report(compiled, mesh).collectives
  return [
    {
      "matmuls": c.num_matmuls,
      "times": c.times,
      "reason": c.reason,
      "synchronous": not c.asynchronous,
      "waits_for": c.waits_for,
      "needed_by": c.needed_by,
      "not_put_there": [work.name for work in c.available],
    }
    for c in found
    if c.kind == "all-reduce" and c.axis == TENSOR and c.bytes > 1e5
  ]


def describe(found: list[dict[str, Any]]) -> str:
  """One line, with a part for each all-reduce."""
  parts = []
  for c in found:
    part = str(c["matmuls"] or c["reason"])
    if c["reason"] == "dependency":
      part += f" of {c['needed_by'] or 'the result'} on {c['waits_for'] or 'the arguments'}"
    if c["reason"] == "scheduler":
      part += f" left out {', '.join(c['not_put_there'][:3])}"
    parts.append(part + (f" (x{c['times']})" if c["times"] > 1 else ""))
  return f"{len(found)} all-reduces, matrix products beside each: {', '.join(parts)}"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", default="gpu:h100:1x8", help="as jaxcomm.inspect.target takes it")
  parser.add_argument(
    "--preset", default="llama3_8b", help="of models.llama, for the layers' shape"
  )
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--batch", type=int, default=4, help="rows per group of eight devices")
  parser.add_argument("--seq-len", type=int, default=1024)
  parser.add_argument("--residuals", nargs="+", default=["standard", "ladder", "parallel"])
  parser.add_argument("--compiler-options", nargs="*", default=[], metavar="NAME=VALUE")
  parser.add_argument("--out", help="file of JSON lines; programs that are in it are skipped")
  flags = parser.parse_args()
  change_options(flags.compiler_options)
  chosen = target(flags.target)
  mesh = jax.sharding.Mesh(np.array(chosen.devices).reshape(-1, GROUP), (DATA, TENSOR))
  print(f"{chosen.name}, {flags.preset}, {flags.layers} layers", flush=True)
  out = None if flags.out is None else pathlib.Path(flags.out)
  lines = out.read_text().splitlines() if out is not None and out.exists() else []
  seen = [{k: v for k, v in json.loads(line).items() if k != "all_reduces"} for line in lines]
  for residual, scan, gradient in itertools.product(flags.residuals, (False, True), (False, True)):
    key = {k: v for k, v in vars(flags).items() if k not in ("residuals", "out")}
    key |= {"residual": residual, "scanned": scan, "gradient": gradient}
    key |= {"jax": importlib.metadata.version("jax")}
    if key in seen:
      continue
    cfg = build_config(flags.preset, residual, flags.layers, scan)
    compiled = compile_pass(cfg, mesh, flags.batch, flags.seq_len, gradient)
    found = large_all_reduces(compiled, mesh)
    name = f"{residual}, {'scanned' if scan else 'unrolled'}"
    print(f"{name}, {'gradient' if gradient else 'forward'}: {describe(found)}", flush=True)
    if out is not None:
      with out.open("a") as file:
        file.write(json.dumps(key | {"all_reduces": found}) + "\n")


if __name__ == "__main__":
  main()
