"""Causal attention by the splash kernel of JAX, on TPUs. Letters as in `models._attention`."""

import functools
from typing import cast

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from models._attention import sharded_kernel


def splash_attention(
  q_BSHC: jax.Array,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  ids_BS: jax.Array | None = None,
  *,
  interpret: bool = False,
) -> jax.Array:
  """`attention` with the causal mask of `ids_BS`, in blocks: no [S, T] scores in memory.

  Queries are scaled in their own dtype, which rounds them once more than the reference does.

  Args:
    q_BSHC: queries; 128 divides S.
    k_BTKC: keys; T equals S.
    v_BTKC: values.
    ids_BS: int32 segment ids; tokens see only their own segment.
    interpret: runs it on any device, slowly.
  """
  kernel = functools.partial(_kernel, interpret=interpret)
  others = () if ids_BS is None else (ids_BS,)
  if not jax.typeof(q_BSHC).sharding.mesh.auto_axes:
    return kernel(q_BSHC, k_BTKC, v_BTKC, *others)
  return sharded_kernel(kernel, False, (q_BSHC, k_BTKC, v_BTKC, *others))


def _kernel(q_BSHC, k_BTKC, v_BTKC, ids_BS=None, *, interpret):
  _, seq_len, num_heads, width = q_BSHC.shape
  mask = masks.MultiHeadMask([masks.CausalMask((seq_len, seq_len))] * num_heads)
  run = splash.make_splash_mha_single_device(
    mask, block_sizes=_block_sizes(seq_len), interpret=interpret
  )
  ids = None if ids_BS is None else splash.SegmentIds(ids_BS, ids_BS)
  inputs = (x.swapaxes(1, 2) for x in (q_BSHC * width**-0.5, k_BTKC, v_BTKC))
  outputs = cast(jax.Array, jax.vmap(run)(*inputs, ids))  # no residuals were asked for
  return outputs.swapaxes(1, 2)


def _block_sizes(seq_len: int) -> splash.BlockSizes:
  """The largest tiles up to 512 x 512: small ones leave the matrix unit idle."""
  size = next(size for size in (512, 256, 128) if seq_len % size == 0)
  return splash.BlockSizes(
    block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size,
    block_kv_dq=size,
  )  # fmt: skip
