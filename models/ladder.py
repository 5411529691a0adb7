r"""Ladder Transformer (arXiv 2501.06589): Llama whose all-reduces run beside the next block.

Under tensor parallelism block j, an attention or a feed-forward with its norm, ends in an
all-reduce. In a standard model the next block waits for it; in a ladder it reads the stream as it
was before:

.. math:: x_{j+1} = x_j + h_j(x_{j-1}), \qquad x_{-1} = x_0

Parameters and their shapes are Llama's, so a trained Llama may become one, whole or in its last
layers (`convert_to_ladder`). "parallel" is PaLM's layer (one norm, one all-reduce). In "desync"
each device has a residual stream and gains of norms of its own, and only some blocks sum:

.. math:: x^t \leftarrow x^t + h^t(x^t), \quad\text{or}\quad x \leftarrow \sum_t h^t(x^t) + x^t / T

Weights are whole, the compiler's to cut over `tensor`, or this device's parts in a region that is
manual over `tensor`. Letters as in `models.llama`; T devices on `tensor`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models import _ladder_layers, _llama_layers, llama, losses, rope
from models._ladder_config import LadderConfig, desync_pattern, indices
from parallel.mesh import TENSOR
from parallel.sharding import call_with_auto_axes, shard_batch
from parallel.tensor_parallel import vary_beyond_tensor

__all__ = [
  "LadderConfig",
  "apply",
  "convert_to_ladder",
  "desync_pattern",
  "init",
  "loss",
  "num_all_reduces",
  "specs",
  "tensor_bytes",
]

Params = dict[str, Any]
_NORMS = ("attn_norm_D", "mlp_norm_D")


def init(key: jax.Array, cfg: LadderConfig) -> Params:
  """Parameters as of `llama.init`; "parallel" lacks a norm, "desync" has [T, D] gains in layers.

  Example:
    >>> nano = llama.nano()
    >>> _, cfg = convert_to_ladder(None, nano, 1)
    >>> params = jax.eval_shape(lambda: init(jax.random.key(0), cfg))
    >>> params["layers"]["attn_norm_D"].shape
    (2, 64)
  """
  params = llama.init(key, cfg)
  layers = params["layers"]
  if cfg.residual == "parallel":
    del layers["mlp_norm_D"]
  if cfg.residual == "desync":
    for name in _NORMS:
      layers[name] = jnp.repeat(layers[name][:, None], cfg.tensor_parallel_size, 1)
  return params


def specs(cfg: LadderConfig) -> Params:
  """Tree like `init`'s with a `jax.P` of logical axis names for every array."""
  tree = llama.specs(cfg)
  if cfg.residual == "parallel":
    del tree["layers"]["mlp_norm_D"]
  if cfg.residual == "desync":
    for name in _NORMS:
      tree["layers"][name] = jax.P("layers", "heads", "norm")  # each device has its own
  return tree


def apply(
  params: Params,
  tokens_BS: jax.Array,
  cfg: LadderConfig,
  *,
  positions: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Next-token logits.

  Wire over `tensor`: `tensor_bytes`, and what is outside of the layers. In a ladder no all-reduce
  but the last is awaited by the block that follows it; whether it then runs beside that block is
  the compiler's choice (`jaxcomm.inspect.overlap_report`). With `cfg.scan_layers` the sum of a
  feed-forward is taken in the next round of the loop, since nothing stays open between rounds, and
  the first sums zeros: one all-reduce more.

  Args:
    params: from `init`, or of this device in a region that is manual over `tensor`, which checks
      types.
    tokens_BS: int ids in [0, V).
    cfg: the config of `params`.
    positions: int32[B, S] for RoPE, default 0..S-1.
    segment_ids: int32[B, S]; tokens attend only within their own segment. Default one segment.

  Returns:
    (float32[B, S, V] logits, {}); manual over `tensor` those of this device's part of V.

  Raises:
    ValueError: an argument has the wrong shape or dtype, the sequence exceeds `cfg.max_seq_len`, or
      a desync model is on another number of devices than it was made for.

  Example:
    >>> params, cfg = convert_to_ladder(llama.init(jax.random.key(0), llama.nano()), llama.nano())
    >>> apply(params, jnp.zeros((2, 8), int), cfg)[0].shape
    (2, 8, 512)
  """
  llama._check_inputs(tokens_BS, cfg, positions, segment_ids, None)
  llama._check_parts(params, cfg)
  _check_norms(params, cfg)
  logits_BSV = call_with_auto_axes(
    functools.partial(_forward, cfg=cfg), params, tokens_BS, positions, segment_ids,
    out_spec=llama._logits_spec(params, tokens_BS, cfg, None),
  )  # fmt: skip
  return logits_BSV, {}


def _forward(params, tokens_BS, positions, segment_ids, cfg: LadderConfig):
  if positions is None:
    positions = jnp.arange(tokens_BS.shape[1])[None]
  inv_A = rope.frequencies(cfg.head_size, cfg.rope_theta, cfg.rope_scaling)
  cos_sin = rope.angles(positions, inv_A)
  kernel: Any
  kernel, visible = _llama_layers.kernel(tokens_BS.shape[1], segment_ids, cfg, None)

  def attend(q, k, v):
    return kernel(q, k, v, visible), None

  def attention(weights, x_BSD, _=None):
    weights = _llama_layers.with_own_heads(weights, x_BSD)
    return _ladder_layers.attention_rows(weights, x_BSD, cos_sin, attend, cfg)

  layers = params["layers"]
  x_BSD = _llama_layers.embed(params, tokens_BS, cfg)
  x_BSD = shard_batch(vary_beyond_tensor(x_BSD, (params, cos_sin, visible)))
  if cfg.residual == "desync":
    x_BSD = _ladder_layers.run_desync(layers, x_BSD, attention, specs(cfg)["layers"], cfg)
  else:
    x_BSD, _ = _ladder_layers.run_layers(layers, x_BSD, attention, cfg)
  return _llama_layers.logits(params, x_BSD, cfg)


def loss(
  params: Params, batch: dict[str, jax.Array], cfg: LadderConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Masked mean next-token cross-entropy, nats, as `llama.loss`: (loss, aux).

  Args:
    params: from `init`.
    batch: `tokens` and `targets` int32[B, S]; optional `segment_ids`, `positions` int32[B, S] and
      `loss_mask` float32[B, S].
    cfg: the config of `params`.

  Raises:
    ValueError: as `apply`, or a key of `batch` is missing or unknown.
  """
  llama._check_keys(batch)

  def objective(params, batch):
    kept = {k: batch.get(k) for k in ("positions", "segment_ids")}
    logits_BSV, _ = apply(params, batch["tokens"], cfg, **kept)
    axis = TENSOR if logits_BSV.shape[-1] < cfg.vocab_size else None
    return losses.cross_entropy(
      logits_BSV, batch["targets"], batch.get("loss_mask"), axis_name=axis
    )

  return call_with_auto_axes(objective, params, batch, out_spec=jax.P())


def convert_to_ladder(
  params: Any, cfg: llama.LlamaConfig, ladder_layers: int | Sequence[int] | None = None
) -> tuple[Any, LadderConfig]:
  """A trained Llama as a ladder: the same parameters, not copied, and the config to run them with.

  The loss jumps and recovers with light training. The first ladder layer above a standard one
  misses that layer's feed-forward first.

  Args:
    params: of `cfg`.
    cfg: of a Llama.
    ladder_layers: how many layers, the last ones, or their indices; None: all.

  Raises:
    ValueError: there are not so many layers, an index is repeated, or `params` lack a norm.

  Example:
    >>> _, cfg = convert_to_ladder(None, llama.tiny(), 2)
    >>> cfg.kinds
    ('standard', 'standard', 'ladder', 'ladder')
  """
  layers = indices(ladder_layers, cfg.num_layers)
  if params is not None and not set(_NORMS) <= params["layers"].keys():
    raise ValueError(
      f"`params` must have two norms a layer, {_NORMS}, got {sorted(params['layers'])}."
    )
  names = (f.name for f in dataclasses.fields(llama.LlamaConfig))
  same = {name: getattr(cfg, name) for name in names}
  return params, LadderConfig(**same, residual="ladder", ladder_layers=layers)


def num_all_reduces(cfg: LadderConfig) -> int:
  """All-reduces of [B, S, D] over `tensor` in the layers, forward; as many again backward.

  Example:
    >>> num_all_reduces(convert_to_ladder(None, llama.tiny())[1])
    8
  """
  if cfg.residual == "desync":
    return sum(map(sum, cfg.reduce_pattern or ()))
  return cfg.num_layers * (1 if cfg.residual == "parallel" else 2)


def tensor_bytes(cfg: LadderConfig, batch_size: int, seq_len: int, num_devices: int) -> float:
  """Bytes that a device sends in the all-reduces of the layers, forward.

  `2 (T - 1) / T * B S D` numbers of `cfg.dtype` for each of `num_all_reduces`. A ladder sends what
  a standard model sends, at another time.

  Example:
    >>> tensor_bytes(convert_to_ladder(None, llama.tiny())[1], 1, 10, 4)
    61440.0
  """
  size = jnp.dtype(cfg.dtype).itemsize * batch_size * seq_len * cfg.hidden_size
  return num_all_reduces(cfg) * 2 * (num_devices - 1) / num_devices * size


def _check_norms(params: Params, cfg: LadderConfig) -> None:
  """Raises ValueError where a desync model was made for another number of devices."""
  gains = params["layers"]["attn_norm_D"]
  if (gains.ndim == 3) != (cfg.residual == "desync"):
    raise ValueError(
      f"`params` must be those of `residual` {cfg.residual!r}, got gains of shape {gains.shape}."
    )
  if gains.ndim == 3 and gains.shape[1] not in (1, cfg.tensor_parallel_size):
    raise ValueError(
      f"`tensor_parallel_size` is part of a desync model: `params` have {gains.shape[1]}, got"
      f" {cfg.tensor_parallel_size}."
    )
