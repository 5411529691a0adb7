"""Block-scaled signed integers of 2 to 8 bits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks, _norms, _packing
from jaxcomm.compressors._base import Compressor, Key, Payload


@dataclasses.dataclass(frozen=True)
class BlockInt(Compressor):
  r"""Symmetric integers with one float32 scale per block of consecutive elements.

  With qmax = 2^(bits - 1) - 1, block B and scale s:

  .. math:: s = \max_B |x| / q_{max}, \quad c = round(x / s) \in [-q_{max}, q_{max}],
            \quad D(c) = c \cdot s

  s is rounded up to 17 significant bits (at most 2^-16 relative), which makes c * s exact in
  float32. Error per element: at most s / 2 (nearest, half to even), below s (stochastic,
  floor(x / s) plus one with the probability of the fraction: unbiased).

  Payload for d elements: `codes` int8[d] (8 bits) or uint8[n], two's complement codes packed by
  the powers of two in `bits` (4 bits: nibbles, low nibble first, n = ceil(d / 2); 2 bits: four per
  byte, n = ceil(d / 4); 3 bits: d 1-bit parts, then d 2-bit parts, n = ceil(d / 8) + ceil(d / 4);
  and so on, about d * bits / 8), and `scales` float32[ceil(d / block_size)].

  A block of zeros decodes to zeros. A block with NaN or Inf decodes to NaN everywhere. A block
  whose scale is below the smallest normal float32 (max |x| < 1.5e-36 at 8 bits, 8.3e-38 at 4)
  is sent as zeros, because XLA flushes subnormal numbers on some devices. A block whose maximum
  is within 2^-16 of the largest float32 may decode to Inf; one with a scale above 2^126, which
  takes 2 or 3 bits and numbers above 8.5e37 or 2.5e38, decodes to NaN.

  Attributes:
    bits: 2 to 8.
    block_size: elements per scale, at least 8; even for 4 bits.
    rounding: "nearest" or "stochastic" (needs a key).

  Raises:
    ValueError: a field outside these rules, or `x` is not floating point.

  Sources: block scaling as in ZeRO++ (arXiv 2306.10209, section 3.1); stochastic rounding as in
  QSGD (arXiv 1610.02132, section 3.1) with the maximum norm.
  """

  bits: int
  block_size: int = 256
  rounding: _blocks.Rounding = "nearest"

  def __post_init__(self):
    if type(self.bits) is not int or not 2 <= self.bits <= 8:
      raise ValueError(f"`bits` must be in 2..8, got {self.bits!r}.")
    _blocks.check_fields(self.block_size, self.rounding, packed=self.bits == 4)

  @property
  def qmax(self) -> int:
    return 2 ** (self.bits - 1) - 1

  @property
  def unbiased(self) -> bool:
    return self.rounding == "stochastic"

  @property
  def needs_key(self) -> bool:
    return self.rounding == "stochastic"

  def _spread(self, size: float) -> float:
    # elements * s^2 / (4 max|x|^2), with what rounding the scale up may add.
    return min(self.block_size, size) * (1 + 2**-16) ** 2 / (4 * self.qmax**2)

  def _omega(self, size: float) -> float:
    """Of stochastic rounding: the root of omega (1 + omega) = block_size / (4 qmax^2).

    Below the usual block_size / (4 qmax^2): a small element x errs by at most x (s - x), so the
    worst block holds qmax * s once and s / (2 (1 + omega)) elsewhere.
    """
    if self.rounding == "nearest":
      return math.inf
    return (math.sqrt(1 + 4 * self._spread(size)) - 1) / 2

  def _alpha(self, size: float) -> float:
    """1 / (1 + block_size / (4 qmax^2)) (nearest); 1 - omega (stochastic) if positive.

    The worst block for nearest holds qmax * s once and almost s / 2 elsewhere.
    """
    if self.rounding == "nearest":
      return 1 / (1 + self._spread(size))
    return super()._alpha(size)

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    x_KB, scale_K1 = self._scaled(x_D)
    noise_key = key if self.rounding == "stochastic" else None
    return encode_multiples(noise_key, x_KB, scale_K1, x_D.size, self.bits)

  def _scaled(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_KB = _blocks.to_blocks(x_D, self.block_size)
    return x_KB, _blocks.integer_scale(_norms.absmax(x_KB), self.qmax)

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    del key
    return decode_multiples(payload, size, self.bits, self.block_size)

  def _num_bytes(self, size: int) -> int:
    """About d * bits / 8 (`_packing`) + 4 * ceil(d / block_size)."""
    codes = _packing.packed_bytes(size, self.bits)
    return codes + 4 * _blocks.num_blocks(size, self.block_size)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    if self.rounding == "nearest":
      return super()._variance(x_D)
    return _blocks.multiples_variance(*self._scaled(x_D))


def encode_multiples(
  key: Key, x_KB: jax.Array, scale_K1: jax.Array, size: int, bits: int
) -> Payload:
  """The payload of the first `size` elements; rounded to nearest if `key` is None."""
  noise = None if key is None else _blocks.column_noise(key, x_KB.shape)

  def code(i, step):
    x = x_KB[:, i::step]
    if noise is None:
      return _blocks.nearest_multiples(x, scale_K1)
    return _blocks.stochastic_multiples(x, noise(i, step), scale_K1)

  if bits == 8:
    codes = _blocks.from_blocks(code(0, 1), size)
  else:
    codes = _packing.pack_columns(code, x_KB.shape, bits, size)
  return {"codes": codes, "scales": scale_K1[:, 0]}


def decode_multiples(payload: Payload, size: int, bits: int, block_size: int) -> jax.Array:
  """codes * scales: float32[size]."""
  codes = payload["codes"]
  if bits < 8:
    sign = 2 ** (bits - 1)
    codes = (_packing.unpack(codes, size, bits).astype(jnp.int8) ^ sign) - sign
  codes_KB = _blocks.to_blocks(codes, block_size).astype(jnp.float32)
  return _blocks.from_blocks(codes_KB * payload["scales"][:, None], size)


def int8(block_size: int = 256, rounding: _blocks.Rounding = "nearest") -> BlockInt:
  """8-bit block integers: 1 + 4 / block_size bytes per element; see `BlockInt`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import int8
  >>> compressor = int8(block_size=8)
  >>> payload = compressor.compress(None, jnp.asarray([0.0, 1.0, -127.0]))
  >>> payload["codes"].tolist(), payload["scales"].tolist()
  ([0, 1, -127], [1.0])
  >>> compressor.decompress(payload, (3,)).tolist(), compressor.payload_bytes((3,))
  ([0.0, 1.0, -127.0], 7)
  """
  return BlockInt(8, block_size, rounding)


def int4(block_size: int = 256, rounding: _blocks.Rounding = "nearest") -> BlockInt:
  """4-bit block integers: 0.5 + 4 / block_size bytes per element; see `BlockInt`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import int4
  >>> payload = int4(block_size=8).compress(None, jnp.asarray([1.0, -2.0, 7.0]))
  >>> [hex(byte) for byte in payload["codes"].tolist()]
  ['0xe1', '0x7']
  """
  return BlockInt(4, block_size, rounding)
