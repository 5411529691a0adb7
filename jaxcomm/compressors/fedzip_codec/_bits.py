"""Writing and reading lists of bit fields, a whole list at a time."""

import numpy as np


class FedZipError(ValueError):
  """Bytes that are no FedZip message.

  Attributes:
    why: what was expected there.
    offset: the byte at which reading failed.
  """

  def __init__(self, why: str, offset: int):
    super().__init__(f"cannot decode at byte {offset}: {why}.")
    self.why, self.offset = why, offset


class BitWriter:
  """Collects bits, the most significant of each field first."""

  def __init__(self):
    self._parts: list[np.ndarray] = []

  def bits(self, bits: np.ndarray) -> None:
    """An array of zeros and ones."""
    self._parts.append(bits.astype(np.uint8))

  def fixed(self, values: np.ndarray, width: int) -> None:
    """Every value in `width` bits."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.int64)
    self.bits((values[:, None] >> shifts & 1).reshape(-1))

  def unary(self, values: np.ndarray) -> None:
    """Every value as so many zeros and a one."""
    ends = np.cumsum(values + 1)
    bits = np.zeros(ends[-1] if ends.size else 0, np.uint8)
    bits[ends - 1] = 1
    self._parts.append(bits)

  def low_bits(self, values: np.ndarray, widths: np.ndarray) -> None:
    """The lowest `widths[i]` bits of `values[i]`."""
    ends = np.cumsum(widths)
    bits = np.zeros(ends[-1] if ends.size else 0, np.uint8)
    for bit in range(int(widths.max(initial=0))):
      has = widths > bit
      bits[ends[has] - 1 - bit] = values[has] >> bit & 1
    self._parts.append(bits)

  def tobytes(self) -> bytes:
    """All bits, the last byte filled with zeros."""
    return np.packbits(np.concatenate([np.zeros(0, np.uint8), *self._parts])).tobytes()


class BitReader:
  """Reads what `BitWriter` wrote; memory is a small multiple of the bytes given.

  Args:
    data: the bytes.
    offset: of `data` in the message, for errors.
  """

  def __init__(self, data: bytes, offset: int):
    self._all = np.unpackbits(np.frombuffer(data, np.uint8))
    self._ones = np.flatnonzero(self._all)
    self._next, self._offset = 0, offset

  def error(self, why: str) -> FedZipError:
    """At the current position."""
    return FedZipError(why, self._offset + self._next // 8)

  def bits(self, count: int) -> np.ndarray:
    """The next `count` bits, uint8."""
    if count > self._all.size - self._next:
      raise self.error(f"{count} bits needed, {self._all.size - self._next} left")
    self._next += count
    return self._all[self._next - count : self._next]

  def fixed(self, count: int, width: int) -> np.ndarray:
    """`count` values of `width` bits, int64."""
    fields = self.bits(count * width).reshape(count, width)
    values = np.zeros(count, np.int64)
    for bit in range(width):
      values = values << 1 | fields[:, bit]
    return values

  def unary(self, count: int) -> np.ndarray:
    """`count` values, int64."""
    first = np.searchsorted(self._ones, self._next)
    ends = self._ones[first : first + count]
    if ends.size < count:
      raise self.error(f"{count} unary numbers needed, {ends.size} left")
    values = np.diff(ends, prepend=self._next - 1) - 1
    self._next = int(ends[-1]) + 1 if count else self._next
    return values

  def low_bits(self, widths: np.ndarray) -> np.ndarray:
    """One value for each width, int64."""
    ends = np.cumsum(widths)
    bits = self.bits(int(ends[-1]) if ends.size else 0)
    values = np.zeros(widths.size, np.int64)
    for bit in range(int(widths.max(initial=0))):
      has = widths > bit
      values[has] |= bits[ends[has] - 1 - bit].astype(np.int64) << bit
    return values

  def finish(self) -> None:
    """Raises FedZipError unless only the filling of the last byte is left, and it is zero."""
    rest = self._all[self._next :]
    if rest.size > 7 or rest.any():
      raise self.error(f"the payload must end here, {rest.size} bits are left")
