"""All-gather attention: exact attention over a sequence cut over devices; keys are gathered first.

Context parallelism of Llama 3 (arXiv 2407.21783) §3.3.2. Letters: W devices on the axis, B batch,
S tokens per device, N = W S tokens in all, H query heads, K key/value heads, C head width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from parallel import _blockwise
from parallel._blockwise import Tokens
from parallel._zero_hops import on_raw_bits
from parallel.ring_attention import Ring, make_ring, same_type
from parallel.sequence_layout import Layout, context_permutation


def allgather_attention(
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
  """`ring_attention` with one all-gather in place of the ring: simple, and N tokens of memory.

  Wire, per device: that of `ring_attention`, `ring_attention_bytes`: one gather of keys and values
  in each pass, and one reduce-scatter of their float32 gradients. Memory: keys and values of N
  tokens while it runs, 2 B N K C elements, and in the backward pass their gradients.

  Args: as in `ring_attention`.

  Returns:
    [B, S, H, C] in the dtype of `q`, differing over `axis_name`.

  Raises:
    ValueError: as in `ring_attention`.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from parallel.allgather_attention import allgather_attention
    >>> x = jnp.arange(4.0).reshape(2, 1, 2, 1, 1)  # two devices, two tokens each
    >>> attend = lambda x: allgather_attention(0 * x, x, x, "seq", layout="contiguous")
    >>> jax.vmap(attend, axis_name="seq")(x).reshape(-1).tolist()
    [0.0, 0.5, 1.0, 1.5]
  """
  inputs = same_type(q, k, v, segment_ids, axis_name)
  ring = make_ring(
    axis_name, q.shape, layout, granularity, causal=causal, scale=scale, block_size=block_size
  )
  with jax.named_scope("allgather_attention"):
    return _attention(ring, *inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: Ring, q, k, v, ids):
  return _forward(ring, q, k, v, ids)[0]


def _forward(ring, q, k, v, ids):
  out, lse = _blockwise.forward(q, *_gathered(ring, q, k, v, ids), ring.blocks)
  out = out.astype(q.dtype)
  return out, (q, k, v, ids, out, lse)


def _backward(ring, residuals, grad):
  q, k, v, ids, out, lse = residuals
  # Else the compiler may keep what the forward pass gathered.
  (k, v, ids), grad = jax.lax.optimization_barrier(((k, v, ids), grad))
  k_all, v_all, queries, keys = _gathered(ring, q, k, v, ids)
  q_grad, *kv_grad = _blockwise.backward(
    grad, q, k_all, v_all, lse, _blockwise.row_delta(grad, out), queries, keys, ring.blocks
  )
  kv_grad = jax.lax.psum_scatter(
    jnp.stack(kv_grad), ring.axis_name, scatter_dimension=2, tiled=True
  )
  return *(g.astype(x.dtype) for g, x in zip((q_grad, *kv_grad), (q, k, v))), None


_attention.defvjp(_forward, _backward)


def _gathered(ring: Ring, q, k, v, ids) -> tuple[Any, Any, Tokens, Tokens]:
  """Keys, values of all devices, then what the mask must know of queries and keys."""
  gather = functools.partial(jax.lax.all_gather, axis_name=ring.axis_name, tiled=True)
  kv = on_raw_bits(functools.partial(gather, axis=2), jnp.stack((k, v)))
  all_ids = None if ids is None else gather(ids, axis=1)
  order, _ = context_permutation(kv.shape[2], ring.size, ring.layout, ring.granularity)
  queries = ring.tokens(jax.lax.axis_index(ring.axis_name), q.shape[1], ids)
  return kv[0], kv[1], queries, Tokens(order, all_ids)
