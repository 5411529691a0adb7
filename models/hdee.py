"""HDEE: an ensemble of domain experts of unequal size or length, mixed by the domain's posterior.

Ersoy et al. (arXiv 2502.19385), after Branch-Train-Merge (arXiv 2208.03306). Each domain has a
language model of its own, branched from a seed model and trained without any communication between
experts. At inference the experts' predictions are mixed; the weights are the posterior of the
domain given the tokens so far.

J experts, B batch, S sequence, V vocabulary.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from models._hdee_budget import Plan, equal_budget, resize
from models._hdee_experts import (
  ExpertSpec,
  branch,
  check_experts,
  llama_expert,
  merge_average,
  shared_vocab_size,
  stack_experts,
)
from models._hdee_mixing import (
  Prior,
  domain_posterior,
  estimate_prior,
  keep_top,
  log_prior,
  mix_next_token,
  mixture_log_prob,
  sharded_mixture_bytes,
  sharded_mixture_log_prob,
)

__all__ = [
  "EnsembleLM",
  "ExpertSpec",
  "Plan",
  "branch",
  "domain_posterior",
  "equal_budget",
  "estimate_prior",
  "llama_expert",
  "merge_average",
  "mix_next_token",
  "mixture_log_prob",
  "resize",
  "sharded_mixture_bytes",
  "sharded_mixture_log_prob",
  "stack_experts",
]

Batch = dict[str, Any]
Mixing = Literal["posterior", "average", "geometric"]


class EnsembleLM:
  """Experts whose predictions are mixed.

  - "posterior": by the posterior of the domain given the tokens so far, from `prior`.
  - "average": the arithmetic mean of the probabilities, whatever came before.
  - "geometric": the mean of the log-probabilities, normalised over the vocabulary.

  Scoring a token costs a forward pass of every expert, with `top_k` too: the posterior needs the
  words of those that are not mixed. Between devices only log-probabilities of the labels travel
  (4 bytes per token and expert), in `generate` and for "geometric" those of the vocabulary.

  Args:
    experts: at least one; of one vocabulary.
    mixing: see above.
    prior: J probabilities for "posterior"; default uniform.
    top_k: mix only so many experts at each position, for "posterior"; default all.

  Raises:
    ValueError: there is no expert, a name comes twice, vocabularies or tokenizers differ, an option
      is out of range or has no effect.

  Example:
    >>> def apply_fn(params, tokens, **_):
    ...   return jnp.broadcast_to(params[None, None], (*tokens.shape, 2))
    >>> heads = [
    ...   ExpertSpec(name=n, domain=n, apply_fn=apply_fn, params=jnp.asarray(p))
    ...   for n, p in (("fair", [0.0, 0.0]), ("biased", [3.0, 0.0]))
    ... ]
    >>> ensemble = EnsembleLM(heads)
    >>> tokens = np.zeros((1, 8), np.int32)
    >>> result = ensemble.perplexity([{"tokens": tokens, "targets": tokens}])
    >>> round(result["perplexity"], 2), result["tokens"]
    (1.14, 8)
  """

  def __init__(
    self,
    experts: Sequence[ExpertSpec],
    *,
    mixing: Mixing = "posterior",
    prior: Prior = None,
    top_k: int | None = None,
  ):
    self.experts = tuple(experts)
    check_experts(self.experts)
    if mixing not in get_args(Mixing):
      raise ValueError(f"`mixing` must be one of {', '.join(get_args(Mixing))}, got {mixing!r}.")
    if mixing != "posterior" and (prior is not None or top_k is not None):
      raise ValueError(f"`prior` and `top_k` have no effect with `mixing` {mixing!r}.")
    self.mixing: Mixing = mixing
    self.top_k = top_k
    self.vocab_size = shared_vocab_size(self.experts)
    self._log_prior_J = log_prior(prior, len(self.experts))
    self.prior = np.exp(np.asarray(self._log_prior_J))
    keep_top(self._log_prior_J, top_k)  # refuses

  @property
  def flops_per_token(self) -> float | None:
    """Of scoring one token: the experts' sum; None where one of them is unknown."""
    each = [e.flops_per_token for e in self.experts]
    return None if None in each else float(sum(f for f in each if f is not None))

  def with_prior(self, prior: Prior) -> "EnsembleLM":
    """The same experts with another prior."""
    return EnsembleLM(self.experts, mixing=self.mixing, prior=prior, top_k=self.top_k)

  def label_log_probs(self, batch: Batch) -> jax.Array:
    """Log-probability that each expert gives each target.

    Args:
      batch: `tokens` and `targets` int32[B, S]; optional `loss_mask` float32[B, S], `segment_ids`
        and `positions` int32[B, S].

    Returns:
      float32[J, B, S], 0 where masked.
    """
    found = [_label_log_probs(e.apply_fn, e.params, _placed(batch, e.params)) for e in self.experts]
    return jnp.stack(_together(found))

  def log_prob(self, batch: Batch) -> jax.Array:
    """Log-probability of each target under the mixture: float32[B, S], 0 where masked."""
    if self.mixing == "geometric":
      return self._geometric(batch)
    label_logp_JBS = self.label_log_probs(batch)
    if self.mixing == "average":
      mean_BS = jax.nn.logsumexp(label_logp_JBS, 0) - math.log(len(self.experts))
      return mean_BS  # of zeros where masked
    return _mixture(label_logp_JBS, self.prior, batch.get("loss_mask"), self.top_k)

  def perplexity(self, batches: Iterable[Batch], prior_batches: Any = None) -> dict[str, Any]:
    """Scores `batches`.

    Args:
      batches: see `label_log_probs`.
      prior_batches: held-out batches from which to estimate the prior first, see `estimate_prior`;
        others than `batches`, else the score would be told what it is to guess.

    Returns:
      `loss`, mean nats per token, summed in float64; `perplexity`, its exponential; `tokens`;
      `sequences`; `empty_sequences`, those without any token, which are left out.

    Raises:
      ValueError: `prior_batches` is `batches`, or there is no token.
    """
    if prior_batches is not None:
      if prior_batches is batches:
        raise ValueError("`prior_batches` must not be `batches`, which are to be scored.")
      logps = (self.label_log_probs(batch) for batch in prior_batches)
      return self.with_prior(estimate_prior(logps)).perplexity(batches)
    total, tokens, sequences, empty = 0.0, 0, 0, 0
    for batch in batches:
      mask_BS = np.asarray(batch.get("loss_mask", np.ones(batch["tokens"].shape))) > 0
      used_B = mask_BS.any(-1)
      total -= float(np.asarray(self.log_prob(batch), np.float64).sum())
      tokens, sequences = tokens + int(mask_BS.sum()), sequences + int(used_B.sum())
      empty += int((~used_B).sum())
    if not tokens:
      raise ValueError(f"`batches` must hold at least one token to score, got {empty} empty rows.")
    loss = total / tokens
    return {
      "loss": loss,
      "perplexity": math.exp(loss),
      "tokens": tokens,
      "sequences": sequences,
      "empty_sequences": empty,
    }

  def generate(
    self, prompt_BS: Any, num_tokens: int, key: jax.Array, *, temperature: float = 1.0
  ) -> np.ndarray:
    """Continues `prompt_BS`, token by token, with weights that follow what was generated.

    The prompt is read once; then each token costs a step of every expert with its own cache.

    Args:
      prompt_BS: integers [B, S], S at least 1.
      num_tokens: how many to append.
      key: of the draws.
      temperature: of the mixed distribution; 0 takes the likeliest token.

    Returns:
      int32[B, S + num_tokens].

    Raises:
      ValueError: an argument is out of range, or an expert has no `decode_fn`.
    """
    prompt_BS = _check_prompt(prompt_BS, num_tokens, temperature, self.vocab_size)
    if lacking := [e.name for e in self.experts if not (e.decode_fn and e.init_cache_fn)]:
      raise ValueError(f"`experts` must have a `decode_fn` to generate, {lacking} have none.")
    batch_size, length = prompt_BS.shape
    caches = [
      _placed(e.init_cache_fn(batch_size, length + num_tokens), e.params)
      for e in self.experts
      if e.init_cache_fn
    ]
    logp_JBSV, caches = self._decode(prompt_BS, caches)
    log_w_JB = self._weights_after(prompt_BS, logp_JBSV)
    tokens = [prompt_BS]
    options = temperature, self.mixing, self.top_k
    for step in range(num_tokens):
      step_key = jax.random.fold_in(key, step)
      token_B, log_w_JB = _draw(logp_JBSV[:, :, -1], log_w_JB, step_key, *options)
      tokens.append(np.asarray(token_B)[:, None])
      if step + 1 < num_tokens:
        logp_JBSV, caches = self._decode(tokens[-1], caches)
    return np.concatenate(tokens, 1)

  def _decode(self, tokens_BS: np.ndarray, caches: list[Any]) -> tuple[jax.Array, list[Any]]:
    """float32[J, B, S, V] log-probabilities after each of `tokens_BS`, and the caches with them."""
    found = [
      _decode_log_probs(e.decode_fn, e.params, _placed(tokens_BS, e.params), cache)
      for e, cache in zip(self.experts, caches)
    ]
    return jnp.stack(_together([logp for logp, _ in found])), [cache for _, cache in found]

  def _weights_after(self, prompt_BS: np.ndarray, logp_JBSV: jax.Array) -> jax.Array:
    """[J, B] log-weights once the prompt is known; its first token was not predicted."""
    if self.mixing != "posterior" or prompt_BS.shape[1] == 1:
      return jnp.broadcast_to(self._log_prior_J[:, None], logp_JBSV.shape[:2])
    label_JBS = _labels_of_each(logp_JBSV[:, :, :-1], prompt_BS[:, 1:])
    return domain_posterior(label_JBS, self.prior, exclusive=False)[..., -1]

  def _geometric(self, batch: Batch) -> jax.Array:
    found = [_log_probs(e.apply_fn, e.params, _placed(batch, e.params)) for e in self.experts]
    mean_BSV = jnp.stack(_together(found)).mean(0)
    return _labels_of(mean_BSV, batch)


def _log_probs_of(apply_fn, params, batch: Batch) -> jax.Array:
  extras = {k: batch[k] for k in ("segment_ids", "positions") if k in batch}
  logits_BSV = apply_fn(params, batch["tokens"], **extras)
  return jax.nn.log_softmax(logits_BSV.astype(jnp.float32))


_log_probs = jax.jit(_log_probs_of, static_argnums=0)


@jax.jit
def _labels_of(logits_BSV: jax.Array, batch: Batch) -> jax.Array:
  """Log-probabilities of the targets, 0 where masked."""
  logp_BSV = jax.nn.log_softmax(logits_BSV)
  label_BS = jnp.take_along_axis(logp_BSV, batch["targets"][..., None], -1)[..., 0]
  return jnp.where(batch["loss_mask"] > 0, label_BS, 0.0) if "loss_mask" in batch else label_BS


@functools.partial(jax.jit, static_argnums=0)
def _label_log_probs(apply_fn, params, batch: Batch) -> jax.Array:
  return _labels_of(_log_probs_of(apply_fn, params, batch), batch)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode_log_probs(decode_fn, params, tokens_BS, cache):
  logits_BSV, cache = decode_fn(params, tokens_BS, cache)
  return jax.nn.log_softmax(logits_BSV.astype(jnp.float32)), cache


@jax.jit
def _labels_of_each(logp_JBSV: jax.Array, target_BS: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logp_JBSV, target_BS[None, ..., None], -1)[..., 0]


_mixture = jax.jit(
  lambda logp, prior, mask, top_k: mixture_log_prob(logp, prior, mask, top_k), static_argnums=3
)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _draw(logp_JBV, log_w_JB, key, temperature, mixing, top_k):
  """The next token int32[B], and the log-weights after it."""
  if mixing == "geometric":
    mixed_BV = jax.nn.log_softmax(logp_JBV.mean(0))
  else:
    mixed_BV = mix_next_token(logp_JBV, keep_top(log_w_JB, top_k))
  warm = jax.random.categorical(key, mixed_BV / jnp.maximum(temperature, 1e-6))
  token_B = jnp.where(temperature == 0, jnp.argmax(mixed_BV, -1), warm).astype(jnp.int32)
  if mixing == "posterior":
    label_JB = jnp.take_along_axis(logp_JBV, token_B[None, :, None], -1)[..., 0]
    log_w_JB = jax.nn.log_softmax(log_w_JB + label_JB, 0)
  return token_B, log_w_JB


def _placed(batch: Any, params: Any) -> Any:
  """`batch` on the devices of `params`."""
  [*_, leaf] = [None, *jax.tree.leaves(params)]
  sharding = getattr(leaf, "sharding", None)
  if isinstance(sharding, jax.NamedSharding):
    sharding = jax.NamedSharding(sharding.mesh, jax.P())
  return batch if sharding is None else jax.device_put(batch, sharding)


def _together(arrays: list[jax.Array]) -> list[jax.Array]:
  """On one device, so that experts on others can be mixed; all of them are already computing."""
  return [jax.device_put(x, jax.local_devices()[0]) for x in arrays]


def _check_prompt(
  prompt_BS: Any, num_tokens: int, temperature: float, vocab_size: int
) -> np.ndarray:
  """int32[B, S]."""
  prompt_BS = np.asarray(prompt_BS)
  integers = np.issubdtype(prompt_BS.dtype, np.integer)
  if prompt_BS.ndim != 2 or not prompt_BS.size or not integers:
    raise ValueError(
      f"`prompt` must be integers [B, S], at least one, got {prompt_BS.dtype}{prompt_BS.shape}."
    )
  if prompt_BS.min() < 0 or prompt_BS.max() >= vocab_size:
    raise ValueError(
      f"`prompt` must be in [0, {vocab_size}), the vocabulary, got ids from {prompt_BS.min()} to"
      f" {prompt_BS.max()}."
    )
  if num_tokens < 1:
    raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}.")
  if not 0 <= temperature < math.inf:
    raise ValueError(f"`temperature` must be finite and at least 0, got {temperature}.")
  return prompt_BS.astype(np.int32)
