"""The routing of residual streams between blocks. Letters as in `models.ladder`."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from models import _llama_layers
from models._ladder_config import LadderConfig, Residual
from parallel.mesh import TENSOR
from parallel.sharding import shard_batch
from parallel.tensor_parallel import cut_by_compiler, from_rows, is_cut, to_columns

Weights = dict[str, jax.Array]
Attention = Callable[[Weights, jax.Array], tuple[jax.Array, Any]]
# The residual stream without the last feed-forward, and what that adds: not yet summed over
# devices, so that in a scan its sum runs beside the attention of the next layer. None: nothing.
Stream = tuple[jax.Array, jax.Array | None]


def attention_rows(weights: Weights, x_BSD, cos_sin, attend, cfg: LadderConfig):
  """What attention adds to the stream, of this device's heads, and what `attend` keeps."""
  q_BSHC, k_BSKC, v_BSKC = _llama_layers.heads(x_BSD, weights, cos_sin, cfg)
  y_BSHC, kept = attend(q_BSHC, k_BSKC, v_BSKC)
  y_BSD = jnp.einsum("bshc,hcd->bsd", y_BSHC, weights["o_HCD"])
  return _add_once(y_BSD, weights.get("o_bias_D"), weights), kept


def feed_forward_rows(weights: Weights, x_BSD, cfg: LadderConfig):
  """What the feed-forward adds to the stream, of this device's part of F."""
  x_BSD = to_columns(x_BSD, weights["gate_DF"], over_tokens=False)
  inner = _llama_layers._joined_inner if cut_by_compiler(x_BSD) else _llama_layers._inner
  return _add_once(inner(x_BSD, weights, cfg), weights.get("down_bias_D"), weights)


def _add_once(y_BSD, bias_D, weights: Weights):
  """Adds a bias that all devices have to one of the parts of which the sum will be taken."""
  if bias_D is None:
    return y_BSD
  if is_cut(weights["down_FD"]):
    bias_D = jnp.where(jax.lax.axis_index(TENSOR) == 0, bias_D, jnp.zeros_like(bias_D))
  return y_BSD + bias_D[None, None]


def summed(y_BSD, weights: Weights):
  """The all-reduce at the end of a block."""
  return from_rows(y_BSD, weights["down_FD"], over_tokens=False)


def layer(kind: Residual, stream: Stream, weights: Weights, attention: Attention, cfg):
  """One layer of `kind`: the stream after it, and what its attention keeps.

  Only "ladder" reads what is old: its attention the stream without the last feed-forward, its
  feed-forward the stream without the attention.
  """
  before, late = stream

  def norm(x, name):
    return _llama_layers.rms_norm(x, weights[name], cfg)

  def with_late(x_BSD):
    return x_BSD if late is None else x_BSD + summed(late, weights)

  if kind == "ladder":
    y_BSD, kept = attention(weights, norm(before, "attn_norm_D"))
    if cfg.scan_layers:  # unrolled the other one does it, and XLA:TPU then hides one more
      before, y_BSD = _in_turn(before, y_BSD)
    x_BSD = with_late(before)
    new = feed_forward_rows(weights, norm(x_BSD, "mlp_norm_D"), cfg)
    x_BSD, new = _in_turn(x_BSD, new)
    return (shard_batch(x_BSD + summed(y_BSD, weights)), new), kept
  x_BSD = with_late(before)
  normed = norm(x_BSD, "attn_norm_D")
  y_BSD, kept = attention(weights, normed)
  if kind == "parallel":
    return (x_BSD, y_BSD + feed_forward_rows(weights, normed, cfg)), kept
  after = x_BSD + summed(y_BSD, weights)
  new = feed_forward_rows(weights, norm(after, "mlp_norm_D"), cfg)
  return (shard_batch(after), new), kept


def _in_turn(x_BSD, y_BSD):
  """Both, with the sums that will be added to `x` made to come after `y`; not in the backward pass.

  Else XLA makes one kernel of the norms of `x` and of `x` with the sum, and the block that made `y`
  waits for it.
  """
  return _barrier(_axes.vary_like(x_BSD, y_BSD), y_BSD)


@jax.custom_jvp
def _barrier(x_BSD, y_BSD):
  return jax.lax.optimization_barrier((x_BSD, y_BSD))


@_barrier.defjvp
def _barrier_jvp(primals, tangents):
  return _barrier(*primals), tangents


def run_layers(layers: Weights, x_BSD, attention: Callable[..., Any], cfg: LadderConfig, xs=None):
  """All layers: the stream at their end, and what their attentions keep, stacked.

  Args:
    layers: stacked weights.
    x_BSD: embedded tokens.
    attention: `(weights, x, xs of the layer) -> (what it adds, kept)`.
    cfg: config.
    xs: pytree of arrays stacked by layer, or None.
  """
  stream: Stream = (x_BSD, None)
  if cfg.scan_layers:  # the carry of a scan has one type
    late = _axes.vary_like(jnp.zeros_like(x_BSD), (x_BSD, layers))
    stream = (_axes.vary_like(x_BSD, late) if "ladder" in cfg.kinds else x_BSD, late)
  start, kept = 0, []
  for kind, group in itertools.groupby(cfg.kinds):
    stop = start + len(list(group))
    stream, found = _run_group(kind, stream, (layers, xs), start, stop, attention, cfg)
    kept += found
    start = stop
  before, late = stream
  x_BSD = before if late is None else before + summed(late, layers)
  return x_BSD, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kept)


def _run_group(kind: Residual, stream: Stream, inputs, start: int, stop: int, attention, cfg):
  """Layers `start` to `stop`, all of one kind."""

  def body(stream, inputs):
    weights, x = inputs
    weights = jax.tree.map(lambda p: p.astype(cfg.dtype), weights)
    return layer(kind, stream, weights, lambda w, x_BSD: attention(w, x_BSD, x), cfg)

  if cfg.remat != "none":
    policy = _llama_layers._REMAT_POLICY[cfg.remat]
    body = jax.checkpoint(body, policy=policy, prevent_cse=False)
  if cfg.scan_layers:
    part = jax.tree.map(lambda a: a[start:stop], inputs)
    stream, kept = jax.lax.scan(body, stream, part)
    return stream, [kept]
  found = []
  for i in range(start, stop):
    stream, kept = body(stream, jax.tree.map(lambda a, i=i: a[i], inputs))
    found.append(jax.tree.map(lambda a: a[None], kept))
  return stream, found


def run_desync(layers: Weights, x_BSD, attention: Attention, specs, cfg: LadderConfig):
  """All layers of "desync": the stream at their end, equal on all devices.

  Whole weights are taken as those of T devices, whose streams are stacked: [T, B, S, D].
  """
  size = cfg.tensor_parallel_size
  if is_cut(layers["down_FD"]):
    if (found := _axes.axis_size(TENSOR)) != size:
      raise ValueError(
        f"`tensor_parallel_size` is part of a desync model: it has {size}, got {found} devices on"
        f" '{TENSOR}'."
      )

    def over_devices(y_BSD):
      return jax.lax.psum(_axes.vary(y_BSD, TENSOR), TENSOR)

    return _desync_layers(layers, x_BSD, attention, cfg, lambda block: block, over_devices)

  def cut_dim(spec):
    found = [i for i, name in enumerate(spec) if name in ("heads", "kv_heads", "mlp")]
    return found[0] if found else None

  dims = {name: cut_dim(spec) for name, spec in specs.items()}
  parts = {
    name: w if (i := dims[name]) is None else w.reshape(*w.shape[:i], size, -1, *w.shape[i + 1 :])
    for name, w in layers.items()
  }
  of_a_layer = {name: None if i is None else i - 1 for name, i in dims.items()}

  def on_each(block):
    return jax.vmap(block, in_axes=(of_a_layer, 0))

  def over_streams(y_TBSD):
    return jnp.broadcast_to(y_TBSD.sum(0)[None], y_TBSD.shape)

  x_TBSD = jnp.broadcast_to(x_BSD[None], (size, *x_BSD.shape))
  return _desync_layers(parts, x_TBSD, attention, cfg, on_each, over_streams)[0]


def _desync_layers(layers: Weights, x, attention: Attention, cfg: LadderConfig, on_each, total):
  """The streams after all layers; `on_each(block)` is the block on all, `total` their sum."""

  def attention_block(weights, x_BSD):
    normed = _llama_layers.rms_norm(x_BSD, weights["attn_norm_D"][0], cfg)
    return attention(weights, normed)[0]

  def feed_forward_block(weights, x_BSD):
    normed = _llama_layers.rms_norm(x_BSD, weights["mlp_norm_D"][0], cfg)
    return feed_forward_rows(weights, normed, cfg)

  for i, sums in enumerate(cfg.reduce_pattern or ()):
    weights = jax.tree.map(lambda p, i=i: p[i].astype(cfg.dtype), layers)
    for block, is_summed in zip((attention_block, feed_forward_block), sums):
      y = on_each(block)(weights, x)
      x = total(y + x / cfg.tensor_parallel_size) if is_summed else x + y
  return x
