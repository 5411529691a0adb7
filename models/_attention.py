"""Causal grouped-query attention: a kernel where it applies, else plain XLA, the reference.

B batch, S query positions, T key positions, H query heads, K key/value heads, R = H / K,
C head width.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from parallel.sharding import on_batch_and_head_shards

Implementation = Literal["xla", "cudnn", "splash"]
_LOG = logging.getLogger(__name__)


def choose(
  wanted: Literal["auto", "xla", "cudnn", "splash"],
  dtype: str,
  width: int,
  *,
  seq_len: int,
  packed: bool,
) -> Implementation:
  """Which kernel to use on the devices of this process, decided before anything is compiled.

  cuDNN takes bfloat16 and float16 on NVIDIA GPUs from Ampere on, head widths that 8 divides, up to
  128 (256 from Hopper on), and no segments: as an additive mask they would cost [B, S, T] elements
  per layer and replica, and `jax.nn.dot_product_attention` takes them in no other form.

  Splash takes head widths and sequences that 128 divides on TPUs, and segments.

  Args:
    wanted: "auto" falls back to XLA, with a warning once if a GPU or TPU is there.
    dtype: of queries, keys and values.
    width: C.
    seq_len: S, which equals T.
    packed: whether tokens have segment ids.

  Raises:
    ValueError: a kernel is wanted and cannot be had.
  """
  if wanted == "xla":
    return "xla"
  tpu, capability = _is_tpu(), _cuda_capability()
  kernel = wanted if wanted != "auto" else "splash" if tpu else "cudnn"
  if kernel == "splash":
    reason = _why_not_splash(tpu, width, seq_len)
  else:
    reason = _why_not_cudnn(capability, dtype, width, packed)
  if reason is None:
    return kernel
  if wanted != "auto":
    raise ValueError(f"`attention` cannot be {wanted!r}: {reason}.")
  if tpu or capability is not None:
    _warn_once("splash" if tpu else "cuDNN", reason)
  return "xla"


def _why_not_splash(tpu: bool, width: int, seq_len: int) -> str | None:
  if not tpu:
    return "there is no TPU"
  if width % 128:
    return f"its head width must be divisible by 128, got {width}"
  if seq_len % 128:
    return f"its sequences must have a multiple of 128 tokens, got {seq_len}"
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.manual_axes and not (mesh.auto_axes or mesh.explicit_axes):
    return f"its types are not known where all axes are manual, {mesh.manual_axes}"
  return None


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
def _is_tpu() -> bool:
  return jax.local_devices()[0].platform == "tpu"


@functools.cache
def _warn_once(kernel: str, reason: str) -> None:
  _LOG.warning("attention without %s, which is slower: %s", kernel, reason)


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
  return sharded_kernel(_kernel, True, (q_BSHC, k_BTKC, v_BTKC))


def _kernel(q_BSHC, k_BTKC, v_BTKC):
  return jax.nn.dot_product_attention(
    q_BSHC, k_BTKC, v_BTKC, is_causal=True, implementation="cudnn"
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sharded_kernel(kernel: Callable[..., Any], checked: bool, inputs: tuple[jax.Array, ...]) -> Any:
  """`kernel(*inputs)` on each device's rows and heads.

  JAX 0.10 can neither partition a kernel in a region that is manual over some axes, nor
  differentiate a region within it that is manual over the others. So both passes are such regions,
  at the price of the forward kernel once more in the backward pass.

  Args:
    kernel: of queries, keys, values, and what has no derivative, [B, S].
    checked: whether it runs where types are checked.
    inputs: its arguments.
  """
  return on_batch_and_head_shards(kernel, *inputs, checked=checked)


def _sharded_forward(kernel, checked, inputs):
  return sharded_kernel(kernel, checked, inputs), inputs


def _sharded_backward(kernel, checked, inputs, grad_BSHC):
  def local(q_BSHC, k_BTKC, v_BTKC, *others_and_grad):
    *others, grad_BSHC = others_and_grad
    pull = jax.vjp(lambda *qkv: kernel(*qkv, *others), q_BSHC, k_BTKC, v_BTKC)[1]
    return pull(grad_BSHC)

  grads = on_batch_and_head_shards(local, *inputs, grad_BSHC, checked=checked)
  return ((*grads, *(None for _ in inputs[3:])),)


sharded_kernel.defvjp(_sharded_forward, _sharded_backward)


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
