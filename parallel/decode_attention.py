"""Attention of one new token over keys and values that are cut over devices, as in flash decoding.

B batch, T keys per device, H query heads, K key/value heads, R = H / K, C head width.
"""

import jax
import jax.numpy as jnp

from jaxcomm import _axes


def decode_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  axis_name: str,
  *,
  valid: jax.Array,
  scale: float | None = None,
) -> jax.Array:
  """Softmax attention of one query per sequence over the cached keys of all devices.

  Each device attends to its own keys; peaks, sums and outputs are merged in float32. No ring, and
  no order of keys: any layout, filled as one likes. For inference: it has no derivative.

  Wire, per device: all-reduces of B H and of B H (C + 1) float32, whatever the length.

  Args:
    q: [B, 1, H, C], equal on all devices of the axis.
    k: [B, T, K, C], this device's part of the cache; K divides H.
    v: like `k`.
    axis_name: bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    valid: bool[B, T], the keys that exist. A sequence without any gets output 0.
    scale: of the scores, default `C ** -0.5`.

  Returns:
    [B, 1, H, C] in the dtype of `q`, equal on all devices of the axis.

  Raises:
    ValueError: a shape does not fit, or the axis is unbound.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from parallel.decode_attention import decode_attention
    >>> q, cache = jnp.zeros((1, 1, 1, 1)), jnp.arange(4.0).reshape(2, 1, 2, 1, 1)
    >>> valid = jnp.array([True, True, True, False]).reshape(2, 1, 2)
    >>> attend = lambda x, valid: decode_attention(q, x, x, "seq", valid=valid)
    >>> jax.vmap(attend, axis_name="seq")(cache, valid).reshape(-1).tolist()
    [1.0, 1.0]
  """
  _axes.axis_size(axis_name)
  _check(q, k, v, valid)
  factor = q.shape[3] ** -0.5 if scale is None else scale
  q_BKRC = q.reshape(q.shape[0], k.shape[2], -1, q.shape[3])
  score_BKRT = factor * jnp.einsum("bkrc,btkc->bkrt", q_BKRC, k, preferred_element_type=jnp.float32)
  score_BKRT = jnp.where(valid[:, None, None], score_BKRT, -jnp.inf)
  peak_BKR = jax.lax.pmax(jax.lax.stop_gradient(score_BKRT.max(-1)), axis_name)
  peak_BKR = jnp.where(peak_BKR == -jnp.inf, 0.0, peak_BKR)
  weight_BKRT = jnp.exp(score_BKRT - peak_BKR[..., None])
  out_BKRC = jnp.einsum(
    "bkrt,btkc->bkrc", weight_BKRT.astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  sums = jnp.concatenate((out_BKRC, weight_BKRT.sum(-1, keepdims=True)), axis=-1)
  sums = jax.lax.psum(sums, axis_name)
  total = sums[..., -1:]
  return (sums[..., :-1] / jnp.where(total == 0, 1.0, total)).reshape(q.shape).astype(q.dtype)


def _check(q, k, v, valid) -> None:
  if q.ndim != 4 or q.shape[1] != 1 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(f"`q` must be floating point [B, 1, H, C], got {q.dtype}{list(q.shape)}.")
  B, _, H, C = q.shape
  for name, x in (("k", k), ("v", v)):
    if x.ndim != 4 or (x.shape[0], x.shape[3]) != (B, C) or H % x.shape[2] or x.shape != k.shape:
      raise ValueError(
        f"`{name}` must be [{B}, T, K, {C}] with K a divisor of {H}, `k` and `v` alike, got"
        f" {list(x.shape)}."
      )
  if valid.shape != k.shape[:2] or valid.dtype != jnp.bool_:
    raise ValueError(f"`valid` must be bool{list(k.shape[:2])}, got {valid.dtype}{valid.shape}.")
