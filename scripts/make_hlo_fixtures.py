"""Compiles small programs ahead of time for 8 TPU or GPU chips and saves their optimized HLO.

The texts are the fixtures of `tests/jaxcomm/inspect`. No accelerator is needed, one package set is:

    pip install 'jaxcomm[aot-tpu]'                    # libtpu
    python scripts/make_hlo_fixtures.py --target tpu  # v5e:2x4

    pip install 'jaxcomm[aot-gpu]'                    # jax-cuda12-plugin, -pjrt, nvcc, runtime
    python scripts/make_hlo_fixtures.py --target gpu  # 8 H100 in one host

Source positions (`metadata`, `FileNames` to `StackFrames`) are removed from the text, nothing else.
Made with jax 0.10.2, libtpu 0.0.52, CUDA 12.9; another version may compile another program, so look
at what changed before committing new files.
"""

import argparse
import functools
import gzip
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxcomm import collectives, compressors
from jaxcomm.inspect import target
from jaxcomm.training import overlap_options

ROOT = pathlib.Path(__file__).parent.parent
TARGETS = {"tpu": "tpu:v5e:2x4", "gpu": "gpu:h100:1x8"}
AXES = ("replica", "data", "fsdp")
ROWS, COLUMNS = 64, 128  # of the local array that every collective below sends
DTYPES = ("float32", "bfloat16", "int8", "uint8")
SCAN_LENGTH = 5

# --- the five collectives, each from a local (ROWS, COLUMNS) array to another


def _all_gather(x, axes):
  return x + lax.all_gather(x, axes, tiled=True).sum(0, keepdims=True).astype(x.dtype)


def _reduce_scatter(x, axes):
  return jnp.concatenate([lax.psum_scatter(x, axes, tiled=True)] * lax.axis_size(axes))


def _collective_permute(x, axes):
  n = lax.axis_size(axes)
  return lax.ppermute(x, axes, [(i, (i + 1) % n) for i in range(n)])


KINDS = {
  "all-reduce": lax.psum,
  "all-gather": _all_gather,
  "reduce-scatter": _reduce_scatter,
  "all-to-all": lambda x, axes: lax.all_to_all(x, axes, 0, 0, tiled=True),
  "collective-permute": _collective_permute,
}

# --- where a collective stands; `step` is a traced scalar, so conditions are not known


def _scan(f, xs, length):
  return lax.scan(lambda carry, _: (f(carry), None), xs, None, length=length)[0]


def _cond(f, xs, step):
  return lax.cond(step % 3 == 0, f, lambda xs: xs, xs)


PLACES = {
  "plain": lambda f, xs, step: f(xs),
  "scan": lambda f, xs, step: _scan(f, xs, SCAN_LENGTH),
  "cond": _cond,
  "cond_in_scan": lambda f, xs, step: lax.scan(
    lambda carry, i: (_cond(f, carry, step + i), None), xs, jnp.arange(SCAN_LENGTH)
  )[0],
  "scan_in_cond": lambda f, xs, step: _cond(lambda xs: _scan(f, xs, SCAN_LENGTH), xs, step),
}


def collective_program(mesh, kind, place, axis_sets):
  """One collective per dtype and per axis set: a function and the shapes of its arguments."""

  def local(xs, step):
    def send(xs):
      return {(dtype, axes): KINDS[kind](x, axes) for (dtype, axes), x in xs.items()}

    return PLACES[place](send, xs, step)

  spec = P(AXES)
  f = jax.shard_map(local, mesh=mesh, in_specs=(spec, P()), out_specs=spec, check_vma=False)
  shape = (mesh.size * ROWS, COLUMNS)
  xs = {(d, axes): _array(mesh, shape, d, spec) for d in DTYPES for axes in axis_sets}
  return f, (xs, _array(mesh, (), "int32", P()))


# --- other programs


def narrow_program(mesh):
  """Elements of 4 and 8 bits that are not integers of one byte."""

  def local(xs):
    return jax.tree.map(
      lambda x: KINDS["all-to-all"](KINDS["collective-permute"](x, "data"), "data"), xs
    )

  f = jax.shard_map(local, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
  shape = (mesh.size * ROWS, COLUMNS)
  return f, ({d: _array(mesh, shape, d, P(AXES)) for d in ("int4", "float8_e4m3fn", "bool")},)


def branches_program(mesh):
  """A switch of three branches, one with a nested cond, and a collective outside."""

  def local(x, step):
    def heavy(x):
      y = lax.psum(x, "replica")
      return lax.cond(step > 7, lambda y: y + lax.psum(2 * y, "fsdp"), lambda y: y, y)

    x = KINDS["collective-permute"](x, "data")
    light = functools.partial(KINDS["all-to-all"], axes="data")
    return lax.switch(step, [lambda x: x, light, heavy], x)

  f = jax.shard_map(local, mesh=mesh, in_specs=(P(AXES), P()), out_specs=P(AXES), check_vma=False)
  x = _array(mesh, (mesh.size * ROWS, COLUMNS), "float32", P(AXES))
  return f, (x, _array(mesh, (), "int32", P()))


def unknown_loop_program(mesh):
  """A loop that ends when the data says so, with a collective inside."""

  def local(x):
    def grow(x):
      return 2 * KINDS["collective-permute"](x, "data")

    return lax.while_loop(lambda x: lax.psum(x.sum(), AXES) < 1e6, grow, x)

  f = jax.shard_map(local, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
  return f, (_array(mesh, (mesh.size * ROWS, COLUMNS), "float32", P(AXES)),)


def ragged_program(mesh):
  """`ragged_all_to_all`, whose bytes depend on the data."""

  def local(x):
    sizes = jnp.full(2, ROWS // 2, jnp.int32)
    offsets = jnp.arange(2, dtype=jnp.int32) * (ROWS // 2)
    mine = jnp.zeros(2, jnp.int32) + lax.axis_index("data") * (ROWS // 2)
    return lax.ragged_all_to_all(x, 0 * x, offsets, sizes, mine, sizes, axis_name="data")

  f = jax.shard_map(local, mesh=mesh, in_specs=P(AXES), out_specs=P(AXES), check_vma=False)
  return f, (_array(mesh, (mesh.size * ROWS, COLUMNS), "float32", P(AXES)),)


TOKENS, MODEL, HIDDEN, LAYERS = 2048, 4096, 16384, 3


def ladder_program(mesh):
  """Tensor-parallel layers whose all-reduce is used one layer later: room to run it beside."""

  def local(w_in_LDF, w_out_LFD, x_TD):
    pending_TD = jnp.zeros_like(x_TD)
    for w_in_DF, w_out_FD in zip(w_in_LDF, w_out_LFD):
      out_TD = jax.nn.gelu(x_TD @ w_in_DF) @ w_out_FD
      x_TD, pending_TD = x_TD + pending_TD, lax.psum(out_TD, "tensor")
    return x_TD + pending_TD

  specs = (P(None, None, "tensor"), P(None, "tensor"), P("data"))
  f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
  return f, _ladder_arguments(mesh, *specs)


def fsdp_grad_program(mesh):
  """The gradient of scanned layers whose weights are gathered over `data` when needed."""

  def local(w_in_LDF, w_out_LFD, x_TD):
    def layer(x_TD, weights):
      w_in_DF = lax.all_gather(weights[0], "data", axis=0, tiled=True)
      w_out_FD = lax.all_gather(weights[1], "data", axis=1, tiled=True)
      return x_TD + jax.nn.gelu(x_TD @ w_in_DF) @ w_out_FD, None

    return lax.scan(jax.checkpoint(layer), x_TD, (w_in_LDF, w_out_LFD))[0]

  specs = (P(None, "data", "tensor"), P(None, "tensor", "data"), P("data"))
  f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
  grad = jax.grad(lambda *args: (f(*args).astype(jnp.float32) ** 2).sum(), argnums=(0, 1))
  return grad, _ladder_arguments(mesh, *specs)


def auto_grad_program(mesh):
  """The gradient of one layer that XLA's partitioner shards: groups in iota or in mesh form."""

  def loss(w_in_LDF, w_out_LFD, x_TD):
    for w_in_DF, w_out_FD in zip(w_in_LDF[:2], w_out_LFD[:2]):
      x_TD = x_TD + jax.nn.gelu(x_TD @ w_in_DF) @ w_out_FD
    return (x_TD.astype(jnp.float32) ** 2).sum()

  specs = (P(None, "data", "tensor"), P(None, "tensor", "data"), P("data"))
  return jax.grad(loss, argnums=(0, 1)), _ladder_arguments(mesh, *specs)


def diloco_program(mesh):
  """A step that averages parameters over `replica` in one byte per element, sometimes.

  Manual over `replica`, automatic over `fsdp`; the sync is manual over both, shard by shard.
  """

  def quantize(x):
    scale = jnp.max(jnp.abs(x), -1, keepdims=True) / 127
    return jnp.round(x / jnp.where(scale > 0, scale, 1) + 128).astype(jnp.uint8), scale

  def dequantize(code, scale):
    return (code.astype(jnp.float32) - 128) * scale

  def mean_of_shards(w):
    blocks = w.reshape(lax.axis_size("replica"), -1, COLUMNS)
    sent = [lax.all_to_all(a, "replica", 0, 0) for a in quantize(blocks)]
    got = [lax.all_gather(a, "replica") for a in quantize(dequantize(*sent).mean(0))]
    return dequantize(*got).reshape(w.shape)

  def local_step(w, x, step):
    w = w - 1e-3 * jax.grad(lambda w: jnp.mean((x @ w[0]) ** 2))(w)
    spec = P(None, "fsdp")
    sync = jax.shard_map(
      mean_of_shards, in_specs=spec, out_specs=spec, axis_names={"fsdp"}, check_vma=False
    )
    return lax.cond(step % 20 == 0, sync, lambda w: w, w)

  f = jax.shard_map(
    local_step,
    mesh=mesh,
    in_specs=(P("replica"), P("replica"), P()),
    out_specs=P("replica"),
    axis_names={"replica"},
    check_vma=False,
  )
  w = _array(mesh, (mesh.shape["replica"], 512, 256), "float32", P("replica", "fsdp"))
  x = _array(mesh, (mesh.shape["replica"] * 32, 512), "float32", P("replica"))
  return f, (w, x, _array(mesh, (), "int32", P()))


# Rows of the local array that each quantized collective sends; some need padding.
QUANTIZED_ROWS = {
  "all_gather": 5,
  "psum_scatter": 9,
  "ring": 10,
  "psum": 11,
  "all_to_all": 12,
  "hierarchical": 13,
}
# What each fixture holds: every collective once, every format once.
QUANTIZED_FIXTURES = {
  4: ("all_gather", "ring", "all_to_all", "hierarchical"),
  8: ("psum",),
  "fp8": ("psum_scatter",),
}


def quantized_program(mesh, bits, names):
  """The named quantized collectives, over `gpu`; the hierarchical one over `node` too."""
  options = {"bits": bits, "block_size": 64}
  ops = {
    "all_gather": lambda x: collectives.quantized_all_gather(x, "gpu", **options),
    "psum_scatter": lambda x: collectives.quantized_psum_scatter(x, "gpu", **options),
    "ring": lambda x: collectives.quantized_psum_scatter(x, "gpu", algorithm="ring", **options),
    "psum": lambda x: collectives.quantized_psum(x, "gpu", **options),
    "all_to_all": lambda x: collectives.quantized_all_to_all(x, "gpu", 0, 1, **options),
    "hierarchical": lambda x: collectives.hierarchical_psum_scatter(x, ("gpu", "node"), **options),
  }

  def local(x):
    return {name: ops[name](x[: QUANTIZED_ROWS[name]]).reshape(1, -1) for name in names}

  spec = P(("node", "gpu"))
  f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return f, (_array(mesh, (mesh.size * 16, COLUMNS), "float32", spec),)


# Every compressor, with what its messages look like in HLO.
MESSAGES = {
  compressors.identity(): "f32",
  compressors.int8(16): "u8",
  compressors.int4(16, "stochastic"): "u8",
  compressors.BlockInt(3, 16): "u8",
  compressors.e3m0(16): "u8",
  compressors.fp8("e4m3", 16): "u8",
  compressors.fp8("e5m2", 16): "u8",
  compressors.qsgd(5, 16): "u8",
  compressors.natural(): "u8",
  compressors.scaled_sign(): "u8",
  compressors.top_k(5): "u8",
  compressors.rand_k(6, shared_support=True): "f32",
  compressors.rand_k(7, shared_support=True, value_dtype="bfloat16"): "u16",
  compressors.bernoulli(0.25): "u8",
  compressors.blockwise(compressors.scaled_sign(), 16): "u8",
  compressors.chain_compressors(compressors.int8(16), compressors.top_k(8)): "u8",
  compressors.induced(compressors.scaled_sign(), compressors.natural()): "u8",
  compressors.contractive(compressors.natural()): "u8",
  compressors.hadamard(compressors.int8(16), 8): "u8",
  compressors.top_z_kmeans(0.5, 8): "u8",
}
MESSAGE_SHAPE = (3, 11)


def message_tree(x):
  return {"weight": x, "row": x[0], "bias": x[0, :4]}


def messages_program(mesh):
  """Means over `gpu` with the messages of every compressor; LoCo; a tree."""
  key = jax.random.key(0)

  def local(x):
    x = x[0]
    keys = jax.random.split(key, len(MESSAGES))  # equal ones would let XLA merge equal messages
    means = [collectives.allgather_pmean(x, "gpu", c, key=k) for c, k in zip(MESSAGES, keys)]
    loco, _ = collectives.loco_psum_scatter(x, collectives.loco_init(x), "gpu")
    tree = collectives.tree_compressed_pmean(message_tree(x), "gpu", compressors.int8(), min_size=9)
    return jax.tree.map(lambda a: a[None], (means, loco, tree))

  spec = P(("node", "gpu"))
  f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  return f, (_array(mesh, (mesh.size, *MESSAGE_SHAPE), "float32", spec),)


def _ladder_arguments(mesh, w_in_spec, w_out_spec, x_spec):
  return (
    _array(mesh, (LAYERS, MODEL, HIDDEN), "bfloat16", w_in_spec),
    _array(mesh, (LAYERS, HIDDEN, MODEL), "bfloat16", w_out_spec),
    _array(mesh, (TOKENS, MODEL), "bfloat16", x_spec),
  )


def _array(mesh, shape, dtype, spec):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


# --- compiling for a target


def _programs(devices):
  """Yields (file name, program, whether to ask for asynchronous collectives)."""

  def mesh(**shape):
    grid = np.array(devices).reshape(*shape.values())
    return jax.sharding.Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))

  cube = mesh(replica=2, data=2, fsdp=2)
  for kind in KINDS:
    for place in PLACES:
      axis_sets = (("data",), ("replica", "fsdp"))
      yield f"{kind}-{place}", collective_program(cube, kind, place, axis_sets), False
  yield "narrow", narrow_program(cube), False
  yield "branches", branches_program(cube), False
  yield "unknown_loop", unknown_loop_program(cube), False
  yield "ragged", ragged_program(cube), False
  layers = mesh(data=2, tensor=4)
  yield "ladder", ladder_program(layers), True
  yield "fsdp_grad", fsdp_grad_program(layers), True
  yield "auto_grad", auto_grad_program(layers), False
  yield "diloco", diloco_program(mesh(replica=2, fsdp=4)), False
  for bits, names in QUANTIZED_FIXTURES.items():
    yield f"quantized_{bits}", quantized_program(mesh(node=2, gpu=4), bits, names), False
  yield "messages", messages_program(mesh(node=4, gpu=2)), False


def _without_sources(text):
  text = re.sub(r", metadata=\{(?:\"(?:\\.|[^\"\\])*\"|[^{}\"])*\}", "", text)
  tables = r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(?:\d+ .*\n)*\n*"
  return re.sub(tables, "", text, flags=re.MULTILINE)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--target", choices=TARGETS, required=True)
  parser.add_argument("--only", default="", help="make only files whose names begin so")
  platform, only = parser.parse_args().target, parser.parse_args().only
  out = ROOT / "tests" / "jaxcomm" / "inspect" / "fixtures" / platform
  out.mkdir(parents=True, exist_ok=True)
  devices = target(TARGETS[platform]).devices
  for name, (f, arguments), is_async in _programs(devices):
    if not name.startswith(only):
      continue
    options = overlap_options(devices[0]) if is_async else None
    text = jax.jit(f).lower(*arguments).compile(compiler_options=options).as_text() or ""
    data = gzip.compress(_without_sources(text).encode(), mtime=0)
    (out / f"{name}.txt.gz").write_bytes(data)
    print(f"{platform}/{name}: {len(text)} characters, {len(data)} bytes", flush=True)


if __name__ == "__main__":
  main()
