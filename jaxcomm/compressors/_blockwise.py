"""Any compressor, block by block."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxcomm.compressors import _blocks
from jaxcomm.compressors._base import Compressor, Key, Payload, split_key


@dataclasses.dataclass(frozen=True)
class Blockwise(Compressor):
  r"""`compressor` for every block of `block_size` consecutive elements: a Top-k of each, say.

  The last block may be shorter and gets a message of its own: nothing is padded. omega is the
  largest and alpha the smallest of the blocks.

  Payload for K full blocks: `blocks`, the payload of `compressor` with a leading axis of K, and
  `rest`, one payload of the other elements ({} if there are none).

  Attributes:
    compressor: of each block. Its constants must be worst at the largest size, if it has none for
      all sizes.
    block_size: at least 8.

  Raises:
    ValueError: `block_size` is below 8, or `compressor` refuses the size of a block.
  """

  compressor: Compressor
  block_size: int

  def __post_init__(self):
    _blocks.check_block_size(self.block_size)

  @property
  def unbiased(self) -> bool:
    return self.compressor.unbiased

  @property
  def needs_key(self) -> bool:
    return self.compressor.needs_key

  @property
  def shared_key(self) -> bool:
    return self.compressor.shared_key

  def _block_sizes(self, size: float) -> list[float]:
    """The different sizes of blocks; for arrays of any size, one that bounds them."""
    if math.isinf(size):
      known = self.compressor.omega is not None or self.compressor.alpha is not None
      return [math.inf if known else self.block_size]
    sizes = {min(self.block_size, int(size)), int(size) % self.block_size}
    return sorted(sizes - {0}) or [0]

  def _omega(self, size: float) -> float:
    return max(self.compressor._omega(block) for block in self._block_sizes(size))

  def _alpha(self, size: float) -> float:
    return min(self.compressor._alpha(block) for block in self._block_sizes(size))

  def _cut(self, x_D: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(x_KB, the other elements)."""
    end = x_D.size - x_D.size % self.block_size
    return x_D[:end].reshape(-1, self.block_size), x_D[end:]

  def _encode(self, key: Key, x_D: jax.Array) -> Payload:
    x_KB, rest = self._cut(x_D)
    keys = split_key(key, x_KB.shape[0] + 1)
    block_keys = None if key is None else keys[:-1]
    blocks = jax.vmap(self.compressor._encode)(block_keys, x_KB)
    return {"blocks": blocks, "rest": self.compressor._encode(keys[-1], rest) if rest.size else {}}

  def _decode(self, payload: Payload, size: int, key: Key) -> jax.Array:
    num, rest = divmod(size, self.block_size)
    keys = split_key(key, num + 1)
    block_keys = None if key is None else keys[:-1]

    def decode(payload, key):
      return self.compressor._decode(payload, self.block_size, key)

    x_D = jax.vmap(decode)(payload["blocks"], block_keys).reshape(-1)
    if not rest:
      return x_D
    return jnp.concatenate([x_D, self.compressor._decode(payload["rest"], rest, keys[-1])])

  def _num_bytes(self, size: int) -> int:
    num, rest = divmod(size, self.block_size)
    blocks = num * self.compressor._num_bytes(self.block_size)
    return blocks + (self.compressor._num_bytes(rest) if rest else 0)

  def _variance(self, x_D: jax.Array) -> jax.Array:
    x_KB, rest = self._cut(x_D)
    total = jax.vmap(self.compressor._variance)(x_KB).sum()
    return total + self.compressor._variance(rest) if rest.size else total


def blockwise(compressor: Compressor, block_size: int) -> Blockwise:
  """`compressor` for every block of `block_size` elements; see `Blockwise`.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.compressors import blockwise, scaled_sign
  >>> compressor = blockwise(scaled_sign(), 8)
  >>> payload = compressor.compress(None, jnp.asarray([-1.0] * 8 + [4.0, 2.0]))
  >>> compressor.decompress(payload, (10,)).tolist()[6:], compressor.payload_bytes((10,))
  ([-1.0, -1.0, 3.0, 3.0], 10)
  >>> compressor.alpha
  0.125
  """
  return Blockwise(compressor, block_size)
