"""Texts of optimized HLO for tests: compiled ones, committed, and hand-written ones."""

import gzip
import pathlib

from hypothesis import strategies as st

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
GLOBAL = "channel_id=1, use_global_device_ids=true, to_apply=%add"
SQUARE = "f32[256,256]{1,0}"
MATMUL = 2.0 * 256**3  # FLOPs of the product of two squares


def read_fixture(name):
  """`gpu/ladder`, say; `scripts/make_hlo_fixtures.py` has the programs."""
  return gzip.decompress((FIXTURES / f"{name}.txt.gz").read_bytes()).decode()


def square_program(*lines, others=""):
  """A program of 256 x 256 matrices with the parameter `p`, on 8 devices."""
  body = "\n".join(f"  {line}" for line in (f"%p = {SQUARE} parameter(0)", *lines))
  head = "HloModule m, is_scheduled=true, num_partitions=8"
  return f"{head}\n{others}\nENTRY %main (p: f32[256,256]) -> f32[256,256] {{\n{body}\n}}\n"


def start(name, operand, *, is_sync=False):
  config = ', backend_config={"collective_backend_config":{"is_sync":true}}' if is_sync else ""
  return f"%{name} = {SQUARE} all-reduce-start(%{operand}), replica_groups={{}}, {GLOBAL}{config}"


def done(name, operand):
  return f"%{name} = {SQUARE} all-reduce-done(%{operand})"


def dot(name, left, right):
  dims = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
  return f"%{name} = {SQUARE} dot(%{left}, %{right}), {dims}"


def root(*operands):
  return f"ROOT %r = {SQUARE} add({', '.join('%' + operand for operand in operands)})"


@st.composite
def mangled(draw, sources):
  """One of the texts after one to four edits."""
  text = draw(st.sampled_from(sources))
  for _ in range(draw(st.integers(1, 4))):
    at = draw(st.integers(0, len(text) - 1))
    end = at + draw(st.sampled_from([0, 1, 3, 40, 400]))
    put = draw(st.sampled_from(["", "{", "}", "(", ")", ",", '"', "%", "7", "\n"]))
    text = text[:at] + put + text[end:]
  return text
