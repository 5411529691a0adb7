"""The order in which a computation runs, its asynchronous spans, and what depends on what."""

import re
from collections.abc import Iterable

from jaxcomm.inspect._hlo import Computation, Instruction, Module

_SPAN_ENDS = ("-done", "-update")


class Schedule:
  """Instructions of one computation in the order written, which is that of the schedule.

  Attributes:
    order: the instructions.
    before: per instruction, the set (bits of an int) of instructions that it depends on.
    after: per instruction, the set of those that depend on it.
  """

  def __init__(self, module: Module, computation: Computation):
    self.order = list(computation.instructions.values())
    self._index = {instruction.name: i for i, instruction in enumerate(self.order)}
    self._module = module
    self._computation = computation
    self._chains: dict[str, tuple[str, str] | None] = {}
    inputs = [self._inputs(instruction) for instruction in self.order]
    self.before, self.after = [0] * len(inputs), [0] * len(inputs)
    for i, direct in enumerate(inputs):
      for j in direct:
        self.before[i] |= self.before[j] | 1 << j
    for i in reversed(range(len(inputs))):
      for j in inputs[i]:
        self.after[j] |= self.after[i] | 1 << i

  def index(self, name: str) -> int:
    """Position of the instruction called `name`."""
    return self._index[name]

  def end(self, start: int) -> int:
    """Position where the result of the collective that begins at `start` is there.

    That of the matching done; `start` itself if the collective is synchronous.
    """
    instruction = self.order[start]
    if instruction.opcode == "fusion":
      return self._chain_end(start)
    if not instruction.opcode.endswith("-start") or '"is_sync":true' in instruction.attributes_text:
      return start
    names = {instruction.name}
    for i in range(start + 1, len(self.order)):
      user = self.order[i]
      if user.opcode.endswith(_SPAN_ENDS) and names.intersection(user.operands):
        if user.opcode.endswith("-done"):
          return i
        names.add(user.name)
    raise ValueError(f"`compiled` starts `{instruction.name}`, but never ends it.")

  def _chain_end(self, start: int) -> int:
    """XLA:TPU's chain: a fusion that starts, fusions that carry on, a fusion that ends."""
    chain = self._chain(self.order[start])
    if chain is None or chain[1] != "start":
      return start
    for i in range(start + 1, len(self.order)):
      if self._chain(self.order[i]) == (chain[0], "done"):
        return i
    raise ValueError(f"`compiled` starts `{self.order[start].name}`, but never ends it.")

  def _inputs(self, instruction: Instruction) -> list[int]:
    """Positions of what the instruction needs; through tuples, of the element that it takes."""
    if instruction.opcode in ("parameter", "constant"):  # the text in brackets is no operand
      return []
    names = list(instruction.operands)
    if instruction.opcode == "get-tuple-element" and names:
      source = self._computation.instructions.get(names[0])
      if source is not None and source.opcode == "tuple":
        names = list(source.operands[instruction.index : instruction.index + 1])
      elif source is not None and self._carries(source):
        names = self._carried(source, instruction.index)
    elif self._carries(instruction):
      names = self._carried(instruction, None)
    unknown = [name for name in names if name not in self._index]
    if unknown:
      raise ValueError(
        f"`compiled`: operand `{unknown[0]}` of `{instruction.name}` is not defined."
      )
    own = self._index[instruction.name]
    return [self._index[name] for name in names if self._index[name] < own]

  def _carried(self, fusion: Instruction, element: int | None) -> list[str]:
    """Operands of a fusion that carries a collective on, behind one element of its result.

    With None, behind the elements that it computes itself.
    """
    fused = self._module.computation(fusion.called[0])
    root = fused.instructions.get(fused.root or "")
    if root is None or root.opcode != "tuple":
      return list(fusion.operands)
    elements = root.operands if element is None else root.operands[element : element + 1]
    numbers: set[int] = set()
    for name in elements:
      source = fused.instructions.get(name)
      if source is None or element is not None or not _is_carried(source):
        numbers |= _parameters_behind(fused, name)
    return [operand for i, operand in enumerate(fusion.operands) if i in numbers]

  def _carries(self, instruction: Instruction) -> bool:
    chain = self._chain(instruction)
    return chain is not None and chain[1] == "carry"

  def _chain(self, fusion: Instruction) -> tuple[str, str] | None:
    """(chain, "start", "done" or "carry") of a fusion that is part of one."""
    if fusion.opcode != "fusion" or not fusion.called:
      return None
    if fusion.name not in self._chains:
      inside = self._module.computation(fusion.called[0]).instructions.values()
      self._chains[fusion.name] = _chain_of(inside)
    return self._chains[fusion.name]


def _chain_of(inside: Iterable[Instruction]) -> tuple[str, str] | None:
  found = [re.search(r'chain_id="(\d+)"', i.attributes_text) for i in inside]
  chain = next((match.group(1) for match in found if match), None)
  calls = "".join(i.attributes_text for i in inside if i.opcode == "custom-call")
  for role in ("Start", "Done"):
    if f"AsyncCollective{role}" in calls:
      return chain or "", role.lower()
  return None if chain is None else (chain, "carry")


def _is_carried(source: Instruction) -> bool:
  return source.opcode == "parameter" or bool(re.match(r"all-|reduce-scatter|coll", source.opcode))


def _parameters_behind(computation: Computation, name: str) -> set[int]:
  """Numbers of the parameters that `name` depends on."""
  numbers, seen, waiting = set(), set(), [name]
  while waiting:
    current = computation.instructions.get(waiting.pop())
    if current is None or current.name in seen:
      continue
    seen.add(current.name)
    if current.opcode == "parameter":
      numbers.add(current.index)
    waiting += current.operands
  return numbers
