"""A small parser of optimized HLO text: module, computations, instructions, types.

The grammar is the one that `jax.stages.Compiled.as_text()` prints on CPU, GPU and TPU:

    HloModule jit_f, is_scheduled=true, num_partitions=8
    %region (x: f32[]) -> f32[] {
      ROOT %add = f32[] add(%x, %x), metadata={...}
    }
    ENTRY %main (p: f32[8]) -> f32[8] { ... }

Attributes and operands are split only when they are asked for: a program of a large model has
megabytes of text, of which the collectives are a few lines.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

MAX_DEVICES = 2**20  # damaged text must not ask for the memory of more

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[(){}\[\],]')
_HEADER = re.compile(r"^(ENTRY\s+)?%?([^\s=(),{}]+)\s*(?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT\s+)?%?([^\s=(),{}]+)\s+=\s+(.*)$", re.DOTALL)
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_WIDTH = re.compile(r"(?:bf|f|s|u|c)(\d+)")


@dataclasses.dataclass(frozen=True)
class ArrayType:
  """One array of an instruction's type: `dtype` as HLO writes it (`f32`, `u8`), `shape`, bytes."""

  dtype: str
  shape: tuple[int, ...]
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; `arguments` is the text between the opcode's parentheses."""

  name: str
  opcode: str
  type_text: str
  arguments: str
  attributes_text: str

  @functools.cached_property
  def types(self) -> tuple[ArrayType, ...]:
    """The arrays of the result, tuples flattened."""
    return parse_types(self.type_text)

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    """Names of the operands, without `%`."""
    parts = (part.strip() for part in split_commas(_COMMENT.sub("", self.arguments)))
    return tuple(part.split()[-1].lstrip("%") for part in parts if part)

  @functools.cached_property
  def attributes(self) -> dict[str, str]:
    """Text of every `key=value` after the operands, at the outermost level."""
    pairs = (part.strip().partition("=") for part in split_commas(self.attributes_text))
    return {key: value for key, equals, value in pairs if equals}

  @functools.cached_property
  def index(self) -> int:
    """Number of a parameter, or of the element that a get-tuple-element takes.

    Raises:
      ValueError: there is none.
    """
    text = self.arguments if self.opcode == "parameter" else self.attributes.get("index", "")
    if not text.strip().isdecimal():
      raise ValueError(f"`compiled` has a {self.opcode} without a number, `{self.name}`.")
    return int(text)

  def computation_named(self, key: str) -> str:
    """Name of the computation that the attribute `key` holds.

    Raises:
      ValueError: there is no such attribute.
    """
    if key not in self.attributes:
      raise ValueError(f"`compiled` has a {self.opcode} without `{key}`, `{self.name}`.")
    return self.attributes[key].lstrip("%")

  @functools.cached_property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that the attributes mention, in the order written."""
    keys = ("condition", "body", "calls", "to_apply", "called_computations", "branch_computations")
    keys += ("true_computation", "false_computation")
    texts = (self.attributes[key].strip("{}") for key in keys if key in self.attributes)
    return tuple(name.strip().lstrip("%") for text in texts for name in text.split(",") if name)


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions in schedule order."""

  name: str
  instructions: dict[str, Instruction]
  root: str | None


@dataclasses.dataclass(frozen=True)
class Module:
  """A parsed program."""

  computations: dict[str, Computation]
  entry: Computation
  num_partitions: int
  replica_count: int

  def computation(self, name: str) -> Computation:
    """The computation called `name`.

    Raises:
      ValueError: the text does not define it.
    """
    if name not in self.computations:
      raise ValueError(f"`compiled` names computation `{name}`, which its text does not define.")
    return self.computations[name]


def parse_module(text: str) -> Module:
  """Parses the optimized HLO `text` of one program.

  Raises:
    ValueError: there is not exactly one ENTRY computation, or a line cannot be read.
  """
  computations: dict[str, Computation] = {}
  entries = []
  for is_entry, name, lines in _computation_texts(text):
    if name in computations:
      raise ValueError(f"`compiled` defines computation `{name}` twice.")
    computations[name] = _parse_computation(name, lines)
    if is_entry:
      entries.append(name)
  if len(entries) != 1:
    raise ValueError(
      f"`compiled` must be the HLO text of one program (one ENTRY computation), got {len(entries)}."
    )
  head = text[: text.find("\n\n")] if "\n\n" in text else text.partition("\n")[0]
  return Module(
    computations,
    computations[entries[0]],
    _header_number(head, "num_partitions"),
    _header_number(head, "replica_count"),
  )


def parse_types(text: str) -> tuple[ArrayType, ...]:
  """The arrays in the text of a type; tokens and opaque values have no bytes.

  Raises:
    ValueError: a dimension or an element type cannot be read.
  """
  return tuple(_array_type(*m.groups()) for m in _ARRAY.finditer(_COMMENT.sub("", text)))


def split_commas(text: str) -> list[str]:
  """Splits at the commas that stand outside brackets and quotes."""
  parts, depth, start = [], 0, 0
  for m in _TOKEN.finditer(text):
    token = m.group()
    if token in "({[":
      depth += 1
    elif token in ")}]":
      depth -= 1
    elif token == "," and depth == 0:
      parts.append(text[start : m.start()])
      start = m.end()
  return [*parts, text[start:]]


def _closing(text: str, start: int) -> int:
  """Index of the bracket that closes the one at `start`, or -1."""
  depth = 0
  for m in _TOKEN.finditer(text, start):
    token = m.group()
    if token in "({[":
      depth += 1
    elif token in ")}]":
      depth -= 1
      if depth == 0:
        return m.start()
  return -1


def _computation_texts(text: str) -> Iterator[tuple[bool, str, list[str]]]:
  """Yields (is entry, name, lines) of every computation; a wrapped line joins the one before."""
  header, lines = None, []
  for line in text.splitlines():
    if header is None:
      header = None if line.startswith((" ", "HloModule")) else _HEADER.match(line)
    elif line.startswith("}"):
      yield bool(header.group(1)), header.group(2), lines
      header, lines = None, []
    elif _INSTRUCTION.match(line) or not lines:
      lines.append(line)
    else:
      lines[-1] += "\n" + line
  if header is not None:
    raise ValueError(f"`compiled` ends inside computation `{header.group(2)}`.")


def _parse_computation(name: str, lines: list[str]) -> Computation:
  instructions, root = {}, None
  for line in filter(str.strip, lines):
    m = _INSTRUCTION.match(line)
    instruction = _parse_instruction(m.group(2), m.group(3)) if m else None
    if m is None or instruction is None:
      raise ValueError(
        f"`compiled` has a line in `{name}` that is not HLO: {line.strip()[:120]!r}."
      )
    instructions[instruction.name] = instruction
    root = instruction.name if m.group(1) else root
  return Computation(name, instructions, root)


def _parse_instruction(name: str, text: str) -> Instruction | None:
  """`text` is what follows `%name = `: a type, an opcode, operands and attributes."""
  if text.startswith("("):
    end_of_type = _closing(text, 0) + 1
  else:
    m = _ARRAY.match(text)
    end_of_type = m.end() if m else 0
  opcode = _OPCODE.match(text, end_of_type)
  if end_of_type == 0 or opcode is None:
    return None
  close = _closing(text, opcode.end() - 1)
  if close < 0:
    return None
  arguments = text[opcode.end() : close]
  return Instruction(name, opcode.group(1), text[:end_of_type], arguments, text[close + 1 :])


def _array_type(dtype: str, dims: str, layout: str | None) -> ArrayType:
  try:
    # `<=8` is a dynamic dimension: its bound is what the program reserves and sends.
    shape = tuple(int(d.strip().removeprefix("<=")) for d in dims.split(",") if d.strip())
  except ValueError:
    raise ValueError(
      f"`compiled` has a type with unreadable dimensions: {dtype}[{dims}]."
    ) from None
  return ArrayType(dtype, shape, math.ceil(math.prod(shape) * _bits(dtype, layout or "") / 8))


def _bits(dtype: str, layout: str) -> int:
  """Bits per element; below one byte only where the layout says that elements are packed."""
  if dtype in ("token", "opaque", "tuple"):
    return 0
  if dtype == "pred":
    return 8
  m = _WIDTH.match(dtype)
  if m is None:
    raise ValueError(f"`compiled` has an element type of unknown size: {dtype}.")
  packed = re.search(r"E\((\d+)\)", layout)
  return int(packed.group(1)) if packed else max(int(m.group(1)), 8)


def _header_number(head: str, key: str) -> int:
  m = re.search(rf"\b{key}=(\d+)", head)
  number = int(m.group(1)) if m else 1
  if not 1 <= number <= MAX_DEVICES:
    raise ValueError(f"`compiled` must have 1 to {MAX_DEVICES} devices, got {key}={number}.")
  return number
