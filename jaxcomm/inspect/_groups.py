"""Which devices talk in a collective, and along which mesh axes.

Device ids here are flattened, `replica * num_partitions + partition`, which is the position in
`mesh.devices.flat` of the mesh that the program was compiled for.
"""

import itertools
import math
import re
from typing import Any

import numpy as np

from jaxcomm.inspect._hlo import MAX_DEVICES, Instruction, Module

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"^@?mesh[\[<]([^\]>]*)[\]>](?:,\s*device_ids=\((.*)\))?\s*\{([^{}]*)\}$")
_IDS = re.compile(r"^\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_LIST = re.compile(r"^\{\s*(\{[\d,\s]*\}\s*,?\s*)*\}$")


def parse_groups(text: str) -> Groups:
  """Reads the device groups of a collective in the three forms that XLA prints.

  - a list, `{{0,1},{2,3}}`; `{}` lists no groups and means all devices;
  - iota, `[2,4]<=[4,2]T(1,0)`: `arange(8).reshape(4, 2).transpose(1, 0).reshape(2, 4)`, a group
    per row;
  - axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`: devices that differ in `b` only. `'b':(2)2` is a part
    of an axis: `b` seen as (2, 2), of which the second. `mesh[...], device_ids=([4,2]T(1,0)) {'b'}`
    has the devices `arange(8).reshape(4, 2).transpose(1, 0)` in the order of the mesh.

  Raises:
    ValueError: `text` is none of these, or its sizes do not agree.

  Example:
    >>> parse_groups("[4,2]<=[2,4]T(1,0)")
    ((0, 4), (1, 5), (2, 6), (3, 7))
  """
  text = text.strip()
  iota = _IOTA.match(text)
  if iota:
    return _iota_groups(text, *(_ints(part) for part in iota.groups()))
  mesh = _MESH.match(text)
  if mesh:
    return _mesh_groups(text, *mesh.groups())
  if not _LIST.match(text):
    raise ValueError(f"`compiled` has device groups that cannot be read: {text[:120]!r}.")
  return tuple(_ints(group) for group in re.findall(r"\{([^{}]+)\}", text))


def device_groups(instruction: Instruction, module: Module) -> Groups:
  """The groups of flattened device ids of a collective (for a permutation: who is linked to whom).

  Raises:
    ValueError: the groups cannot be read or name a device that the program does not have.
  """
  attributes = instruction.attributes
  replicas, partitions = module.replica_count, module.num_partitions
  if "source_target_pairs" in attributes:
    groups = _linked(parse_groups(attributes["source_target_pairs"]))
  else:
    text = attributes.get("replica_groups", "{}")
    if "device_ids" in attributes:  # the second half of a mesh, which a comma set apart
      text = f"{text}, device_ids={attributes['device_ids']}"
    groups = parse_groups(text)
  # XLA's four group modes: https://openxla.org/xla/operation_semantics, and
  # xla/service/collective_ops_utils.h. Without a channel the ids are replicas; with one they are
  # partitions, or replicas together with all their partitions, or flattened ids.
  if attributes.get("use_global_device_ids") == "true":
    devices = groups or (tuple(range(replicas * partitions)),)
  elif "channel_id" not in attributes:
    groups = groups or (tuple(range(replicas)),)
    devices = tuple(tuple(r * partitions + p for r in g) for g in groups for p in range(partitions))
  elif instruction.opcode.startswith(("all-to-all", "collective-permute")):
    groups = groups or (tuple(range(partitions)),)
    devices = tuple(tuple(r * partitions + p for p in g) for g in groups for r in range(replicas))
  else:
    groups = groups or (tuple(range(replicas)),)
    devices = tuple(tuple(r * partitions + p for r in g for p in range(partitions)) for g in groups)
  if any(d >= replicas * partitions for group in devices for d in group):
    raise ValueError(
      f"`compiled` runs on {replicas * partitions} devices, but `{instruction.name}` names others:"
      f" {devices}."
    )
  return devices


def axis_names(groups: Groups, mesh: Any) -> str:
  """The mesh axes along which the members of a group differ, joined by commas; `none` if alone.

  Without a mesh, the first group and the number of groups: `{0,4}x4`.
  """
  groups = tuple(group for group in groups if len(group) > 1)
  if not groups:
    return "none"
  if mesh is None:
    return "{" + ",".join(map(str, groups[0])) + "}x" + str(len(groups))
  shape = tuple(mesh.shape.values())
  spanned: set[int] = set()
  for group in groups:
    coordinates = np.stack(np.unravel_index(group, shape))
    spanned.update(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)).tolist())
  return ",".join(mesh.axis_names[i] for i in sorted(spanned))


def _iota_groups(text: str, sizes: Any, dims: Any, permutation: Any) -> Groups:
  permutation = permutation or tuple(range(len(dims)))
  if (
    math.prod(sizes) != math.prod(dims)
    or math.prod(dims) > MAX_DEVICES
    or sorted(permutation) != list(range(len(dims)))
  ):
    raise ValueError(f"`compiled` has iota groups whose sizes do not agree: {text!r}.")
  ids = np.arange(math.prod(dims)).reshape(dims).transpose(permutation)
  return tuple(tuple(row) for row in ids.reshape(sizes[0], -1).tolist())


def _mesh_groups(text: str, axes: str, device_ids: str | None, grouped: str) -> Groups:
  sizes = {name: int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", axes)}
  parts = []  # (axis, elements to its left in that axis, size)
  for part in filter(None, (part.strip() for part in grouped.split(","))):
    name, _, sub = part.partition(":")
    numbers = re.fullmatch(r"\((\d+)\)(\d+)", sub)
    if name not in sizes or bool(sub) != bool(numbers):
      raise ValueError(f"`compiled` has mesh groups that cannot be read: {text!r}.")
    parts.append((name, *(map(int, numbers.groups()) if numbers else (1, sizes[name]))))
  # Every axis is cut where a part begins or ends; `dims` are the pieces, outermost first.
  dims, members = [], {part: [] for part in parts}
  for axis, size in sizes.items():
    cuts = {1, size}.union(*({left, left * n} for name, left, n in parts if name == axis))
    for begin, end in itertools.pairwise(sorted(cuts)):
      for name, left, n in parts:
        if name == axis and left <= begin and end <= left * n:
          members[name, left, n].append(len(dims))
      dims.append(end // begin)
  inner = [i for part in parts for i in members[part]]
  outer = [i for i in range(len(dims)) if i not in inner]
  total = math.prod(sizes.values())
  if math.prod(dims) != total or total > MAX_DEVICES or len(set(inner)) != len(inner):
    raise ValueError(f"`compiled` has mesh groups whose sizes do not agree: {text!r}.")
  ids = _mesh_devices(text, device_ids, total).reshape(dims).transpose(outer + inner)
  return tuple(tuple(row) for row in ids.reshape(-1, math.prod(dims[i] for i in inner)).tolist())


def _mesh_devices(text: str, device_ids: str | None, total: int) -> np.ndarray:
  """The devices of a mesh in its own order: `[4,2]T(1,0)`, a list, or all in order."""
  if device_ids is None:
    return np.arange(total)
  iota = _IDS.match(device_ids)
  if iota:
    dims = _ints(iota.group(1))
    permutation = _ints(iota.group(2)) or tuple(range(len(dims)))
    if math.prod(dims) == total and sorted(permutation) == list(range(len(dims))):
      return np.arange(total).reshape(dims).transpose(permutation).reshape(-1)
  elif re.fullmatch(r"[\d,\s]+", device_ids) and sorted(_ints(device_ids)) == list(range(total)):
    return np.asarray(_ints(device_ids))
  raise ValueError(f"`compiled` has mesh devices that cannot be read: {text!r}.")


def _linked(pairs: Groups) -> Groups:
  """Connected components of the graph of `(source, target)` pairs."""
  component: dict[int, set[int]] = {}
  for pair in pairs:
    merged = set().union(*(component.get(device, {device}) for device in pair))
    component.update(dict.fromkeys(merged, merged))
  return tuple(sorted({tuple(sorted(members)) for members in component.values()}))


def _ints(text: str | None) -> tuple[int, ...]:
  return tuple(int(part) for part in (text or "").split(",") if part.strip())
