"""How often a `while` runs, read from `known_trip_count` or from the loop itself.

CPU and GPU text carry the count. TPU text does not: there the condition compares a counter with a
constant, and start and step stand in the operand and in the body. Both sides are evaluated as
`variable + offset`, where a variable is an element of the loop's tuple that the body changes.
"""

import dataclasses
import re

from jaxcomm.inspect._hlo import Computation, Instruction, Module

# Operations that hand on a scalar's value, whatever they do to its type or place.
_SAME_VALUE = frozenset(
  ("bitcast", "broadcast", "convert", "copy", "copy-done", "copy-start", "optimization-barrier")
) | {"reshape"}
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}
# No real loop bound is this far from its constant; text that is not HLO could be.
_MAX_STEPS = 2000
_MAX_DEPTH = 100


@dataclasses.dataclass(frozen=True)
class Scope:
  """A computation and the call that runs it; `site` is None for the entry.

  `first_operand` is the operand of `site` that becomes parameter 0.
  """

  computation: Computation
  caller: "Scope | None" = None
  site: Instruction | None = None
  first_operand: int = 0


@dataclasses.dataclass(frozen=True)
class _Value:
  """`offset`, plus the element at `path` of the tuple of the loop `loop` if that is not None."""

  offset: int
  loop: str | None = None
  path: tuple[int, ...] = ()


def trip_count(module: Module, scope: Scope, loop: Instruction) -> int | None:
  """How often the body of the `while` instruction `loop` of `scope` runs; None if unknown."""
  config = loop.attributes.get("backend_config", "")
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', config)
  if known:
    return int(known.group(1))
  return _Evaluator(module).trip_count(scope, loop)


class _Evaluator:
  """Evaluates scalars of one loop; gives up (None) on anything it does not understand."""

  def __init__(self, module: Module):
    self.module = module
    self.steps = 0

  def trip_count(self, scope: Scope, loop: Instruction) -> int | None:
    condition = self._enter(scope, loop, loop.computation_named("condition"))
    found = condition and self._comparison(condition, condition.computation.root)
    if not found:
      return None
    inner, compare = found
    left, right = (self.value(inner, name) for name in compare.operands)
    direction = compare.attributes.get("direction", "")
    if left and right and left.loop is None:
      left, right, direction = right, left, _FLIPPED.get(direction, "")
    if not left or not right or left.loop != loop.name or right.loop is not None:
      return None
    start = self.value(scope, loop.operands[0], left.path)
    step = self._update(scope, loop, left.path)
    if not start or not step or start.loop is not None or step.loop != loop.name:
      return None
    return _count(start.offset + left.offset, right.offset, step.offset, direction)

  def value(
    self, scope: Scope | None, name: str | None, path: tuple[int, ...] = (), depth: int = 0
  ) -> _Value | None:
    """The scalar `name` (of a tuple, its element at `path`)."""
    self.steps += 1
    instruction = scope and scope.computation.instructions.get(name or "")
    if not scope or not instruction or self.steps > _MAX_STEPS or depth > _MAX_DEPTH:
      return None
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "parameter":
      return self._parameter(scope, instruction, path, depth + 1)
    if opcode == "constant":
      literal = re.fullmatch(r"[{\s]*(-?\d+)[}\s]*", instruction.arguments)
      return _Value(int(literal.group(1))) if literal and not path else None
    if opcode in ("fusion", "call"):
      child = self._enter(scope, instruction, instruction.called[0] if instruction.called else "")
      return child and self.value(child, child.computation.root, path, depth + 1)
    if not operands:
      return None
    if opcode in ("add", "subtract") and len(operands) == 2:
      left, right = (self.value(scope, operand, (), depth + 1) for operand in operands)
      return _sum(left, right, -1 if opcode == "subtract" else 1)
    if opcode == "tuple" and path and path[0] < len(operands):
      return self.value(scope, operands[path[0]], path[1:], depth + 1)
    if opcode == "get-tuple-element":
      path = (instruction.index, *path)
      return self.value(scope, operands[0], path, depth + 1)
    if opcode == "while" and self._is_constant(scope, instruction, path):
      return self.value(scope, operands[0], path, depth + 1)
    return self.value(scope, operands[0], path, depth + 1) if opcode in _SAME_VALUE else None

  def _parameter(
    self, scope: Scope, parameter: Instruction, path: tuple[int, ...], depth: int
  ) -> _Value | None:
    site = scope.site
    if site is None:
      return None
    if site.opcode == "while" and not self._is_constant(scope.caller, site, path):
      return _Value(0, site.name, path)
    index = scope.first_operand + parameter.index
    return self.value(scope.caller, site.operands[index], path, depth)

  def _update(self, scope: Scope, loop: Instruction, path: tuple[int, ...]) -> _Value | None:
    """What the body makes of the element at `path`."""
    body = self._enter(scope, loop, loop.computation_named("body"))
    return body and self.value(body, body.computation.root, path)

  def _is_constant(self, scope: Scope | None, loop: Instruction, path: tuple[int, ...]) -> bool:
    """Whether every iteration hands on the element unchanged."""
    body = scope and self._enter(scope, loop, loop.computation_named("body"))
    if not body:
      return False
    name, rest = body.computation.root, path
    for _ in range(_MAX_DEPTH):
      current = body.computation.instructions.get(name or "")
      if current is None or current.opcode == "parameter" or not current.operands:
        return current is not None and current.opcode == "parameter" and rest == path
      name = current.operands[0]
      if current.opcode == "tuple" and rest and rest[0] < len(current.operands):
        name, rest = current.operands[rest[0]], rest[1:]
      elif current.opcode == "get-tuple-element":
        rest = (current.index, *rest)
      elif current.opcode not in _SAME_VALUE:
        return False
    return False

  def _comparison(self, scope: Scope, name: str | None) -> tuple[Scope, Instruction] | None:
    """The `compare` behind the loop condition, which may stand in a fusion."""
    for _ in range(_MAX_DEPTH):
      instruction = scope.computation.instructions.get(name or "")
      if instruction is None or instruction.opcode == "compare":
        return (scope, instruction) if instruction and len(instruction.operands) == 2 else None
      if instruction.opcode in ("fusion", "call") and instruction.called:
        child = self._enter(scope, instruction, instruction.called[0])
        if child is None:
          return None
        scope, name = child, child.computation.root
      elif instruction.opcode in _SAME_VALUE and instruction.operands:
        name = instruction.operands[0]
      else:
        return None
    return None

  def _enter(self, scope: Scope, site: Instruction, name: str) -> Scope | None:
    computation = self.module.computations.get(name)
    return computation and Scope(computation, scope, site)


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
  """`left + sign * right`, where at most one is a variable and that one is added."""
  if not left or not right or (right.loop and (left.loop or sign < 0)):
    return None
  variable = left if left.loop else right
  return dataclasses.replace(variable, offset=left.offset + sign * right.offset)


def _count(start: int, limit: int, step: int, direction: str) -> int | None:
  """Iterations of `for (i = start; i DIRECTION limit; i += step)`; None if it may not end."""
  limit += {"LE": 1, "GE": -1}.get(direction, 0)
  if direction in ("LT", "LE") and step > 0:
    return max(0, -((start - limit) // step))
  if direction in ("GT", "GE") and step < 0:
    return max(0, -((limit - start) // -step))
  if direction == "NE" and step and (limit - start) % step == 0 and (limit - start) // step >= 0:
    return (limit - start) // step
  return None
