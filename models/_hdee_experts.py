"""Experts of an ensemble: what they are, where they start, how equal ones become one.

Import the names from `models.hdee`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcomm.training import TrainStep
from jaxcomm.training._layout import init_state
from models import llama, llama_decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSpec:
  """A language model of one domain.

  Attributes:
    name: unique in an ensemble.
    domain: what it was trained on.
    apply_fn: `(params, tokens_BS, **extras) -> logits[B, S, V]`, causal, traceable. Extras are
      `segment_ids` and `positions` where a batch has them. Experts that share the function object
      share compiled code.
    params: its parameters, on any devices: other experts may have others.
    parent: name of the model that it was branched from.
    flops_per_token: of a forward pass.
    tokenizer: names its vocabulary, such as a hash; equal in an ensemble.
    init_cache_fn: `(batch_size, max_tokens) -> cache`, for `EnsembleLM.generate`.
    decode_fn: `(params, tokens_BS, cache) -> (logits[B, S, V], cache)`, the next tokens after those
      in the cache, likewise.
  """

  name: str
  domain: str
  apply_fn: Callable[..., jax.Array]
  params: Any
  parent: str | None = None
  flops_per_token: float | None = None
  tokenizer: str | None = None
  init_cache_fn: Callable[[int, int], Any] | None = None
  decode_fn: Callable[..., tuple[jax.Array, Any]] | None = None


def llama_expert(
  name: str,
  domain: str,
  params: llama.Params,
  cfg: llama.LlamaConfig,
  *,
  seq_len: int,
  parent: str | None = None,
  tokenizer: str | None = None,
) -> ExpertSpec:
  """An `ExpertSpec` of a Llama model; all of one `cfg` share compiled code.

  Args:
    name: see `ExpertSpec`, as all others.
    domain: as there.
    params: from `llama.init`.
    cfg: of `params`.
    seq_len: of the sequences to score, for the FLOPs of a token.
    parent: as there.
    tokenizer: as there.

  Example:
    >>> params = llama.init(jax.random.key(0), llama.nano())
    >>> round(llama_expert("law", "law", params, llama.nano(), seq_len=64).flops_per_token)
    279168
  """
  apply_fn, init_cache_fn, decode_fn = _llama_fns(cfg)
  return ExpertSpec(
    name=name,
    domain=domain,
    apply_fn=apply_fn,
    params=params,
    parent=parent,
    flops_per_token=llama.flops_per_token(cfg, seq_len) / 3,  # a third of training is forward
    tokenizer=tokenizer,
    init_cache_fn=init_cache_fn,
    decode_fn=decode_fn,
  )


@functools.cache
def _llama_fns(cfg: llama.LlamaConfig):
  def apply_fn(params, tokens_BS, **extras):
    return llama.apply(params, tokens_BS, cfg, **extras)[0]

  return (
    apply_fn,
    functools.partial(llama_decode.init_cache, cfg),
    functools.partial(llama_decode.decode, cfg=cfg),
  )


def branch(train_step: TrainStep, params: Any) -> TrainStep:
  """`train_step` whose training starts from `params`, its parent's, with a fresh optimizer.

  Args:
    train_step: from `jaxcomm.training.make_train_step` or `parallel.make_zero_step`.
    params: tree like one replica's parameters.

  Raises:
    ValueError: `params` are those of a model of another size.
  """
  layout = train_step.logical_layout
  stacked = layout.varying.params

  def logical(shape, varies):
    return shape.shape[1:] if varies else shape.shape

  want = jax.tree.map(logical, layout.shapes.params, stacked)
  got = jax.tree.map(jnp.shape, params)
  if want != got:
    raise ValueError(f"`params` must have the shapes {want}, got {got}: branches keep their size.")
  start = jax.jit(
    lambda key, params: layout.stack(init_state(lambda _: params, train_step.tx, key)),
    out_shardings=layout.shardings,
  )

  def init(key):
    return train_step.from_logical(start(key, params))

  return dataclasses.replace(train_step, init=init)


def merge_average(params_list: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
  """One model of all experts: the weighted mean of their parameters, summed in float32.

  Branch-Train-Merge (arXiv 2208.03306) §2.3, for experts of one size and one seed model.

  Args:
    params_list: trees of the same structure and shapes.
    weights: a number per expert that is at least 0; default equal. Their sum is divided out.

  Raises:
    ValueError: trees differ, or `weights` do not fit.

  Example:
    >>> merge_average([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}], [1, 3])["w"].tolist()
    [0.75, 0.75]
  """
  _check_same_shapes(params_list, "merge_average")
  weights = [1.0] * len(params_list) if weights is None else list(weights)
  if len(weights) != len(params_list) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
    raise ValueError(
      f"`weights` must be a number >= 0 for each of {len(params_list)} experts, not all 0, got"
      f" {weights}."
    )
  share = [w / sum(weights) for w in weights]

  def mean(*leaves):
    total = sum(w * x.astype(jnp.float32) for w, x in zip(share, leaves))
    return jnp.asarray(total).astype(leaves[0].dtype)

  return jax.tree.map(mean, *params_list)


def stack_experts(params_list: Sequence[Any]) -> Any:
  """The parameters of experts of one size on a new leading axis J, for a mesh axis `expert`.

  Raises:
    ValueError: trees differ.
  """
  _check_same_shapes(params_list, "stack_experts")
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_list)


def check_experts(experts: Sequence[ExpertSpec]) -> None:
  """Raises ValueError where `experts` are no ensemble."""
  if not experts:
    raise ValueError("`experts` must hold at least one expert, got none.")
  names = [e.name for e in experts]
  if len(set(names)) < len(names):
    raise ValueError(f"`experts` must have names that differ, got {names}.")
  tokenizers = {e.tokenizer for e in experts}
  if len(tokenizers) > 1:
    raise ValueError(f"`experts` must share one tokenizer, got {sorted(map(str, tokenizers))}.")


def shared_vocab_size(experts: Sequence[ExpertSpec]) -> int:
  """V, equal for all `experts`; ValueError if not."""
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  sizes = {e.name: jax.eval_shape(e.apply_fn, e.params, tokens).shape[-1] for e in experts}
  if len(set(sizes.values())) > 1:
    raise ValueError(f"`experts` must share one vocabulary, got sizes {sizes}.")
  return next(iter(sizes.values()))


def _check_same_shapes(params_list: Sequence[Any], name: str) -> None:
  if not params_list:
    raise ValueError("`params_list` must hold at least one expert, got none.")
  shapes = [jax.tree.map(jnp.shape, p) for p in params_list]
  if any(s != shapes[0] for s in shapes):
    raise ValueError(
      f"`params_list` must be of models of one size for {name}, got different shapes: mix the"
      " predictions of unequal experts with EnsembleLM."
    )
