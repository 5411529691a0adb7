"""Text sets of the library `datasets`: a folder, or the hub under the user's own account."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxcomm.data._extras import require
from jaxcomm.data._files import check_field, missing_field
from jaxcomm.data.documents import Corpus, Document, hold_out

_SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
  ("validation", "valid", "val", "dev"), "validation"
)


def read_hub(source: str, text_field: str) -> Corpus:
  """The rows of `hf:NAME`, `hf:NAME:CONFIG`, either with `@REVISION`, or `hf:FOLDER`.

  A folder holds data files (parquet, JSON lines, CSV, text), or what `save_to_disk` wrote. Splits
  of the set keep their role; validation or test that it lacks are cut from its train split.

  Raises:
    ImportError: the extra `hf` is missing.
    FileNotFoundError: there is no such folder.
    ValueError: the set has no such column, or a row that is no string.
    OSError: the set cannot be loaded.
  """
  datasets = require("datasets", "hf")
  name, version = source.removeprefix("hf:"), ""
  folder = Path(name).expanduser()
  try:
    if folder.exists() or name.startswith((".", "/", "~")):
      loaded = _load_folder(datasets, folder)
      name = folder.resolve().name
    else:
      path, _, version = name.partition("@")
      path, _, config = path.partition(":")
      loaded = datasets.load_dataset(path, config or None, revision=version or None)
  except FileNotFoundError:
    raise
  except Exception as e:  # the library passes on whatever its parts raise
    raise OSError(f"`{source}` cannot be loaded: {type(e).__name__}: {e}") from e
  sets = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
  licence = next((s.info.license for s in sets.values() if s.info.license), "unknown")
  documents = _documents(_by_split(sets, source), text_field, source)
  return Corpus(f"hf:{name}", version, licence, documents)


def _load_folder(datasets: Any, folder: Path) -> Any:
  if not folder.is_dir():
    raise FileNotFoundError(f"`hf:{folder}` is not a folder.")
  if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
    return datasets.load_from_disk(str(folder))
  return datasets.load_dataset(str(folder))


def _by_split(sets: Mapping[str, Any], source: str) -> dict[str, Any]:
  if len(sets) == 1:
    return {"train": next(iter(sets.values()))}
  known = {_SPLIT_NAMES[name]: rows for name, rows in sets.items() if name in _SPLIT_NAMES}
  if "train" not in known:
    raise ValueError(f"`{source}` must have a split `train`, it has {', '.join(sets)}.")
  if left := [name for name in sets if name not in _SPLIT_NAMES]:
    warnings.warn(f"`{source}`: the splits {', '.join(left)} are left out.", stacklevel=4)
  return known


def _documents(sets: Mapping[str, Any], text_field: str, source: str) -> tuple[Document, ...]:
  documents = []
  for split, rows in sets.items():
    texts = _texts(rows, text_field, f"{source}, split {split}")
    splits = [split] * len(texts)
    if split == "train":
      missing = [s for s in ("test", "validation") if s not in sets]
      splits = hold_out(texts.values(), missing, source) if missing else splits
    names = (f"{split}/{number:06d}" for number in texts)
    documents += map(Document, names, texts.values(), splits)
  return tuple(documents)


def _texts(rows: Any, text_field: str, where: str) -> dict[int, str]:
  """Row number from 1, and text; blank rows are left out."""
  if text_field not in rows.column_names:
    raise missing_field(text_field, rows.column_names, where)
  texts, number = {}, 0
  for batch in rows.select_columns([text_field]).iter(batch_size=1000):
    for value in batch[text_field]:
      number += 1
      if check_field(value, text_field, f"{where}, row {number}").strip():
        texts[number] = value
  return texts
