"""From the arguments of the quantized collectives to what crosses the wire."""

import dataclasses
from typing import Any, Literal

from jaxcomm.compressors import BlockInt, Compressor, Hadamard, fp8, identity

Bits = Literal[4, 8, "fp8"] | None
BackwardBits = Bits | Literal["same"]


@dataclasses.dataclass(frozen=True)
class Wire:
  """The compressors of a collective and of its transpose; None sends arrays as they are."""

  forward: Compressor | None
  backward: Compressor | None

  @property
  def transposed(self) -> "Wire":
    return Wire(self.backward, self.forward)

  @property
  def exact(self) -> bool:
    return self.forward is None and self.backward is None


def compressor_of(
  bits: Any, block_size: int, rounding: Any = "nearest", hadamard: int | None = None
) -> Compressor | None:
  """The compressor that the arguments of a quantized collective stand for; None if exact.

  Raises:
    ValueError: an argument outside of what `quantized_all_gather` says.
  """
  if bits not in (4, 8, "fp8", None):
    raise ValueError(f"`bits` must be 4, 8, 'fp8' or None, got {bits!r}.")
  if bits is None:
    return None
  scaled = (
    fp8("e4m3", block_size, rounding) if bits == "fp8" else BlockInt(bits, block_size, rounding)
  )
  return scaled if hadamard is None else Hadamard(scaled, hadamard)


def wire_of(
  bits: Any, backward_bits: Any, block_size: int, rounding: Any, hadamard: int | None
) -> Wire:
  """The compressors of both directions; see `compressor_of`."""
  forward = compressor_of(bits, block_size, rounding, hadamard)
  if backward_bits == "same":
    return Wire(forward, forward)
  if backward_bits not in (4, 8, "fp8", None):
    raise ValueError(f"`backward_bits` must be 4, 8, 'fp8', None or 'same', got {backward_bits!r}.")
  return Wire(forward, compressor_of(backward_bits, block_size, rounding, hadamard))


def num_bytes(shape: tuple[int, ...], bits: Any, block_size: int, hadamard: int | None) -> int:
  """Bytes of the message for an array of `shape`; float32 for `bits=None`."""
  compressor = compressor_of(bits, block_size, hadamard=hadamard) or identity()
  return compressor.payload_bytes(tuple(shape))
