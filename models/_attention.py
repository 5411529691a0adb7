"""Causal grouped-query attention: cuDNN's kernel where it applies, else plain XLA, the reference.

B batch, S query positions, T key positions, H query heads, K key/value heads, R = H / K,
C head width.
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

from parallel.sharding import on_batch_and_head_shards

Implementation = Literal["xla", "cudnn"]
_LOG = logging.getLogger(__name__)


def choose(
  wanted: Literal["auto", "xla", "cudnn"], dtype: str, width: int, *, packed: bool
) -> Implementation:
  """Which kernel to use on the devices of this process, decided before anything is compiled.

  cuDNN takes bfloat16 and float16 on NVIDIA GPUs from Ampere on, head widths that 8 divides, up to
  128 (256 from Hopper on), and no segments: as an additive mask they would cost [B, S, T] elements
  per layer and replica, and `jax.nn.dot_product_attention` takes them in no other form.

  Args:
    wanted: "auto" falls back to XLA, with a warning once if a GPU is there.
    dtype: of queries, keys and values.
    width: C.
    packed: whether tokens have segment ids.

  Raises:
    ValueError: "cudnn" is wanted and cannot be had.
  """
  if wanted == "xla":
    return "xla"
  capability = _cuda_capability()
  reason = _why_not_cudnn(capability, dtype, width, packed)
  if reason is None:
    return "cudnn"
  if wanted == "cudnn":
    raise ValueError(f"`attention` cannot be 'cudnn': {reason}.")
  if capability is not None:
    _warn_once(reason)
  return "xla"


def _why_not_cudnn(
  capability: tuple[int, ...] | None, dtype: str, width: int, packed: bool
) -> str | None:
  if capability is None:
    return "there is no NVIDIA GPU"
  if capability < (8, 0):
    return f"it needs a GPU of compute capability 8.0 or later, this one has {capability}"
  if dtype not in ("bfloat16", "float16"):
    return f"it computes in bfloat16 or float16, not in {dtype}"
  widest = 256 if capability >= (9, 0) else 128
  if width % 8 or width > widest:
    return f"its head width must be divisible by 8 and at most {widest}, got {width}"
  if packed:
    return "the batch is packed, and it knows no segments"
  return None


@functools.cache
def _cuda_capability() -> tuple[int, ...] | None:
  """Compute capability of the GPU in use; None on other devices."""
  device = jax.local_devices()[0]
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return None
  return tuple(int(part) for part in str(device.compute_capability).split("."))


@functools.cache
def _warn_once(reason: str) -> None:
  _LOG.warning("attention without cuDNN, which is slower: %s", reason)


def causal_mask(seq_len: int, segment_ids_BS: jax.Array | None = None) -> jax.Array:
  """Who may look at whom: bool[B or 1, 1, 1, S, T], earlier tokens of the same segment."""
  mask_ST = jnp.tril(jnp.ones((seq_len, seq_len), bool))[None, None, None]
  if segment_ids_BS is None:
    return mask_ST
  return mask_ST & (segment_ids_BS[:, None, None, :, None] == segment_ids_BS[:, None, None, None])


def cudnn_attention(q_BSHC: jax.Array, k_BTKC: jax.Array, v_BTKC: jax.Array) -> jax.Array:
  """`attention` with the plain causal mask, in cuDNN's flash kernel; S equals T."""
  mesh = jax.typeof(q_BSHC).sharding.mesh
  if mesh.size <= 1 or not mesh.auto_axes:
    return _kernel(q_BSHC, k_BTKC, v_BTKC)
  return _sharded_kernel(q_BSHC, k_BTKC, v_BTKC)


def _kernel(q_BSHC, k_BTKC, v_BTKC):
  return jax.nn.dot_product_attention(
    q_BSHC, k_BTKC, v_BTKC, is_causal=True, implementation="cudnn"
  )


@jax.custom_vjp
def _sharded_kernel(q_BSHC, k_BTKC, v_BTKC):
  """The kernel on each device's rows and heads.

  JAX 0.10 can neither partition the kernel in a region that is manual over some axes, nor
  differentiate a region within it that is manual over the others. So both passes are such regions,
  at the price of the forward kernel once more in the backward pass.
  """
  return on_batch_and_head_shards(_kernel, q_BSHC, k_BTKC, v_BTKC)


def _sharded_forward(q_BSHC, k_BTKC, v_BTKC):
  return _sharded_kernel(q_BSHC, k_BTKC, v_BTKC), (q_BSHC, k_BTKC, v_BTKC)


def _sharded_backward(inputs, grad_BSHC):
  def local(*inputs_and_grad):
    *inputs, grad_BSHC = inputs_and_grad
    return jax.vjp(_kernel, *inputs)[1](grad_BSHC)

  return on_batch_and_head_shards(local, *inputs, grad_BSHC)


_sharded_kernel.defvjp(_sharded_forward, _sharded_backward)


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
