"""Ulysses: exact attention over a sequence cut over devices; heads are dealt out in its stead.

DeepSpeed-Ulysses (arXiv 2309.14509). Letters: W devices on the axis, B batch, S tokens per device,
N = W S tokens in all, H query heads, K key/value heads, C head width.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel import _blockwise
from parallel._blockwise import Tokens
from parallel._zero_hops import on_raw_bits
from parallel.ring_attention import make_ring, same_type
from parallel.sequence_layout import Layout, context_permutation


def ulysses_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  axis_name: str,
  *,
  layout: Layout,
  granularity: int = 1,
  segment_ids: jax.Array | None = None,
  causal: bool = True,
  scale: float | None = None,
  block_size: int = 512,
) -> jax.Array:
  """`ring_attention`, by all-to-all: each device attends over the whole sequence, for H / W heads.

  Work is even in any layout, and least with "contiguous" and "zigzag", of which most hidden tiles
  are skipped.

  Wire, per device: `ulysses_attention_bytes`, (W - 1) / W 2 B S (H + K) C e bytes for e bytes per
  element in each pass; packed batches gather 4 B N bytes of ids in the forward pass. Memory:
  (2 H + 2 K) / W heads of N tokens, as many elements as before the exchange.

  Args:
    q: [B, S, H, C], W divides H.
    k: [B, S, K, C], W divides K. Where it does not, repeat heads: `jnp.repeat(k, n, axis=2)`.
    v: like `k`.
    axis_name: bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    layout, granularity, segment_ids, causal, scale, block_size: as in `ring_attention`.

  Returns:
    [B, S, H, C] in the dtype of `q`, differing over `axis_name`.

  Raises:
    ValueError: the axis does not divide the heads, or as in `ring_attention`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from parallel.ulysses import ulysses_attention
    >>> x = jnp.arange(4.0).reshape(2, 1, 2, 1, 1).repeat(2, axis=3)  # two devices, two heads
    >>> attend = lambda x: ulysses_attention(0 * x, x, x, "seq", layout="contiguous")
    >>> jax.vmap(attend, axis_name="seq")(x)[..., 1, 0].reshape(-1).tolist()
    [0.0, 0.5, 1.0, 1.5]
  """
  inputs = same_type(q, k, v, segment_ids, axis_name)
  size = _axes.axis_size(axis_name)
  _check_heads(q.shape[2], k.shape[2], size)
  blocks = make_ring(
    axis_name, q.shape, layout, granularity, causal=causal, scale=scale, block_size=block_size
  ).blocks
  order, _ = context_permutation(size * q.shape[1], size, layout, granularity)
  with jax.named_scope("ulysses_attention"):
    q, k, v, ids = inputs
    if ids is not None:
      ids = jax.lax.all_gather(ids, axis_name, axis=1, tiled=True)
    kv: Any = _exchange(axis_name, 3, 2, jnp.stack((k, v)))
    tokens = Tokens(order, ids)
    out = _blockwise.attention(blocks, _exchange(axis_name, 2, 1, q), kv[0], kv[1], tokens, tokens)
    return _exchange(axis_name, 1, 2, out)


def ulysses_attention_bytes(
  q_shape: Sequence[int],
  kv_shape: Sequence[int],
  axis_size: int,
  *,
  dtype: Any = jnp.float32,
  packed: bool = False,
) -> int:
  """Bytes that one device sends in the forward pass of `ulysses_attention`.

  The backward pass sends the same without `packed`.

  Args:
    q_shape: of `q` on one device, (B, S, H, C).
    kv_shape: of `k` on one device, (B, S, K, C).
    axis_size: W.
    dtype: of `q`, `k` and `v`.
    packed: with segment ids.

  Raises:
    ValueError: `axis_size` is below 1 or does not divide the heads.

  Example:
    >>> ulysses_attention_bytes((1, 16384, 32, 128), (1, 16384, 8, 128), 8, dtype="bfloat16")
    293601280
  """
  if axis_size < 1:
    raise ValueError(f"`axis_size` must be at least 1, got {axis_size}.")
  _check_heads(q_shape[2], kv_shape[2], axis_size)
  sent = 2 * (math.prod(q_shape) + math.prod(kv_shape)) // axis_size * jnp.dtype(dtype).itemsize
  ids = 4 * q_shape[0] * q_shape[1] if packed else 0
  return (axis_size - 1) * (sent + ids)


def _check_heads(num_heads: int, num_kv_heads: int, size: int) -> None:
  for name, heads in (("q", num_heads), ("k", num_kv_heads)):
    if heads % size:
      raise ValueError(
        f"`{name}` must have a number of heads that the {size} devices of the axis divide, got"
        f" {heads}."
      )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(axis_name: str, split: int, concat: int, x: jax.Array) -> jax.Array:
  """`all_to_all` of the bits; the derivative is the way back."""
  move = functools.partial(
    jax.lax.all_to_all, axis_name=axis_name, split_axis=split, concat_axis=concat, tiled=True
  )
  return on_raw_bits(move, x)


def _exchange_forward(axis_name, split, concat, x):
  return _exchange(axis_name, split, concat, x), None


def _exchange_backward(axis_name, split, concat, _, grad):
  return (_exchange(axis_name, concat, split, grad),)


_exchange.defvjp(_exchange_forward, _exchange_backward)
