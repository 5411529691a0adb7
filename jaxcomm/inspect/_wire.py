"""The wire meter: bytes that each device sends, read from the compiled program."""

import re
from typing import Any

import jax

from jaxcomm.inspect import _ring_bytes
from jaxcomm.inspect._groups import axis_names, device_groups
from jaxcomm.inspect._hlo import ArrayType, Computation, Instruction, Module, parse_module
from jaxcomm.inspect._loops import Scope, trip_count
from jaxcomm.inspect._report import Branch, CollectiveOp, WireReport

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# The second half of an asynchronous pair, and local steps of one: nothing is sent there.
_HALVES = (*(f"{kind}-done" for kind in _KINDS), "async-update", "async-done")
_COLLECTIVE_PREFIXES = ("all-", "collective-", "ragged-all", "reduce-scatter", "send", "recv")


def collective_bytes(
  compiled: jax.stages.Compiled | str,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  *,
  period: int | None = None,
) -> WireReport:
  """Counts what one execution of a compiled program sends, per device, collective and mesh axis.

  The count is of the optimized program, so it shows what the compiler made of the source: XLA:CPU
  sends a bfloat16 `psum` as float32, XLA:TPU turns an int8 `psum_scatter` into an all-reduce.
  With `g` devices in a group and `n` bytes per device, a device sends (ring algorithms)

  - all-reduce `2 (g - 1) / g * n`,
  - all-gather `(g - 1) / g * n` with n the output, reduce-scatter the same with n the input,
  - all-to-all `(g - 1) / g * n`,
  - collective-permute `n`; pairs of a device with itself send nothing, the busiest device counts.

  Loops multiply by their trip count. Of a conditional, the branch that sends most is counted in
  `total`; see `WireReport` for the others. Bytes are those of the logical arrays: the padding of
  TPU tiles and the network's own headers are not in them. Traffic with the host is not counted.

  Args:
    compiled: a `jax.stages.Compiled`, or the text of optimized HLO (`compiled.as_text()`).
    mesh: the mesh that the program was compiled for, to name axes. Without it an axis reads
      `{0,4}x4`: the first group of devices, and how many groups.
    period: if given, `total`, `by_axis` and `by_kind` are means per execution over a program that
      takes its conditionals' heaviest branch once in `period` executions.

  Returns:
    A `WireReport`.

  Raises:
    TypeError: `compiled` is neither.
    ValueError: the text cannot be read, a loop with a collective has no known trip count, `mesh`
      has another number of devices than the program, or `period` is below 1.
    NotImplementedError: the program has a collective whose bytes are not known from its text
      (ragged-all-to-all, send and recv, collective-broadcast, a kernel that communicates).

  Example:
    >>> hlo = '''HloModule sum, num_partitions=8
    ...
    ... ENTRY %main (p: f32[256]) -> f32[256] {
    ...   %p = f32[256]{0} parameter(0)
    ...   ROOT %r = f32[256]{0} all-reduce(%p), channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0),
    ...     use_global_device_ids=true, to_apply=%add
    ... }'''
    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("replica", "fsdp"))
    >>> collective_bytes(hlo, mesh).by_axis
    {'replica': 1024.0}
  """
  if period is not None and period < 1:
    raise ValueError(f"`period` must be at least 1, got {period}.")
  module = read_program(compiled, mesh)
  meter = Meter(module, mesh)
  meter.measure()
  return WireReport(tuple(meter.ops), period)


def read_program(compiled: Any, mesh: Any) -> Module:
  """The program of a `jax.stages.Compiled` or of HLO text, for the devices of `mesh` if given.

  Raises:
    TypeError: `compiled` is neither.
    ValueError: the text cannot be read, or `mesh` has another number of devices.
  """
  if not isinstance(compiled, str):
    if not isinstance(compiled, jax.stages.Compiled):
      raise TypeError(
        f"`compiled` must be a jax.stages.Compiled or HLO text, got {type(compiled).__name__}:"
        " call jax.jit(f).lower(...).compile()."
      )
    compiled = compiled.as_text() or ""
  module = parse_module(compiled)
  num_devices = module.num_partitions * module.replica_count
  if mesh is not None and mesh.size != num_devices:
    raise ValueError(
      f"`mesh` must have the {num_devices} devices of the program, got {mesh.size} ({mesh.shape})."
    )
  return module


class Meter:
  """Walks the call graph from the entry and appends to `ops`."""

  def __init__(self, module: Module, mesh: Any):
    self.module = module
    self.mesh = mesh
    self.ops: list[CollectiveOp] = []
    self._communicates: dict[str, bool | None] = {}
    self._visited: set[str] = set()
    self._chains_started: set[str] = set()
    self._chains_continued: set[str] = set()

  def measure(self) -> None:
    """Counts all collectives of the program."""
    self.walk(Scope(self.module.entry), 1, ())
    self.check_complete()

  def walk(self, scope: Scope, times: int, branch: tuple[Branch, ...]) -> None:
    """Counts the collectives of `scope`, which runs `times` times under `branch`."""
    self._visited.add(scope.computation.name)
    for instruction in scope.computation.instructions.values():
      if _is_collective(instruction):
        self.collective(scope, instruction, times, branch)
      elif any(self.has_collective(name) for name in instruction.called):
        self._call(scope, instruction, times, branch)

  def check_complete(self) -> None:
    """Raises if a collective of the text was not reached: nothing is dropped silently."""
    for computation in self.module.computations.values():
      if self.has_collective(computation.name) and computation.name not in self._visited:
        raise NotImplementedError(
          f"computation `{computation.name}` has a collective, but nothing that this meter knows"
          " calls it."
        )
    if not self._chains_continued <= self._chains_started:
      missing = sorted(self._chains_continued - self._chains_started)
      raise NotImplementedError(f"asynchronous collectives {missing} are continued, never started.")

  def _call(self, scope: Scope, site: Instruction, times: int, branch: tuple[Branch, ...]) -> None:
    if site.opcode == "while":
      self._while(scope, site, times, branch)
    elif site.opcode == "conditional":
      names = site.called
      for i, name in enumerate(names):
        inner = Scope(self.module.computation(name), scope, site, first_operand=i + 1)
        self.walk(inner, times, (*branch, Branch(site.name, i, len(names))))
    elif site.opcode in ("fusion", "call", "async-start"):
      for name in site.called:
        self.walk(Scope(self.module.computation(name), scope, site), times, branch)
    elif site.opcode in _HALVES:
      self._visited.update(site.called)
    else:
      raise NotImplementedError(
        f"`{site.name}` ({site.opcode}) calls a computation with a collective; only while,"
        " conditional, call, fusion and asynchronous calls are counted."
      )

  def _while(self, scope: Scope, loop: Instruction, times: int, branch: tuple[Branch, ...]) -> None:
    trips = trip_count(self.module, scope, loop)
    if trips is None:
      raise ValueError(
        f"`compiled` has a loop of unknown trip count, `{loop.name}` in"
        f" `{scope.computation.name}`, with a collective inside: its bytes depend on the data."
      )
    # The condition runs once more than the body.
    for key, runs in (("condition", trips + 1), ("body", trips)):
      computation = self.module.computation(loop.computation_named(key))
      self.walk(Scope(computation, scope, loop), times * runs, branch)

  def collective(
    self, scope: Scope, instruction: Instruction, times: int, branch: tuple[Branch, ...]
  ) -> None:
    """Counts one collective; a subclass may look at it as well."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _KINDS or "slice_sizes" in instruction.attributes:
      raise NotImplementedError(
        f"`{instruction.name}` ({instruction.opcode}): its bytes are not known from the text."
      )
    if self._continues_a_chain(scope, instruction):
      return
    if kind == "all-reduce" and _is_all_reduce_scatter(scope):
      kind = "reduce-scatter"
    groups = device_groups(instruction, self.module)
    group_size = max((len(group) for group in groups), default=1)
    axis = axis_names(groups, self.mesh)
    for array in _sent_arrays(scope.computation, instruction):
      sent = times * _bytes(kind, array.num_bytes, group_size)
      self.ops.append(
        CollectiveOp(
          instruction.name, kind, array.dtype, array.shape, group_size, axis, times, sent, branch
        )
      )

  def _continues_a_chain(self, scope: Scope, instruction: Instruction) -> bool:
    """Whether this is XLA:TPU's repetition of a collective that an earlier fusion started.

    There an asynchronous collective is a fusion with the custom call `AsyncCollectiveStart`, then
    matmul fusions that carry it on, then one with `AsyncCollectiveDone`; each holds a copy of it.
    """
    if scope.site is None or scope.site.opcode != "fusion":
      return False
    custom_calls = "".join(
      i.attributes_text
      for i in scope.computation.instructions.values()
      if i.opcode == "custom-call"
    )
    chain = re.search(r'chain_id="(\d+)"', instruction.attributes_text)
    chain_id = chain.group(1) if chain else ""
    if "AsyncCollectiveStart" in custom_calls:
      self._chains_started.add(chain_id)
      return False
    if chain or "AsyncCollectiveDone" in custom_calls:
      self._chains_continued.add(chain_id)
      return True
    return False

  def has_collective(self, name: str) -> bool:
    """Whether the computation, or one that it calls, has a collective."""
    known = self._communicates.get(name, False)
    if known is None:
      raise ValueError(f"`compiled` has a computation that calls itself: `{name}`.")
    if name not in self._communicates:
      self._communicates[name] = None
      self._communicates[name] = any(
        _is_collective(i) or any([self.has_collective(c) for c in i.called])
        for i in self.module.computation(name).instructions.values()
      )
    return bool(self._communicates[name])


def _is_collective(instruction: Instruction) -> bool:
  if instruction.opcode == "custom-call":  # a Pallas kernel says so in its configuration
    return '"has_communication": true' in instruction.attributes_text.replace(":true", ": true")
  if instruction.opcode in _HALVES or not instruction.opcode.startswith(_COLLECTIVE_PREFIXES):
    return False
  return instruction.attributes.get("is_host_transfer") != "true"


def _is_all_reduce_scatter(scope: Scope) -> bool:
  """Whether this is XLA:TPU's fusion of an all-reduce and the slice that follows it."""
  return scope.site is not None and scope.computation.name.startswith("all-reduce-scatter")


def _sent_arrays(computation: Computation, instruction: Instruction) -> list[ArrayType]:
  """The local arrays that go into a collective; results repeat them in a form of their own."""
  arrays = []
  for operand in instruction.operands:
    if operand not in computation.instructions:
      raise ValueError(f"`compiled`: operand `{operand}` of `{instruction.name}` is not defined.")
    arrays += computation.instructions[operand].types
  if instruction.opcode == "all-to-all" and "dimensions" not in instruction.attributes and arrays:
    # XLA:CPU splits the array into one operand per device of the group.
    first, num = arrays[0], len(arrays)
    if all(array == first for array in arrays):
      return [ArrayType(first.dtype, (num, *first.shape), num * first.num_bytes)]
  return arrays


def _bytes(kind: str, num_bytes: int, group_size: int) -> float:
  """Bytes sent per device for a local operand of `num_bytes`."""
  if kind == "all-reduce":
    return _ring_bytes.all_reduce_bytes(num_bytes, group_size)
  if kind == "all-gather":
    return _ring_bytes.all_gather_bytes(group_size * num_bytes, group_size)
  if kind == "reduce-scatter":
    return _ring_bytes.reduce_scatter_bytes(num_bytes, group_size)
  if kind == "all-to-all":
    return _ring_bytes.all_to_all_bytes(num_bytes, group_size)
  return _ring_bytes.collective_permute_bytes(num_bytes, group_size)
