"""Mixing language models by the posterior of the domain. Import the names from `models.hdee`.

J experts, B batch, S sequence, V vocabulary. What an expert says of the token that came is
`label_logp`, of all tokens `logp`; both are log-probabilities, float32.
"""

from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxcomm import _axes

Prior = Any  # J probabilities; None: uniform


def domain_posterior(
  label_logp_JBS: jax.Array,
  prior: Prior = None,
  mask_BS: jax.Array | None = None,
  *,
  exclusive: bool = True,
) -> jax.Array:
  r"""Log-weights of the experts at every position, from the tokens before it.

  .. math:: \log w_{j,t} = \log\pi_j + \sum_{u<t} \ell_{j,u} - \log Z_t

  Branch-Train-Merge (arXiv 2208.03306) §2.3, HDEE (arXiv 2502.19385) §3. Nothing crosses the wire.

  Args:
    label_logp_JBS: float32[J, B, S], log-probability that each expert gave each token.
    prior: J probabilities that sum to 1, zeros allowed; default uniform.
    mask_BS: positions with 0 say nothing about the domain.
    exclusive: False also counts the token at the position itself. That leaks what is to be
      predicted: only for the weights after the last token.

  Returns:
    float32[J, B, S]; `exp` of it sums to 1 over J.

  Raises:
    ValueError: a shape is wrong, or `prior` is no distribution.

  Example:
    >>> logp = jnp.log(jnp.asarray([[[0.5, 0.5, 0.5]], [[0.25, 0.5, 0.5]]]))
    >>> print(np.exp(domain_posterior(logp))[:, 0].round(2))
    [[0.5  0.67 0.67]
     [0.5  0.33 0.33]]
  """
  label_logp_JBS = _masked(_checked(label_logp_JBS, 3, "label_logp"), mask_BS)
  total_JBS = jnp.cumsum(label_logp_JBS, -1)
  if exclusive:  # shifted, not subtracted: a token of probability 0 gives -inf - -inf
    total_JBS = jnp.pad(total_JBS[..., :-1], ((0, 0), (0, 0), (1, 0)))
  log_prior_J = log_prior(prior, total_JBS.shape[0])
  return jax.nn.log_softmax(total_JBS + log_prior_J[:, None, None], 0)


def mixture_log_prob(
  label_logp_JBS: jax.Array,
  prior: Prior = None,
  mask_BS: jax.Array | None = None,
  top_k: int | None = None,
) -> jax.Array:
  r"""Log-probability of each token under the mixture, :math:`\log\sum_j w_{j,t} p_j(x_t)`.

  Without `top_k` its sum over a sequence is :math:`\log\sum_j \pi_j p_j(x)`, so that a sequence
  costs at most :math:`-\log\pi_j` nats more than with the expert j that is best for it.

  Args:
    label_logp_JBS: float32[J, B, S], see `domain_posterior`, as `prior` and `mask_BS`.
    prior: as there.
    mask_BS: as there; 0 in the result.
    top_k: mix only the experts with the largest weights, renormalised; default all.

  Returns:
    float32[B, S].

  Raises:
    ValueError: see `domain_posterior`, or `top_k` is not in [1, J].

  Example:
    >>> logp = jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.25, 0.25]]]))
    >>> total = mixture_log_prob(logp).sum()
    >>> round(float(jnp.exp(total)), 5) == round((0.5 * 0.5 + 0.25 * 0.25) / 2, 5)
    True
  """
  log_w_JBS = keep_top(domain_posterior(label_logp_JBS, prior, mask_BS), top_k)
  mixed_BS = jax.nn.logsumexp(log_w_JBS + _masked(label_logp_JBS, mask_BS), 0)
  return mixed_BS if mask_BS is None else jnp.where(mask_BS > 0, mixed_BS, 0.0)


def mix_next_token(logp_JBV: jax.Array, log_w_JB: jax.Array, *, logits: bool = False) -> jax.Array:
  r"""The mixture's distribution of the next token, :math:`\log\sum_j w_j p_j(v)`.

  Args:
    logp_JBV: [J, B, V] log-probabilities of all tokens.
    log_w_JB: float32[J, B] log-weights.
    logits: whether `logp_JBV` is still to be normalised.

  Returns:
    float32[B, V].

  Raises:
    ValueError: shapes do not fit, or `logp_JBV` is not normalised (seen outside `jax.jit` only).

  Example:
    >>> logits = jnp.zeros((2, 1, 4))
    >>> jnp.exp(mix_next_token(logits, jnp.log(jnp.full((2, 1), 0.5)), logits=True)).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
  """
  logp_JBV = _checked(logp_JBV, 3, "logp")
  if log_w_JB.shape != logp_JBV.shape[:2]:
    raise ValueError(f"`log_w` must have the shape {logp_JBV.shape[:2]}, got {log_w_JB.shape}.")
  if logits:
    logp_JBV = jax.nn.log_softmax(logp_JBV)
  elif not isinstance(logp_JBV, Tracer):
    off = float(jnp.abs(jax.nn.logsumexp(logp_JBV, -1)).max())
    if not off < 1e-2:
      raise ValueError(
        f"`logp` must be log-probabilities, got a logsumexp of {off:.3g} where 0 is right: pass"
        " logits=True."
      )
  return jax.nn.logsumexp(log_w_JB[..., None] + logp_JBV, 0)


def sharded_mixture_log_prob(
  label_logp_BS: jax.Array,
  axis_name: str = "expert",
  *,
  prior: Prior = None,
  mask_BS: jax.Array | None = None,
  top_k: int | None = None,
) -> jax.Array:
  """`mixture_log_prob` where each place on `axis_name` holds one expert.

  For `jax.shard_map` and `jax.vmap(axis_name=...)`. Wire: one all-gather of the log-probabilities
  of the labels over `axis_name`, `sharded_mixture_bytes`, whatever the vocabulary.

  Args:
    label_logp_BS: float32[B, S] of this place's expert.
    axis_name: mesh axis of the experts.
    prior: see `mixture_log_prob`, as all others.
    mask_BS: as there, equal on all places.
    top_k: as there.

  Returns:
    float32[B, S], equal on all places.

  Raises:
    ValueError: see `mixture_log_prob`, or `axis_name` is unbound.

  Example:
    >>> logp = jnp.log(jnp.asarray([[[0.5, 0.5]], [[0.25, 0.25]]]))
    >>> mixed = jax.vmap(sharded_mixture_log_prob, axis_name="expert")(logp)
    >>> bool(jnp.allclose(mixed[1], mixture_log_prob(logp)))
    True
  """
  _axes.axis_size(axis_name)
  label_logp_JBS = _axes.all_gather_equal(_checked(label_logp_BS, 2, "label_logp"), axis_name)
  return mixture_log_prob(label_logp_JBS, prior, mask_BS, top_k)


def sharded_mixture_bytes(batch_size: int, seq_len: int, num_experts: int) -> int:
  """Bytes that each device sends in `sharded_mixture_log_prob`: `4 B S (J - 1)`.

  Example:
    >>> sharded_mixture_bytes(2, 8, 4)
    192
  """
  return 4 * batch_size * seq_len * (num_experts - 1)


def estimate_prior(
  label_logps: Iterable[Any],
  *,
  num_sequences: int = 100,
  decay: float | None = None,
  form: Literal["ema", "btm", "release"] = "ema",
) -> np.ndarray:
  r"""A prior from sequences that are not those to be scored.

  With :math:`p_i` the posterior after the whole sequence i of N, and :math:`\lambda` = `decay`:

  - "ema": :math:`\pi \propto \sum_i \lambda^{N-i} p_i`, an average that forgets;
  - "btm": :math:`\pi \propto \sum_i \lambda^i p_i` (arXiv 2208.03306), the first count most;
  - "release": :math:`\pi \leftarrow \lambda^n \pi + p_n` from ones, as the code released with HDEE:
    practically only the last sequence counts.

  Args:
    label_logps: arrays [J, B, S], from `EnsembleLM.label_log_probs` (0 where masked). Sequences
      without any token are left out.
    num_sequences: N, how many to use at most.
    decay: in (0, 1]; default 0.98 for "ema", 0.3 for the others.
    form: see above.

  Returns:
    float32[J], sums to 1.

  Raises:
    ValueError: an option is out of range, or there is no sequence.

  Example:
    >>> logp = np.log([[[0.5, 0.5]], [[0.25, 0.25]]])
    >>> print(estimate_prior([logp]).round(3))
    [0.8 0.2]
  """
  default = {"ema": 0.98, "btm": 0.3, "release": 0.3}
  if form not in default:
    raise ValueError(f"`form` must be one of {', '.join(default)}, got {form!r}.")
  decay = default[form] if decay is None else decay
  if not 0 < decay <= 1:
    raise ValueError(f"`decay` must be in (0, 1], got {decay}.")
  if num_sequences < 1:
    raise ValueError(f"`num_sequences` must be at least 1, got {num_sequences}.")
  posterior_NJ = _sequence_posteriors(label_logps, num_sequences)
  count = np.arange(1, len(posterior_NJ) + 1)
  if form == "release":
    prior_J = np.ones(posterior_NJ.shape[1])
    for n, posterior_J in zip(count, posterior_NJ):
      prior_J = decay**n * prior_J + posterior_J
  else:
    weight_N = decay ** (count if form == "btm" else len(count) - count)
    prior_J = weight_N @ posterior_NJ
  return (prior_J / prior_J.sum()).astype(np.float32)


def log_prior(prior: Prior, num_experts: int) -> jax.Array:
  """float32[J] logarithms of `prior`; the uniform one for None."""
  if prior is None:
    return jnp.full(num_experts, -np.log(num_experts), jnp.float32)
  if not isinstance(prior, Tracer):
    values = np.asarray(prior, np.float64)
    if values.shape != (num_experts,):
      raise ValueError(
        f"`prior` must hold a probability for each of {num_experts} experts, got shape"
        f" {values.shape}."
      )
    if not (values >= 0).all() or abs(values.sum() - 1) > 1e-4:
      raise ValueError(f"`prior` must be at least 0 and sum to 1, got {values.tolist()}.")
  return jnp.log(jnp.asarray(prior, jnp.float32))


def keep_top(log_w: jax.Array, top_k: int | None) -> jax.Array:
  """Log-weights [J, ...] with all but the `top_k` largest at -inf, renormalised."""
  num_experts = log_w.shape[0]
  if top_k is None:
    return log_w
  if not 1 <= top_k <= num_experts:
    raise ValueError(f"`top_k` must be in [1, {num_experts}], the number of experts, got {top_k}.")
  rank = jnp.argsort(jnp.argsort(-log_w, 0), 0)  # of equal ones the first is kept
  return jax.nn.log_softmax(jnp.where(rank < top_k, log_w, -jnp.inf), 0)


def _sequence_posteriors(label_logps: Iterable[Any], num_sequences: int) -> np.ndarray:
  """float64[N, J] under a uniform prior."""
  rows: list[np.ndarray] = []
  for label_logp_JBS in label_logps:
    logp_JBS = np.asarray(label_logp_JBS, np.float64)
    if logp_JBS.ndim != 3:
      raise ValueError(f"`label_logps` must be arrays [J, B, S], got shape {logp_JBS.shape}.")
    used_B = (logp_JBS != 0).any((0, 2))
    total_BJ = logp_JBS.sum(-1).T[used_B]
    total_BJ -= total_BJ.max(-1, keepdims=True)
    rows += list(np.exp(total_BJ) / np.exp(total_BJ).sum(-1, keepdims=True))
    if len(rows) >= num_sequences:
      break
  if not rows:
    raise ValueError("`label_logps` must hold at least one sequence with tokens, got none.")
  return np.stack(rows[:num_sequences])


def _masked(label_logp: jax.Array, mask_BS: jax.Array | None) -> jax.Array:
  if mask_BS is None:
    return label_logp.astype(jnp.float32)
  if mask_BS.shape != label_logp.shape[1:]:
    raise ValueError(f"`mask` must have the shape {label_logp.shape[1:]}, got {mask_BS.shape}.")
  return jnp.where((mask_BS > 0)[None], label_logp, 0.0).astype(jnp.float32)


def _checked(x: jax.Array, ndim: int, name: str) -> jax.Array:
  if jnp.ndim(x) != ndim or not jnp.issubdtype(x.dtype, jnp.floating) or not x.shape[0]:
    raise ValueError(f"`{name}` must be a float array of {ndim} axes, got {x.dtype}{x.shape}.")
  return jnp.asarray(x, jnp.float32)
