"""Folders of safetensors files as Hugging Face lays them out, read in slices and written whole."""

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; ValueError if there is another thing in it."""
  try:
    value = json.loads(path.read_text())
  except (UnicodeDecodeError, json.JSONDecodeError) as error:
    raise ValueError(f"`path`: {path} is not valid JSON: {error}.") from error
  if not isinstance(value, dict):
    raise ValueError(f"`path`: {path} must hold a JSON object, got {type(value).__name__}.")
  return value


class Reader:
  """The tensors of a folder, of which nothing is read before it is asked for.

  Raises:
    ValueError: no safetensors in the folder, or files that are damaged or disagree.
  """

  def __init__(self, folder: pathlib.Path):
    from safetensors import SafetensorError, safe_open

    self._files: dict[str, Any] = {}
    self._where: dict[str, Any] = {}
    for name in _file_names(folder):
      try:
        self._files[name] = safe_open(folder / name, framework="numpy")
      except (SafetensorError, OSError) as error:
        raise ValueError(f"`path`: {folder / name} cannot be read: {error}.") from error
      for tensor in self._files[name].keys():
        if tensor in self._where:
          raise ValueError(f"`path`: {tensor} is in more than one file of {folder}.")
        self._where[tensor] = self._files[name]
    _check_index(folder, self._where)

  def names(self) -> set[str]:
    return set(self._where)

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._where[name].get_slice(name).get_shape())

  def dtype(self, name: str) -> str:
    """NumPy's name of the dtype; ValueError for one that holds no plain weights."""
    stored = self._where[name].get_slice(name).get_dtype()
    if stored not in DTYPES:
      raise ValueError(f"`path`: {name} must be one of {sorted(DTYPES)}, got {stored}.")
    return DTYPES[stored]

  def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    return self._where[name].get_slice(name)[index]


def _file_names(folder: pathlib.Path) -> list[str]:
  if (folder / INDEX).is_file():
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f"`path`: {folder / INDEX} must have a `weight_map`.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
      if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"`path`: {folder / INDEX} names {name!r}, not a file of its folder.")
      if not (folder / name).is_file():
        raise ValueError(f"`path`: {folder} lacks {name}, which its index names.")
    return names
  if (folder / WEIGHTS).is_file():
    return [WEIGHTS]
  pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pth", ".pt"))
  hint = f"; {', '.join(pickles)} may execute code when read: convert it first" if pickles else ""
  raise ValueError(f"`path`: {folder} has neither {WEIGHTS} nor {INDEX}{hint}.")


def _check_index(folder: pathlib.Path, where: Mapping[str, Any]) -> None:
  if not (folder / INDEX).is_file():
    return
  named = set(read_json(folder / INDEX)["weight_map"])
  if named != set(where):
    raise ValueError(
      f"`path`: the index and the files of {folder} differ in {sorted(named ^ set(where))[:8]}."
    )


def is_written(name: str) -> bool:
  """Whether `write_folder` itself writes files of this name, or it is no name in a folder."""
  return (
    pathlib.PurePath(name).name != name
    or name in ("config.json", INDEX)
    or name.endswith(".safetensors")
  )


def write_folder(
  path: pathlib.Path,
  config: Mapping[str, Any],
  shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  tensor: Callable[[str], np.ndarray],
  *,
  files: Mapping[str, pathlib.Path],
  max_file_bytes: int,
  write: bool = True,
) -> None:
  """Writes config and tensors into a folder that appears under its name when it is complete.

  Args:
    path: of the folder, which must not exist, or be empty.
    config: for config.json.
    shapes: (shape, dtype) of each tensor.
    tensor: makes the tensor of a name; at most one file's are held at a time.
    files: name to a file that is copied.
    max_file_bytes: of the tensors of one file, unless it holds only one.
    write: False calls `tensor` for all and writes nothing: the other processes of a job.
  """
  plan = _plan(shapes, max_file_bytes)
  part = path.with_name(f".{path.name}.writing")
  if write:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name, source in files.items():
      shutil.copyfile(source, part / name)
  for name, tensors in plan.items():
    arrays = {key: tensor(key) for key in tensors}
    if write:
      _write_file(part / name, arrays)
  if not write:
    return
  if len(plan) > 1:
    total = sum(_num_bytes(*shapes[name]) for name in shapes)
    weight_map = {key: name for name, tensors in plan.items() for key in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (part / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
  if path.exists():
    path.rmdir()  # only if empty
  os.replace(part, path)


def _plan(shapes, max_file_bytes: int) -> dict[str, list[str]]:
  """File name to the tensors in it."""
  groups: list[list[str]] = [[]]
  held = 0
  for name, (shape, dtype) in shapes.items():
    size = _num_bytes(shape, dtype)
    if groups[-1] and held + size > max_file_bytes:
      groups.append([])
      held = 0
    groups[-1].append(name)
    held += size
  if len(groups) == 1:
    return {WEIGHTS: groups[0]}
  stem = WEIGHTS.removesuffix(".safetensors")
  return {
    f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)
  }


def _num_bytes(shape: tuple[int, ...], dtype: Any) -> int:
  return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _write_file(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  from safetensors.numpy import save_file

  # The library writes bytes as they lie in memory, whatever the strides say.
  save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, {"format": "pt"})
  with path.open("rb") as file:
    os.fsync(file.fileno())


def numpy_dtype(name: str) -> np.dtype:
  """NumPy's dtype of "float32", "bfloat16" or "float16"."""
  return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
