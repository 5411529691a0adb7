"""Exact attention tile by tile with an online softmax, and its derivative from the log-sum-exp.

Blockwise transformer (arXiv 2305.19370), FlashAttention-2 (arXiv 2307.08691) §3.1. Scores, softmax
and all sums are float32; products take the dtype of their inputs.

Letters: B batch, S queries, T keys, s and t of them in a tile, H query heads, K key/value heads,
R = H / K, C head width. Query head h reads key/value head h // R.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm import _axes

_LOWEST = -1e30  # finite: with -inf a row without a key would become NaN


class Tokens(NamedTuple):
  """What the mask must know of n tokens.

  Attributes:
    place: int32[n] in the whole sequence.
    segment: int32[B, n], 0 is padding; or None: one segment.
  """

  place: Any
  segment: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How to attend: mask, scale of the scores, and tokens per tile, which divide S and T."""

  causal: bool
  scale: float
  tile: int


def tile_size(chunk: int, block_size: int) -> int:
  """Tokens per tile of a chunk of neighbours.

  Raises:
    ValueError: `block_size` is not positive, or neither covers the chunk nor divides it.
  """
  if block_size < 1:
    raise ValueError(f"`block_size` must be at least 1, got {block_size}.")
  if chunk > block_size and chunk % block_size:
    raise ValueError(
      f"`block_size` must divide the {chunk} neighbouring tokens of a device, or be at least as"
      f" many, got {block_size}."
    )
  return min(chunk, block_size)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> None:
  """Raises ValueError unless these are q [B, S, H, C], k and v [B, S, K, C], ids int[B, S]."""
  if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"`q` must be floating point [B, S, H, C], got {q.dtype}{list(q.shape)}.")
  for name, x in (("k", k), ("v", v)):
    fits = x.ndim == 4 and (*x.shape[:2], x.shape[3]) == (*q.shape[:2], q.shape[3])
    if not fits or x.dtype != q.dtype or x.shape != k.shape:
      raise ValueError(
        f"`{name}` must be [B, S, K, C] with B, S, C and dtype of `q` {q.dtype}{list(q.shape)}, `k`"
        f" and `v` alike, got {x.dtype}{list(x.shape)}; for one new token: `decode_attention`."
      )
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f"`k` must have a number of heads that divides the {q.shape[2]} of `q`, got {k.shape[2]}."
    )
  if segment_ids is None:
    return
  if segment_ids.shape != q.shape[:2] or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
    raise ValueError(
      f"`segment_ids` must be integers {list(q.shape[:2])}, got"
      f" {segment_ids.dtype}{list(segment_ids.shape)}."
    )


def merge_partials(
  out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Attention over two sets of keys from the attention over each.

  Commutative, associative up to rounding; (0, -inf), of no keys, changes nothing. Not for
  differentiation through a library's log-sum-exp, whose gradient may silently be zero:
  `ring_attention` merges under a derivative of its own.

  Args:
    out_a: [..., C], softmax-weighted mean of the values of the first set.
    lse_a: [...], log of the sum of exp(score) over the first set, -inf if it is empty.
    out_b: [..., C], of the second set.
    lse_b: [...], of the second set.

  Returns:
    (out, lse) of both sets, in the dtypes given.

  Example:
    >>> out, lse = merge_partials(jnp.ones(1), jnp.zeros(()), 3 * jnp.ones(1), jnp.zeros(()))
    >>> float(out[0]), round(float(lse), 4)
    (2.0, 0.6931)
  """
  peak = jnp.maximum(lse_a, lse_b)
  peak = jnp.where(peak == -jnp.inf, 0.0, peak)
  weight_a, weight_b = jnp.exp(lse_a - peak), jnp.exp(lse_b - peak)
  total = weight_a + weight_b
  share_a, share_b = (w / jnp.where(total == 0, 1.0, total) for w in (weight_a, weight_b))
  return out_a * share_a[..., None] + out_b * share_b[..., None], peak + jnp.log(total)


def forward(
  q: jax.Array, k: jax.Array, v: jax.Array, queries: Tokens, keys: Tokens, blocks: Blocks
) -> tuple[jax.Array, jax.Array]:
  """(out float32[B, S, H, C], lse float32[B, S, H]); a query without keys gets (0, -inf)."""
  tiles_of_keys = _cut((k, v, keys), blocks.tile)

  def attend(tile):
    q_tile, queries_tile = tile
    q_bskrc = _grouped(q_tile, k.shape[2])

    def add(state, tile_of_keys):
      k_tile, v_tile, keys_tile = tile_of_keys
      step = functools.partial(
        _add_keys, q_bskrc, k_tile, v_tile, _mask(queries_tile, keys_tile, blocks), blocks.scale
      )
      return _unless_hidden(queries_tile, keys_tile, blocks, step, state), None

    B, s, K, R, C = q_bskrc.shape
    rows = jnp.zeros((B, K, R, s), jnp.float32)
    start = jnp.zeros((B, K, R, s, C), jnp.float32), rows + _LOWEST, rows
    start = _axes.vary_like(start, (q, k, v, queries, keys))
    (out, peak, total), _ = jax.lax.scan(add, start, tiles_of_keys)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, peak + jnp.log(total))
    return _as_heads(out), _as_heads(lse)

  return _joined(jax.lax.map(attend, _cut((q, queries), blocks.tile)))


def backward(
  grad: jax.Array,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lse: jax.Array,
  delta: jax.Array,
  queries: Tokens,
  keys: Tokens,
  blocks: Blocks,
) -> tuple[jax.Array, ...]:
  """Parts of the gradients of q, k and v that come from these keys, float32.

  Args:
    grad: cotangent of the output, [B, S, H, C] in the dtype of `q`.
    q, k, v, queries, keys, blocks: as in `forward`.
    lse: float32[B, S, H] over all keys of each query, not these alone.
    delta: float32[B, S, H], the sum over C of `grad` times the output.
  """
  num_kv = k.shape[2]
  tiles_of_keys = _cut((k, v, keys), blocks.tile)

  def visit(key_grads, tile):
    q_tile, grad_tile, lse_tile, delta_tile, queries_tile = tile
    rows = (
      _grouped(q_tile, num_kv),
      _grouped(grad_tile, num_kv),
      _as_rows(lse_tile, num_kv),
      _as_rows(delta_tile, num_kv),
    )

    def add(q_grad, tile_of_keys):
      (k_tile, v_tile, keys_tile), k_grad, v_grad = tile_of_keys
      step = functools.partial(
        _add_grads, *rows, k_tile, v_tile, _mask(queries_tile, keys_tile, blocks), blocks.scale
      )
      sums = q_grad, k_grad, v_grad
      q_grad, k_grad, v_grad = _unless_hidden(queries_tile, keys_tile, blocks, step, sums)
      return q_grad, (k_grad, v_grad)

    start = _axes.vary_like(jnp.zeros(rows[0].shape, jnp.float32), (q, k, v, queries, keys))
    q_grad, key_grads = jax.lax.scan(add, start, (tiles_of_keys, *key_grads))
    return key_grads, q_grad.reshape(q_tile.shape)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in tiles_of_keys[:2])
  zeros = _axes.vary_like(zeros, (q, k, v, queries, keys))
  key_grads, q_grad = jax.lax.scan(visit, zeros, _cut((q, grad, lse, delta, queries), blocks.tile))
  return _joined((q_grad, *key_grads))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(blocks: Blocks, q, k, v, queries: Tokens, keys: Tokens) -> jax.Array:
  """Output of `forward` in the dtype of `q`; scores are not kept for the derivative."""
  return forward(q, k, v, queries, keys, blocks)[0].astype(q.dtype)


def _attention_forward(blocks, q, k, v, queries, keys):
  out, lse = forward(q, k, v, queries, keys, blocks)
  out = out.astype(q.dtype)
  return out, (q, k, v, queries, keys, out, lse)


def _attention_backward(blocks, residuals, grad):
  q, k, v, queries, keys, out, lse = residuals
  grads = backward(grad, q, k, v, lse, row_delta(grad, out), queries, keys, blocks)
  return *(g.astype(x.dtype) for g, x in zip(grads, (q, k, v))), None, None


attention.defvjp(_attention_forward, _attention_backward)


def row_delta(grad: jax.Array, out: jax.Array) -> jax.Array:
  """`delta` of `backward`."""
  return (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)


def _add_keys(q_bskrc, k_btkc, v_btkc, mask, scale, state):
  out, peak, total = state
  score = _scores(q_bskrc, k_btkc, scale)
  new_peak = jnp.maximum(peak, jnp.where(mask, score, _LOWEST).max(-1))
  weight = jnp.where(mask, jnp.exp(score - new_peak[..., None]), 0.0)
  fade = jnp.exp(peak - new_peak)
  values = _einsum("bkrst,btkc->bkrsc", weight.astype(v_btkc.dtype), v_btkc)
  return out * fade[..., None] + values, new_peak, total * fade + weight.sum(-1)


def _add_grads(q_bskrc, grad_bskrc, lse, delta, k_btkc, v_btkc, mask, scale, sums):
  q_grad, k_grad, v_grad = sums
  dtype = q_bskrc.dtype
  weight = jnp.where(mask, jnp.exp(_scores(q_bskrc, k_btkc, scale) - lse[..., None]), 0.0)
  weight_grad = _einsum("bskrc,btkc->bkrst", grad_bskrc, v_btkc)
  score_grad = (weight * (weight_grad - delta[..., None]) * scale).astype(dtype)
  q_grad += _einsum("bkrst,btkc->bskrc", score_grad, k_btkc)
  k_grad += _einsum("bkrst,bskrc->btkc", score_grad, q_bskrc)
  v_grad += _einsum("bkrst,bskrc->btkc", weight.astype(dtype), grad_bskrc)
  return q_grad, k_grad, v_grad


def _scores(q_bskrc, k_btkc, scale):
  return _einsum("bskrc,btkc->bkrst", q_bskrc, k_btkc) * scale


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _mask(queries: Tokens, keys: Tokens, blocks: Blocks) -> jax.Array:
  """bool[B or 1, 1, 1, s, t]: who may look at whom."""
  s, t = queries.place.shape[0], keys.place.shape[0]
  mask = jnp.ones((1, 1, 1, s, t), bool)
  if blocks.causal:
    mask &= (queries.place[:, None] >= keys.place[None])[None, None, None]
  if queries.segment is not None and keys.segment is not None:
    ids = queries.segment[:, None, None, :, None]
    mask &= (ids == keys.segment[:, None, None, None]) & (ids != 0)
  return mask


def _unless_hidden(queries, keys, blocks, step, state):
  """`step(state)`, unless causality hides all these keys: then they cost nothing."""
  if not blocks.causal:
    return step(state)
  # Not by segments: their ids may be sharded over further axes, and a branch must not wait for one.
  return jax.lax.cond(queries.place.max() >= keys.place.min(), step, lambda state: state, state)


def _cut(tree: Any, tile: int) -> Any:
  """Tiles of neighbours on a new leading axis: [B, n, ...] -> [n / tile, B, tile, ...]."""

  def cut(x):
    axis = 0 if x.ndim == 1 else 1  # places have no batch
    shape = (*x.shape[:axis], x.shape[axis] // tile, tile, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  return jax.tree.map(cut, tree)


def _joined(tree: Any) -> Any:
  """The inverse of `_cut`."""

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  return jax.tree.map(join, tree)


def _grouped(x_bshc: jax.Array, num_kv: int) -> jax.Array:
  """[b, s, H, C] -> [b, s, K, R, C]."""
  return x_bshc.reshape(*x_bshc.shape[:2], num_kv, -1, x_bshc.shape[-1])


def _as_rows(x_bsh: jax.Array, num_kv: int) -> jax.Array:
  """[b, s, H] -> [b, K, R, s]."""
  return jnp.moveaxis(x_bsh.reshape(*x_bsh.shape[:2], num_kv, -1), 1, -1)


def _as_heads(x_bkrs: jax.Array) -> jax.Array:
  """[b, K, R, s, ...] -> [b, s, H, ...]."""
  x = jnp.moveaxis(x_bkrs, 3, 1)
  return x.reshape(*x.shape[:2], -1, *x.shape[4:])
