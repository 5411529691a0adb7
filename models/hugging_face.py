"""Hugging Face folders, in and out: config.json and safetensors.

Tensors are read slice by slice from memory-mapped files, transposed to our layout and put where
they belong, so that no process holds more of the model than its devices do. Nothing is unpickled.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models import _llama_hf, _safetensors, llama
from parallel.sharding import DEFAULT_RULES, Rules, mesh_specs, named_shardings

_log = logging.getLogger(__name__)

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """A leaf as tensors of a file: one, or one per layer."""

  names: tuple[str, ...]  # by layer, or a single one
  stacked: bool  # the leaf has a leading dimension of layers
  dims: tuple[str, ...]  # letters of each dimension in the file
  letters: str  # of the leaf, without L
  shape: tuple[int, ...]  # of the leaf, without L

  def file_shape(self) -> tuple[int, ...]:
    sizes = dict(zip(self.letters, self.shape))
    return tuple(math.prod(sizes[letter] for letter in dim) for dim in self.dims)

  def read(self, reader: _safetensors.Reader, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Elements `index` of the leaf, without L."""
    sizes = dict(zip(self.letters, self.shape))
    wanted = {k: s.indices(n)[:2] for (k, n), s in zip(sizes.items(), index)}
    rows, inner, counts = [], [], []
    for dim in self.dims:
      first, rest = dim[0], dim[1:]
      width = math.prod(sizes[letter] for letter in rest)
      start, stop = wanted[first]
      rows.append(slice(start * width, stop * width))
      inner += [slice(None), *(slice(*wanted[letter]) for letter in rest)]
      counts += [stop - start, *(sizes[letter] for letter in rest)]
    block = reader.read(name, tuple(rows)).reshape(counts)[tuple(inner)]
    return block.transpose([_order(self.dims).index(letter) for letter in self.letters])

  def to_file(self, leaf: np.ndarray) -> np.ndarray:
    """The tensor of the file from the leaf, without L."""
    order = [self.letters.index(letter) for letter in _order(self.dims)]
    return leaf.transpose(order).reshape(self.file_shape())


def _order(dims: tuple[str, ...]) -> str:
  return "".join(dims)


def _tensors(cfg: llama.LlamaConfig) -> Params:
  """Tree like the parameters with a `_Tensor` for every leaf."""
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))

  def tensor(leaf_name, leaf, table, layers):
    name, dims = table[leaf_name]
    letters = leaf_name.rpartition("_")[2]
    if layers is None:
      return _Tensor((name,), False, dims, letters, leaf.shape)
    names = tuple(_llama_hf.LAYER_NAME.format(i, name) for i in range(layers))
    return _Tensor(names, True, dims, letters, leaf.shape[1:])

  layers = shapes.pop("layers")
  tree: Params = {k: tensor(k, v, _llama_hf.OUTER, None) for k, v in shapes.items()}
  count = cfg.num_layers
  tree["layers"] = {k: tensor(k, v, _llama_hf.LAYER, count) for k, v in layers.items()}
  return tree


def load_hf(
  path: str | pathlib.Path,
  *,
  mesh: jax.sharding.Mesh | None = None,
  rules: Rules = DEFAULT_RULES,
  param_dtype: str | None = None,
) -> tuple[ModuleType, llama.LlamaConfig, Params]:
  """The model in a Hugging Face folder: `arch.apply(params, tokens, cfg)` gives its logits.

  Args:
    path: folder with config.json (`model_type` "llama") and safetensors, one file or several
      with an index. Both layouts of the RoPE entries are read.
    mesh: the parameters are sharded over it; every process reads only what its devices hold.
      Default: all on the default device.
    rules: from logical axes to those of `mesh`.
    param_dtype: "float32" or "bfloat16"; default bfloat16 if all tensors are, else float32.

  Returns:
    (arch, cfg, params): the module `models.llama`, its config, and parameters as its `init` makes
    them. `cfg.dtype` is bfloat16 where config.json says so and float32 elsewhere.

  Raises:
    FileNotFoundError: no config.json in `path`.
    ValueError: another `model_type`, a damaged file, missing or unknown tensors (all listed), a
      wrong shape, or weights in Meta's layout, whose rows of q and k are in another order.
    NotImplementedError: another kind of RoPE than plain and "llama3".

  Example:
    >>> import tempfile
    >>> cfg = llama.nano()
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> save_hf(llama.init(jax.random.key(0), cfg), cfg, folder)
    >>> arch, cfg, params = load_hf(folder)
    >>> arch.apply(params, jnp.zeros((1, 4), int), cfg)[0].shape
    (1, 4, 512)
  """
  reader, cfg, tensors = _open(path, param_dtype)
  return (
    llama,
    cfg,
    jax.tree.map(
      lambda tensor, sharding: _load_leaf(reader, tensor, sharding, cfg),
      tensors,
      _shardings(cfg, mesh, rules),
      is_leaf=lambda x: isinstance(x, _Tensor),
    ),
  )


def load_hf_config(path: str | pathlib.Path) -> tuple[ModuleType, llama.LlamaConfig]:
  """What `load_hf` returns but for the parameters, of which only names and shapes are read.

  Raises: as `load_hf`.

  Example:
    >>> import tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / "model"
    >>> save_hf(llama.init(jax.random.key(0), llama.nano()), llama.nano(), folder)
    >>> load_hf_config(folder)[1].hidden_size
    64
  """
  return llama, _open(path, None)[1]


def _open(
  path: str | pathlib.Path, param_dtype: str | None
) -> tuple[_safetensors.Reader, llama.LlamaConfig, Params]:
  """The files of a folder, the config, and a `_Tensor` for every parameter: all checked."""
  path = pathlib.Path(path)
  _refuse_meta_folder(path)
  if not (path / "config.json").is_file():
    raise FileNotFoundError(f"`path` must be a folder with config.json, got {path}.")
  config = _safetensors.read_json(path / "config.json")
  if config.get("model_type") != "llama":
    raise ValueError(
      f"`path`: `model_type` in config.json must be 'llama', got {config.get('model_type')!r}."
    )
  reader = _safetensors.Reader(path)
  cfg = _llama_hf.config_from_hf(config)
  cfg = dataclasses.replace(cfg, param_dtype=param_dtype or _stored_dtype(reader))
  tensors = _tensors(cfg)
  _check_tensors(reader, tensors, cfg)
  return reader, cfg, tensors


def _shardings(cfg, mesh, rules) -> Any:
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
    return jax.tree.map(lambda _: device, shapes)
  return named_shardings(mesh, mesh_specs(llama.specs(cfg), shapes, mesh, rules))


def _load_leaf(reader, tensor: _Tensor, sharding, cfg: llama.LlamaConfig) -> jax.Array:
  dtype = _safetensors.numpy_dtype(cfg.param_dtype)

  def block(index):
    if not tensor.stacked:
      return tensor.read(reader, tensor.names[0], index).astype(dtype)
    names = tensor.names[index[0]]
    return np.stack([tensor.read(reader, n, index[1:]).astype(dtype) for n in names])

  shape = (len(tensor.names), *tensor.shape) if tensor.stacked else tensor.shape
  return jax.make_array_from_callback(shape, sharding, block)


def _stored_dtype(reader) -> str:
  stored = {reader.dtype(name) for name in reader.names()}
  if "float16" in stored:
    _log.info("float16 tensors are kept in float32, which holds them exactly")
  return "bfloat16" if stored == {"bfloat16"} else "float32"


def _check_tensors(reader: _safetensors.Reader, tensors: Params, cfg: llama.LlamaConfig) -> None:
  leaves = jax.tree.leaves(tensors, is_leaf=lambda x: isinstance(x, _Tensor))
  shapes = {name: leaf.file_shape() for leaf in leaves for name in leaf.names}
  names = {name for name in reader.names() if not name.endswith(_llama_hf.IGNORED)}
  if any(name.endswith(("attention.wq.weight", "tok_embeddings.weight")) for name in names):
    raise ValueError(f"`path`: {_META}")
  if cfg.tie_embeddings and _repeats_embedding(reader):
    names.discard("lm_head.weight")
  missing, unknown = sorted(shapes.keys() - names), sorted(names - shapes.keys())
  if missing or unknown:
    raise ValueError(
      f"`path`: tensors must be those of the config: missing {missing}, unknown {unknown}."
    )
  wrong = {n: reader.shape(n) for n in sorted(shapes) if reader.shape(n) != shapes[n]}
  if wrong:
    name, shape = next(iter(wrong.items()))
    raise ValueError(
      f"`path`: {len(wrong)} tensors have another shape than the config says; {name} must be"
      f" {shapes[name]}, got {shape}."
    )


def _repeats_embedding(reader: _safetensors.Reader) -> bool:
  """Whether an output matrix is stored, and is the embedding once more."""
  pair = ("lm_head.weight", "model.embed_tokens.weight")
  if not reader.names().issuperset(pair):
    return False
  head, embed = (reader.read(name, (slice(None), slice(None))) for name in pair)
  return np.array_equal(head, embed)


_META = (
  "these are weights in Meta's layout, where RoPE turns neighbouring rows of q and k and not"
  " halves of a head; convert them with the script convert_llama_weights_to_hf.py of transformers,"
  " which puts the rows in order."
)


def _refuse_meta_folder(path: pathlib.Path) -> None:
  if (path / "params.json").is_file() and not (path / "config.json").is_file():
    raise ValueError(f"`path`: {_META}")


def save_hf(
  params: Params,
  cfg: llama.LlamaConfig,
  path: str | pathlib.Path,
  *,
  entries: Mapping[str, Any] | None = None,
  files: Mapping[str, pathlib.Path] | None = None,
  max_file_bytes: int = 5_000_000_000,
) -> None:
  """Writes a folder that transformers and `load_hf` read; bit for bit what `params` hold.

  The folder appears under its name when all of it is written. With several processes each calls
  this; the first writes. A layer at a time is brought to the host, a file at a time is held.

  Args:
    params: from `init`, `load_hf` or a training, in `cfg.param_dtype`; sharded or not.
    cfg: their config.
    path: a folder that does not exist yet, or is empty.
    entries: more of config.json, which `cfg` does not say: {"eos_token_id": 2}.
    files: name in the folder to a file that is copied there, such as a tokenizer.json.
    max_file_bytes: of tensors in one file; beyond, there are several and an index.

  Raises:
    ValueError: `params` are not those of `cfg`, `entries` or `files` have what is written anyway,
      or `max_file_bytes` is below 1.
    FileExistsError: there is something in `path`.
  """
  path = pathlib.Path(path)
  if max_file_bytes < 1:
    raise ValueError(f"`max_file_bytes` must be at least 1, got {max_file_bytes}.")
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise FileExistsError(f"`path` must not exist or be an empty folder, got {path}.")
  _check_params(params, cfg)
  config = _llama_hf.config_to_hf(cfg)
  if taken := sorted(config.keys() & (entries or {})):
    raise ValueError(f"`entries` must not have what `cfg` says, got {taken}.")
  if taken := [name for name in files or {} if _safetensors.is_written(name)]:
    raise ValueError(f"`files` must be neither config.json nor tensors, got {taken}.")
  tensors = {}  # name in the file: (_Tensor, leaf, layer or None)
  for key, tensor in _tensors(cfg).items():
    for leaf_key, leaf_tensor in tensor.items() if key == "layers" else ((key, tensor),):
      leaf = params["layers"][leaf_key] if key == "layers" else params[key]
      for i, name in enumerate(leaf_tensor.names):
        tensors[name] = (leaf_tensor, leaf, i if leaf_tensor.stacked else None)

  def tensor_of(name):
    tensor, leaf, layer = tensors[name]
    return tensor.to_file(_on_host(leaf if layer is None else leaf[layer]))

  dtype = _safetensors.numpy_dtype(cfg.param_dtype)
  names = sorted(tensors, key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")])
  _safetensors.write_folder(
    path,
    {**config, **(entries or {})},
    {name: (tensors[name][0].file_shape(), dtype) for name in names},
    tensor_of,
    files=files or {},
    max_file_bytes=max_file_bytes,
    write=jax.process_index() == 0,
  )


def _on_host(x: jax.Array) -> np.ndarray:
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _check_params(params: Params, cfg: llama.LlamaConfig) -> None:
  want = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  if jax.tree.structure(want) != jax.tree.structure(params):
    raise ValueError(
      f"`params` must have the tree that `init` makes of `cfg`, got {jax.tree.structure(params)}."
    )
  for (keys, leaf), got in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(params)):
    if (leaf.shape, leaf.dtype) != (got.shape, got.dtype):
      raise ValueError(
        f"`params`{jax.tree_util.keystr(keys)} must be {leaf.dtype}{list(leaf.shape)}, got"
        f" {got.dtype}{list(got.shape)}."
      )
