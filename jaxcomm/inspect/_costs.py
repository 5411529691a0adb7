"""FLOPs and bytes of the instructions of a compiled program, from its text.

FLOPs are those of matrix products (dot, convolution, cuBLAS calls): everything else is bound by
memory on the machines of `_machines.py`. Bytes are what a kernel reads and writes: of an operand
that it only slices, the slice; of a result updated in place, the update.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np

from jaxcomm.inspect._hlo import ArrayType, Computation, Instruction, Module
from jaxcomm.inspect._loops import Scope, trip_count

# No kernel runs for these: they name memory, or a copy engine does them.
_FREE = frozenset(
  (
    "add-dependency", "after-all", "bitcast", "constant", "copy-done", "copy-start",
    "get-tuple-element", "iota", "optimization-barrier", "parameter", "partition-id", "replica-id",
    "slice-done", "slice-start", "tuple",
  )
)  # fmt: skip
_COLLECTIVE = ("all-", "collective-", "ragged-all", "reduce-scatter", "send", "recv")
_FREE_CALLS = ("AllocateBuffer", "AssumeGather", "AsyncCollective", "ConcatBitcast", "Sharding")
_CUBLAS = re.compile(r"gemm|cublas.*matmul", re.IGNORECASE)
_PAIRS = 2**22  # of positions of a window: beyond, their product is taken without looking


@dataclasses.dataclass(frozen=True)
class Work:
  """What one instruction computes, in one execution on one device."""

  name: str  # of the HLO instruction
  flops: float  # of matrix products
  bytes: float  # read and written


class Costs:
  """Costs of the instructions of `module`; `uncounted` names calls of which FLOPs are unknown."""

  def __init__(self, module: Module):
    self.module = module
    self.uncounted: dict[str, str] = {}  # instruction -> what it calls
    self._whole: dict[str, Work] = {}

  def work(self, scope: Scope, instruction: Instruction) -> Work:
    """Cost of an instruction of `scope`, with all that it calls."""
    opcode, name = instruction.opcode, instruction.name
    if opcode in _FREE or opcode.startswith(_COLLECTIVE) or opcode.endswith("-done"):
      return Work(name, 0.0, 0.0)
    if opcode == "fusion":
      fused = self.module.computation(instruction.computation_named("calls"))
      flops = sum(self._flops(fused, i) for i in fused.instructions.values())
      return Work(name, flops, self._fusion_bytes(fused))
    if opcode == "while":
      trips = trip_count(self.module, scope, instruction)
      body = self._called(scope, instruction, instruction.computation_named("body"))
      if trips is None:
        self.uncounted[name] = "a loop of unknown length, counted once"
      return Work(name, body.flops * (trips or 1), body.bytes * (trips or 1))
    if opcode in ("call", "conditional", "async-start"):
      branches = [self._called(scope, instruction, called) for called in instruction.called]
      heaviest = max(branches, key=lambda w: (w.flops, w.bytes), default=Work("", 0.0, 0.0))
      return Work(name, heaviest.flops, heaviest.bytes)
    if opcode == "custom-call" and any(c in instruction.attributes_text for c in _FREE_CALLS):
      return Work(name, 0.0, 0.0)
    operands = self._operands(scope.computation, instruction)
    moved = sum(_size(arrays) for arrays in operands) + _size(instruction.types)
    return Work(name, self._flops(scope.computation, instruction), float(moved))

  def _called(self, scope: Scope, site: Instruction, name: str) -> Work:
    if name not in self._whole:
      inner = Scope(self.module.computation(name), scope, site)
      works = [self.work(inner, i) for i in inner.computation.instructions.values()]
      flops, moved = sum(w.flops for w in works), sum(w.bytes for w in works)
      self._whole[name] = Work(name, flops, moved)
    return self._whole[name]

  def _operands(
    self, computation: Computation, instruction: Instruction
  ) -> list[tuple[ArrayType, ...]]:
    missing = [name for name in instruction.operands if name not in computation.instructions]
    if missing:
      raise ValueError(
        f"`compiled`: operand `{missing[0]}` of `{instruction.name}` is not defined."
      )
    return [computation.instructions[name].types for name in instruction.operands]

  def _flops(self, computation: Computation, instruction: Instruction) -> float:
    """Of the matrix product that the instruction is; those of nested fusions too."""
    opcode = instruction.opcode
    if opcode == "fusion":
      fused = self.module.computation(instruction.computation_named("calls"))
      return sum(self._flops(fused, i) for i in fused.instructions.values())
    if opcode not in ("dot", "convolution", "custom-call"):
      return 0.0
    operands = [a[0].shape for a in self._operands(computation, instruction) if a]
    if opcode == "custom-call":
      return self._custom_call_flops(instruction, operands)
    if len(operands) != 2 or not instruction.types:
      raise ValueError(f"`compiled` has a {opcode} that cannot be read, `{instruction.name}`.")
    result = instruction.types[0].shape
    if opcode == "dot":
      contracted = instruction.attributes.get("lhs_contracting_dims", "{}")
      return 2.0 * math.prod(result) * _product_of(operands[0], re.findall(r"\d+", contracted))
    return _convolution_flops(instruction, operands[0], operands[1], result)

  def _custom_call_flops(self, call: Instruction, operands: list[tuple[int, ...]]) -> float:
    target = call.attributes.get("custom_call_target", "").strip('"')
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes_text)
    if _CUBLAS.search(target) and contracted and operands and call.types:
      dims = re.findall(r"\d+", contracted.group(1))
      return 2.0 * math.prod(call.types[0].shape) * _product_of(operands[0], dims)
    if not any(known in call.attributes_text for known in _FREE_CALLS):
      self.uncounted[call.name] = target
    return 0.0

  def _fusion_bytes(self, fused: Computation) -> float:
    parameters = [i for i in fused.instructions.values() if i.opcode == "parameter"]
    read = sum(self._read(fused, p.name, _size(p.types), False) for p in parameters)
    return float(read + self._written(fused, fused.root))

  def _read(self, computation: Computation, name: str, whole: int, nested: bool) -> int:
    """Bytes that the users of the value `name` of `whole` bytes read of it."""
    if nested and name == computation.root:
      return whole
    read = 0
    for user in computation.instructions.values():
      if name not in user.operands:
        continue
      if user.opcode in ("dynamic-slice", "slice") and user.operands[0] == name:
        read += _size(user.types)
      elif user.opcode == "bitcast":
        read += self._read(computation, user.name, whole, nested)
      elif user.opcode == "fusion" and user.called:
        inner = self.module.computation(user.called[0])
        numbers = {i for i, operand in enumerate(user.operands) if operand == name}
        inside = [i for i in inner.instructions.values() if i.opcode == "parameter"]
        read += sum(self._read(inner, p.name, whole, True) for p in inside if p.index in numbers)
      elif not (_passes(user) or (user.opcode, user.operands[0]) == ("dynamic-update-slice", name)):
        return whole
    return min(read, whole)

  def _written(self, fused: Computation, root: str | None) -> int:
    """Bytes of a fusion's result that it computes itself."""
    result = fused.instructions.get(root or "")
    while result is not None and result.opcode == "bitcast" and result.operands:
      result = fused.instructions.get(result.operands[0])
    if result is None or result.opcode == "parameter" or result.opcode.startswith(_COLLECTIVE):
      return 0
    if result.opcode == "tuple":
      return sum(self._written(fused, operand) for operand in result.operands)
    if result.opcode == "dynamic-update-slice" and len(result.operands) > 1:
      return _size(self._operands(fused, result)[1])
    return 0 if _passes(result) else _size(result.types)


def _passes(user: Instruction) -> bool:
  """Whether the instruction hands its operands on, or sends them, and computes nothing."""
  return (
    user.opcode in ("tuple", "get-tuple-element")
    or user.opcode.startswith(_COLLECTIVE)
    or (user.opcode == "custom-call" and "AsyncCollective" in user.attributes_text)
  )


def _size(arrays: Iterable[ArrayType]) -> int:
  return sum(array.num_bytes for array in arrays)


def _product_of(shape: tuple[int, ...], dims: Iterable[str]) -> int:
  numbers = [int(d) for d in dims]
  if any(d >= len(shape) for d in numbers):
    raise ValueError(f"`compiled` contracts dimensions {numbers} of an array of shape {shape}.")
  return math.prod(shape[d] for d in numbers)


def _convolution_flops(
  instruction: Instruction,
  inputs: tuple[int, ...],
  kernel: tuple[int, ...],
  result: tuple[int, ...],
) -> float:
  """XLA:TPU writes all products as convolutions, batched ones with a window over the batch."""
  labels = re.fullmatch(
    r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", "").replace("?", "")
  )
  if not labels or [len(part) for part in labels.groups()] != [
    len(shape) for shape in (inputs, kernel, result)
  ]:
    raise ValueError(f"`compiled` has a convolution that cannot be read, `{instruction.name}`.")
  of_inputs, of_kernel, of_result = (
    dict(zip(part, shape)) for part, shape in zip(labels.groups(), (inputs, kernel, result))
  )
  products = of_result.get("b", 1) * of_result.get("f", 1) * of_kernel.get("i", 1)
  window = _window(instruction.attributes.get("window", ""))
  for number, label in enumerate(sorted(of_kernel.keys() - set("io"))):
    sizes = (of_inputs.get(label, 1), of_kernel[label], of_result.get(label, 1))
    products *= _positions(
      sizes, {key: values[number : number + 1] for key, values in window.items()}
    )
  return 2.0 * products


def _window(text: str) -> dict[str, list[str]]:
  return {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w_\-]+)", text)}


def _positions(sizes: tuple[int, int, int], window: dict[str, list[str]]) -> int:
  """Pairs of a result and a kernel position that meet an element of the input, not padding."""
  size, kernel, result = sizes

  def number(key: str, default: int) -> int:
    found = re.match(r"-?\d+", (window.get(key) or [""])[0])
    return int(found.group()) if found else default

  stride, low = number("stride", 1), number("pad", 0)
  dilation, kernel_dilation = number("lhs_dilate", 1), number("rhs_dilate", 1)
  if kernel * result > _PAIRS or dilation < 1:
    return kernel * result
  at = np.arange(result)[:, None] * stride + np.arange(kernel) * kernel_dilation - low
  return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())
