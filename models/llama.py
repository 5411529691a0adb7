"""Llama 3: dense decoder with RMSNorm, RoPE, grouped-query attention and SwiGLU.

Llama 3 (arXiv 2407.21783), Llama 2 (arXiv 2307.09288) §2.2. A model is three pure functions and
a dataclass: `LlamaConfig`, `init`, `apply`, `specs`.

Letters in names: B batch, S sequence, V vocabulary, D hidden, L layers, F feed-forward,
H query heads, K key/value heads, C head width. Parameters of the layers are stacked on a leading
axis L, which names leave out: `params["layers"]["q_DHC"]` is float32[L, D, H, C].
"""

import functools
import math
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import _llama_layers, losses
from models._llama_config import (
  LlamaConfig,
  llama3_2_1b,
  llama3_2_3b,
  llama3_8b,
  llama3_70b,
  llama3_405b,
  mini,
  nano,
  small,
  tiny,
)
from models._llama_layers import Partition
from models.rope import Llama3RopeScaling
from parallel.context import ContextParallel
from parallel.mesh import TENSOR
from parallel.sharding import call_with_auto_axes
from parallel.tensor_parallel import is_cut

__all__ = [
  "Llama3RopeScaling",
  "LlamaConfig",
  "Params",
  "apply",
  "flops_per_token",
  "init",
  "llama3_2_1b",
  "llama3_2_3b",
  "llama3_8b",
  "llama3_70b",
  "llama3_405b",
  "loss",
  "mini",
  "nano",
  "num_params",
  "small",
  "specs",
  "tiny",
]

Params = dict[str, Any]


class _Leaf(NamedTuple):
  """One parameter: shape and logical axes without L, and N(mean, std) at the start."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  std: float = 0.0
  mean: float = 0.0


def _layer_leaves(cfg: LlamaConfig) -> dict[str, _Leaf]:
  D, F, H, K, C = (
    cfg.hidden_size, cfg.intermediate_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_size,
  )  # fmt: skip
  out_std = 0.02 / math.sqrt(2 * cfg.num_layers)  # keeps the residual stream's variance
  leaves = {
    "attn_norm_D": _Leaf((D,), ("norm",), mean=1.0),
    "q_DHC": _Leaf((D, H, C), ("embed", "heads", "head_dim"), 0.02),
    "k_DKC": _Leaf((D, K, C), ("embed", "kv_heads", "head_dim"), 0.02),
    "v_DKC": _Leaf((D, K, C), ("embed", "kv_heads", "head_dim"), 0.02),
    "o_HCD": _Leaf((H, C, D), ("heads", "head_dim", "embed"), out_std),
    "mlp_norm_D": _Leaf((D,), ("norm",), mean=1.0),
    "gate_DF": _Leaf((D, F), ("embed", "mlp"), 0.02),
    "up_DF": _Leaf((D, F), ("embed", "mlp"), 0.02),
    "down_FD": _Leaf((F, D), ("mlp", "embed"), out_std),
  }
  if cfg.attention_bias:
    leaves["q_bias_HC"] = _Leaf((H, C), ("heads", "head_dim"))
    leaves["k_bias_KC"] = _Leaf((K, C), ("kv_heads", "head_dim"))
    leaves["v_bias_KC"] = _Leaf((K, C), ("kv_heads", "head_dim"))
    leaves["o_bias_D"] = _Leaf((D,), ("norm",))
  if cfg.mlp_bias:
    leaves["gate_bias_F"] = _Leaf((F,), ("mlp",))
    leaves["up_bias_F"] = _Leaf((F,), ("mlp",))
    leaves["down_bias_D"] = _Leaf((D,), ("norm",))
  return leaves


def _outer_leaves(cfg: LlamaConfig) -> dict[str, _Leaf]:
  V, D = cfg.vocab_size, cfg.hidden_size
  leaves = {
    "embed_VD": _Leaf((V, D), ("vocab", "embed"), 0.02),
    "final_norm_D": _Leaf((D,), ("norm",), mean=1.0),
  }
  if not cfg.tie_embeddings:
    leaves["head_DV"] = _Leaf((D, V), ("embed", "vocab"), 0.02)
  return leaves


def init(key: jax.Array, cfg: LlamaConfig) -> Params:
  """Parameters in `cfg.param_dtype`: N(0, 0.02), residual outputs divided by sqrt(2 L).

  Each array has its own key from its name and layer, so the draws depend neither on L nor on
  the mesh. Use `jax.jit(init, static_argnums=1, out_shardings=...)` to make no full copy.

  Example:
    >>> shapes = jax.eval_shape(lambda: init(jax.random.key(0), nano()))
    >>> shapes["layers"]["q_DHC"].shape
    (2, 64, 4, 16)
  """

  def draw(name, leaf, *index):
    leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for i in index:
      leaf_key = jax.random.fold_in(leaf_key, i)
    if leaf.std == 0.0:
      return jnp.full(leaf.shape, leaf.mean, cfg.param_dtype)
    noise = jax.random.normal(leaf_key, leaf.shape, jnp.float32)
    return (leaf.std * noise).astype(cfg.param_dtype)

  def stack(name, leaf):
    return jax.vmap(lambda i: draw(name, leaf, i))(jnp.arange(cfg.num_layers))

  params: Params = {name: draw(name, leaf) for name, leaf in _outer_leaves(cfg).items()}
  params["layers"] = {name: stack(name, leaf) for name, leaf in _layer_leaves(cfg).items()}
  return params


def specs(cfg: LlamaConfig) -> Params:
  """Tree like `init`'s with a `jax.P` of logical axis names for every array.

  Example:
    >>> specs(nano())["layers"]["down_FD"]
    P('layers', 'mlp', 'embed')
  """
  tree: Params = {name: jax.P(*leaf.axes) for name, leaf in _outer_leaves(cfg).items()}
  tree["layers"] = {name: jax.P("layers", *leaf.axes) for name, leaf in _layer_leaves(cfg).items()}
  return tree


def apply(
  params: Params,
  tokens_BS: jax.Array,
  cfg: LlamaConfig,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  partition: Partition | None = None,
  context: ContextParallel | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Next-token logits.

  Args:
    params: from `init`. In a region that is manual over the mesh axis `tensor`, which checks types,
      this device's parts, of equal size along heads, feed-forward and vocabulary; but all
      key/value heads where they are fewer than the devices.
    tokens_BS: int ids in [0, V); host code checks the range, a gather would clamp.
    cfg: the config of `params`.
    positions: int32[B, S] for RoPE, default places in the sequence (0..S-1 without `context`). With
      packing they restart per document.
    segment_ids: int32[B, S]; tokens attend only within their own segment. Default one segment.
    partition: makes `f(weights, *args)` a function of shards, for the embedding, each layer and the
      output: `functools.partial(parallel.partitioned, plan=plan)`. `params` are then shards, those
      of layers stacked, and the partition decides what the backward pass computes again.
    context: says that the sequence is cut over devices, and how attention crosses them. Tokens,
      positions and segment ids are then in the order of its layout; segment 0 is padding. Manual
      over its axis they are this device's, and so are the logits.

  Returns:
    (float32[B, S, V] logits, aux), aux an empty dict in a dense model. Manual over `tensor` logits
    are those of this device's part of V.

  Wire, over `tensor` of size T: two all-reduces of [B, S, D] in `cfg.dtype` per layer forward, two
  backward, each `2 (T - 1) / T` of its bytes per device; one more each way outside of the layers.
  With fewer key/value heads than T, one more backward of the gradients of their weights.
  With `cfg.sequence_parallel` a reduce-scatter and an all-gather in place of each, the same bytes.

  Raises:
    ValueError: an argument has the wrong shape or dtype, the sequence exceeds `cfg.max_seq_len`,
      `cfg.remat` is not "none" with a `partition`, `cfg.attention` names a kernel that cannot be
      had, as never with a `context`, or `params` are parts whose types are not known.

  Example:
    >>> cfg = nano()
    >>> logits, _ = apply(init(jax.random.key(0), cfg), jnp.zeros((2, 8), int), cfg)
    >>> logits.shape
    (2, 8, 512)
  """
  _check_inputs(tokens_BS, cfg, positions, segment_ids, context)
  if partition is not None and cfg.remat != "none":
    raise ValueError(f"`cfg.remat` must be 'none' with a `partition`, got {cfg.remat!r}.")
  if context is not None and cfg.attention not in ("auto", "xla"):
    raise ValueError(
      f"`cfg.attention` must be 'auto' or 'xla' with a `context`, got {cfg.attention!r}."
    )
  if partition is None:
    _check_parts(params, cfg)
  forward = functools.partial(
    _llama_layers.forward, cfg=cfg, partition=partition or (lambda fn: fn), context=context
  )
  logits_BSV = call_with_auto_axes(
    forward, params, tokens_BS, positions, segment_ids,
    out_spec=_logits_spec(params, tokens_BS, cfg, context),
  )  # fmt: skip
  return logits_BSV, {}


def _logits_spec(params, tokens_BS, cfg: LlamaConfig, context) -> jax.P:
  """Over Explicit axes: rows and tokens as those of `tokens_BS`, V as the output matrix has it."""
  rows, tokens = (*jax.typeof(tokens_BS).sharding.spec, None, None)[:2]
  head = params["embed_VD" if cfg.tie_embeddings else "head_DV"]
  if not isinstance(head, jax.Array):  # a shard of a partition
    return jax.P(rows)
  vocab = (*jax.typeof(head).sharding.spec, None, None)[0 if cfg.tie_embeddings else 1]
  return jax.P(rows, None if context is None else tokens, vocab)


def loss(
  params: Params,
  batch: dict[str, jax.Array],
  cfg: LlamaConfig,
  *,
  z_loss: float = 0.0,
  partition: Partition | None = None,
  context: ContextParallel | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Masked mean next-token cross-entropy, nats, float32.

  Args:
    params: from `init`.
    batch: `tokens` and `targets` int32[B, S]; optional `segment_ids`, `positions` int32[B, S]
      and `loss_mask` float32[B, S], which packing sets to 0 at the last token of a document.
    cfg: the config of `params`.
    z_loss: weight of the squared log-partition.
    partition: as in `apply`.
    context: as in `apply`, `batch` in the order of its layout. Manual over its axis, where
      `jax.shard_map` must check types (`check_vma`), the results are those of the whole sequence,
      equal on all devices, and so are gradients of parameters that are equal.

  Returns:
    (objective, aux): aux has `loss` (cross-entropy alone) and `tokens` (sum of the mask).

  Raises:
    ValueError: a key is missing or unknown, a shape or a dtype is wrong, or `z_loss` is negative.

  Example:
    >>> batch = {k: jnp.zeros((2, 8), int) for k in ("tokens", "targets")}
    >>> value, aux = loss(init(jax.random.key(0), nano()), batch, nano())
    >>> int(aux["tokens"])
    16
  """
  _check_keys(batch)

  def objective(params, batch):
    logits_BSV, aux = apply(
      params,
      batch["tokens"],
      cfg,
      positions=batch.get("positions"),
      segment_ids=batch.get("segment_ids"),
      partition=partition,
      context=context,
    )
    value, loss_aux = losses.cross_entropy(
      logits_BSV,
      batch["targets"],
      batch.get("loss_mask"),
      z_loss=z_loss,
      axis_name=TENSOR if logits_BSV.shape[-1] < cfg.vocab_size else None,
    )
    if context is not None:
      value, loss_aux = _over_shards(value, loss_aux, batch["tokens"], context)
    return value, aux | loss_aux

  # As a whole, so that the logits, [B, S, V], are never laid out as a type would say.
  return call_with_auto_axes(objective, params, batch, out_spec=jax.P())


def _over_shards(value, aux, tokens_BS, context: ContextParallel):
  """Means over the tokens of all devices, from the means over the tokens of each."""
  count = context.psum(aux["tokens"], tokens_BS)
  share = aux["tokens"] / jnp.where(count > 0, count, 1.0)
  value, means = context.psum(jax.tree.map(lambda x: x * share, (value, aux)), tokens_BS)
  return value, means | {"tokens": count}


_REQUIRED = frozenset(("tokens", "targets"))
_OPTIONAL = frozenset(("segment_ids", "positions", "loss_mask"))


def _check_keys(batch: dict[str, jax.Array]) -> None:
  missing, unknown = _REQUIRED - batch.keys(), batch.keys() - _REQUIRED - _OPTIONAL
  if missing or unknown:
    raise ValueError(
      f"`batch` must have the keys {sorted(_REQUIRED)} and may have {sorted(_OPTIONAL)}:"
      f" missing {sorted(missing)}, unknown {sorted(unknown)}."
    )


def _check_parts(params: Params, cfg: LlamaConfig) -> None:
  """Raises ValueError if `params` are parts of weights and their types do not say of what."""
  table_VD = params["embed_VD"]
  if table_VD.shape[0] != cfg.vocab_size and not is_cut(table_VD):
    raise ValueError(
      f"`params` must be whole, or parts in a region that is manual over '{TENSOR}' and checks"
      f" types (`check_vma`): embed_VD has {table_VD.shape[0]} of {cfg.vocab_size} rows."
    )


def _check_inputs(tokens, cfg, positions, segment_ids, context):
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"`tokens` must be integers [B, S], got {tokens.dtype}{list(tokens.shape)}.")
  seq_len = tokens.shape[1] if context is None else context.num_tokens(tokens)
  if seq_len > cfg.max_seq_len:
    raise ValueError(
      f"`tokens` must not be longer than `max_seq_len` = {cfg.max_seq_len}, got {seq_len}."
    )
  for name, value in (("positions", positions), ("segment_ids", segment_ids)):
    if value is not None and value.shape != tokens.shape:
      raise ValueError(
        f"`{name}` must have the shape of `tokens` {tokens.shape}, got {value.shape}."
      )


def num_params(cfg: LlamaConfig) -> int:
  """Number of parameters, a tied embedding counted once.

  Example:
    >>> num_params(llama3_8b())
    8030261248
  """
  layer = sum(math.prod(leaf.shape) for leaf in _layer_leaves(cfg).values())
  return cfg.num_layers * layer + sum(math.prod(leaf.shape) for leaf in _outer_leaves(cfg).values())


def flops_per_token(cfg: LlamaConfig, seq_len: int) -> float:
  """Training FLOPs per token, forward and backward, causal attention counted at half.

  `6 P + 6 D V + 6 L S H C` with P the parameters that are neither embedding nor output matrix
  (PaLM, arXiv 2204.02311, appendix B). Recomputation by `remat` is not counted.
  """
  matrix = cfg.vocab_size * cfg.hidden_size
  inner = num_params(cfg) - matrix * (1 if cfg.tie_embeddings else 2)
  attention = 6 * cfg.num_layers * seq_len * cfg.num_heads * cfg.head_size
  return float(6 * inner + 6 * matrix + attention)
