"""Ring attention: exact attention over a sequence cut over devices; keys and values travel.

Ring Attention (arXiv 2310.01889), with the layouts of Striped Attention (arXiv 2311.09431) and of
zigzag context parallelism. Letters: W devices on the axis, B batch, S tokens per device, H query
heads, K key/value heads, C head width.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from parallel import _blockwise
from parallel._blockwise import Blocks, Tokens
from parallel._zero_hops import on_raw_bits
from parallel.sequence_layout import Layout, shard_tokens


def ring_attention(
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
  r"""Softmax attention of this device's queries over the keys of all devices on `axis_name`.

  Queries stay; the message, keys and values of S tokens, goes round the ring in W - 1 hops, each on
  its way while the message before it is used. The partial results are merged in float32. No device
  ever holds more than two messages, or scores of more than `block_size` queries and keys at a time.

  Wire, per device: `ring_attention_bytes`, (W - 1) 2 B S K C e bytes forward, for e bytes per
  element. The derivative is our own: it keeps inputs, output and log-sum-exp, computes the scores
  again, and sends keys, values and their float32 gradients: (W - 1) 2 B S K C (e + 4) bytes.
  Gradients join the ring at the first guest of their keys, and so need no more hops than these.
  Packed batches send 4 B S bytes of ids with each hop.

  Args:
    q: [B, S, H, C], floating point, rotary embedding applied at the positions of `layout`.
    k: [B, S, K, C], K divides H; query head h reads key/value head h // (H / K).
    v: like `k`.
    axis_name: bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    layout: how the tokens were dealt out, see `context_permutation`. Balanced under a causal mask:
      "zigzag" and "striped".
    granularity: tokens per stripe of "striped".
    segment_ids: int32[B, S]; tokens attend only within their own segment. 0 is padding, which
      attends to nothing, gets output 0, and has gradient 0.
    causal: tokens attend to themselves and earlier tokens of the whole sequence; else to all.
    scale: of the scores, default `C ** -0.5`.
    block_size: most tokens per tile. Tiles that causality hides are skipped.

  Returns:
    [B, S, H, C] in the dtype of `q`, differing over `axis_name`.

  Raises:
    ValueError: an argument outside these rules, an unbound axis, a `layout` that cannot deal out
      W S tokens, or a `block_size` below the neighbouring tokens of a device (S; zigzag S / 2) that
      does not divide them.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from parallel.ring_attention import ring_attention
    >>> x = jnp.arange(4.0).reshape(2, 1, 2, 1, 1)  # two devices, two tokens each
    >>> attend = lambda x: ring_attention(0 * x, x, x, "seq", layout="contiguous")
    >>> jax.vmap(attend, axis_name="seq")(x).reshape(-1).tolist()
    [0.0, 0.5, 1.0, 1.5]
  """
  inputs = same_type(q, k, v, segment_ids, axis_name)
  ring = make_ring(
    axis_name, q.shape, layout, granularity, causal=causal, scale=scale, block_size=block_size
  )
  with jax.named_scope("ring_attention"):
    return _ring_attention(ring, *inputs)


def ring_attention_bytes(
  shape: Sequence[int],
  axis_size: int,
  *,
  dtype: Any = jnp.float32,
  backward: bool = False,
  packed: bool = False,
) -> int:
  """Bytes that one device sends in one pass of `ring_attention`.

  Args:
    shape: of `k` on one device, (B, S, K, C).
    axis_size: W.
    dtype: of `k` and `v`.
    backward: the backward pass, in place of the forward pass.
    packed: with segment ids.

  Example:
    >>> shape = (1, 16384, 8, 128)  # of 131,072 tokens on 8 devices, bfloat16
    >>> [ring_attention_bytes(shape, 8, dtype="bfloat16", backward=b) for b in (False, True)]
    [469762048, 1409286144]
  """
  if axis_size < 1:
    raise ValueError(f"`axis_size` must be at least 1, got {axis_size}.")
  element = jnp.dtype(dtype).itemsize + (4 if backward else 0)
  ids = 4 * shape[0] * shape[1] if packed else 0
  return (axis_size - 1) * (2 * math.prod(shape) * element + ids)


@dataclasses.dataclass(frozen=True)
class Ring:
  """The static side of a call: the axis, who holds which tokens, and how a block is attended."""

  axis_name: str
  size: int
  layout: Layout
  granularity: int
  blocks: Blocks

  def tokens(self, shard: Any, shard_len: int, segment_ids: jax.Array | None) -> Tokens:
    """Those of device `shard`."""
    place = shard_tokens(shard, self.size, shard_len, self.layout, self.granularity)
    return Tokens(place, segment_ids)

  def hop(self, tree: Any) -> Any:
    """Device r's arrays on device r + 1."""
    pairs = [(r, (r + 1) % self.size) for r in range(self.size)]
    move = functools.partial(jax.lax.ppermute, axis_name=self.axis_name, perm=pairs)
    return jax.tree.map(lambda x: on_raw_bits(move, x), tree)


def same_type(
  q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, axis_name: str
) -> tuple[Any, ...]:
  """The arguments, checked, differing over the same axes, `axis_name` among them.

  A sum over further axes is then the business of JAX, not of our derivatives.
  """
  _blockwise.check_shapes(q, k, v, segment_ids)
  inputs = (q, k, v, segment_ids)
  return _axes.vary(_axes.vary_like(inputs, inputs), axis_name)


def make_ring(
  axis_name: str,
  q_shape: tuple[int, ...],
  layout: Layout,
  granularity: int,
  *,
  causal: bool,
  scale: float | None,
  block_size: int,
) -> Ring:
  """Checks the options against the queries [B, S, H, C] of one device."""
  size, shard_len = _axes.axis_size(axis_name), q_shape[1]
  shard_tokens(0, size, shard_len, layout, granularity)  # raises if it cannot be
  tile = _blockwise.tile_size(shard_len // 2 if layout == "zigzag" else shard_len, block_size)
  blocks = Blocks(causal, q_shape[3] ** -0.5 if scale is None else scale, tile)
  return Ring(axis_name, size, layout, granularity, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attention(ring: Ring, q, k, v, segment_ids):
  return ring_forward(ring, q, k, v, segment_ids)[0]


def _forward(ring, q, k, v, segment_ids):
  out, lse = ring_forward(ring, q, k, v, segment_ids)
  return out, (q, k, v, segment_ids, out, lse)


def _backward(ring, residuals, grad):
  q, k, v, segment_ids, out, lse = residuals
  return *ring_backward(ring, q, k, v, segment_ids, out, lse, grad), None


_ring_attention.defvjp(_forward, _backward)


def ring_forward(
  ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
  """(output in the dtype of `q`, float32[B, S, H] log-sum-exp over the keys of all devices)."""
  rank = jax.lax.axis_index(ring.axis_name)
  queries = ring.tokens(rank, q.shape[1], segment_ids)

  def attend(state, i, message):
    (out, lse), ((k, v), ids) = state, message
    keys = ring.tokens((rank - i) % ring.size, q.shape[1], ids)
    more, lse_of_more = _blockwise.forward(q, k, v, queries, keys, ring.blocks)
    return _blockwise.merge_partials(out, lse, more, lse_of_more)

  def step(carry, i):
    state, message = carry
    following = ring.hop(message)  # does not wait for the computation
    return (attend(state, i, message), following), None

  empty = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
  carry = _axes.vary_like(empty, (q, k, v)), (jnp.stack((k, v)), segment_ids)
  (state, message), _ = jax.lax.scan(step, carry, jnp.arange(ring.size - 1))
  out, lse = attend(state, ring.size - 1, message)
  return out.astype(q.dtype), lse


def ring_backward(
  ring: Ring,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segment_ids: jax.Array | None,
  out: jax.Array,
  lse: jax.Array,
  grad: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients of q, k and v, in their dtypes, from the cotangent `grad` of the output."""
  # Else the compiler may keep what the forward pass received instead of sending it again.
  (k, v, segment_ids), grad = jax.lax.optimization_barrier(((k, v, segment_ids), grad))
  rank = jax.lax.axis_index(ring.axis_name)
  queries = ring.tokens(rank, q.shape[1], segment_ids)
  delta = _blockwise.row_delta(grad, out)

  def grads(i, message):
    (k, v), ids = message
    keys = ring.tokens((rank - i) % ring.size, q.shape[1], ids)
    q_grad, k_grad, v_grad = _blockwise.backward(
      grad, q, k, v, lse, delta, queries, keys, ring.blocks
    )
    return q_grad, jnp.stack((k_grad, v_grad))

  def visit(i, q_grad, message, travelling=None, *, last=False):
    """Step i; `travelling`: the gradient, so far, of the keys that were here in step i - 1."""
    following = message if last else ring.hop(message)
    arrived = None if travelling is None else ring.hop(travelling)
    more, kv_grad = grads(i, message)
    return q_grad + more, following, kv_grad if arrived is None else arrived + kv_grad

  message = jnp.stack((k, v)), segment_ids
  q_grad, kv_grad = grads(0, message)
  if ring.size > 1:
    carry = q_grad, ring.hop(message)
    if ring.size > 2:
      carry = visit(1, *carry)
      steps = jnp.arange(2, ring.size - 1)
      carry, _ = jax.lax.scan(lambda carry, i: (visit(i, *carry), None), carry, steps)
    q_grad, _, travelling = visit(ring.size - 1, *carry, last=True)
    kv_grad = kv_grad + ring.hop(travelling)  # home
  return tuple(g.astype(x.dtype) for g, x in zip((q_grad, *kv_grad), (q, k, v)))
