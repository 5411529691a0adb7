"""Causal grouped-query attention in plain XLA, the reference of every faster kernel.

B batch, S query positions, T key positions, H query heads, K key/value heads, R = H / K,
C head width.
"""

import jax
import jax.numpy as jnp


def causal_mask(seq_len: int, segment_ids_BS: jax.Array | None = None) -> jax.Array:
  """Who may look at whom: bool[B or 1, 1, 1, S, T], earlier tokens of the same segment."""
  mask_ST = jnp.tril(jnp.ones((seq_len, seq_len), bool))[None, None, None]
  if segment_ids_BS is None:
    return mask_ST
  return mask_ST & (segment_ids_BS[:, None, None, :, None] == segment_ids_BS[:, None, None, None])


def attention(q_BSHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array, mask: jax.Array):
  """Softmax attention, scale `C ** -0.5`, scores and softmax in float32.

  Query head h reads key/value head `h // (H / K)`.

  Args:
    q_BSHC: queries.
    k_BTKC: keys.
    v_BTKC: values.
    mask: bool, broadcastable to [B, K, R, S, T]; each query sees at least one key.

  Returns:
    [B, S, H, C] in the dtype of `q_BSHC`.
  """
  batch, seq_len, num_heads, width = q_BSHC.shape
  num_kv = k_BTKC.shape[2]
  q_BSKRC = q_BSHC.reshape(batch, seq_len, num_kv, num_heads // num_kv, width)
  score_BKRST = jnp.einsum("bskrc,btkc->bkrst", q_BSKRC, k_BTKC, preferred_element_type=jnp.float32)
  # A finite minimum: with -inf a fully masked row would become NaN.
  score_BKRST = jnp.where(mask, score_BKRST * width**-0.5, jnp.finfo(jnp.float32).min)
  weight_BKRST = jax.nn.softmax(score_BKRST, axis=-1).astype(v_BTKC.dtype)
  return jnp.einsum("bkrst,btkc->bskrc", weight_BKRST, v_BTKC).reshape(q_BSHC.shape)
