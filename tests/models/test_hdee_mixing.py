"""The identities of a Bayes mixture, and a reference in numpy's float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxcomm.inspect import collective_bytes
from models import hdee

J, B, S, V = 3, 2, 9, 5
posterior = jax.jit(hdee.domain_posterior)
inclusive = jax.jit(functools.partial(hdee.domain_posterior, exclusive=False))
mixture = jax.jit(hdee.mixture_log_prob, static_argnums=3)
seeds = hypothesis.given(seed=st.integers(0, 2**32 - 1))
few = hypothesis.settings(max_examples=15, deadline=None)


def draw(seed):
  """Distributions of J experts, labels, a prior with one expert off now and then, a mask."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, rng.uniform(0.1, 6), (J, B, S, V))
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  label = rng.integers(0, V, (B, S))
  prior = rng.dirichlet(np.ones(J)) * (np.arange(J) > rng.integers(0, 2) - 1)
  mask = (rng.random((B, S)) < 0.8).astype(np.float32)
  at_label = np.take_along_axis(logp, label[None, ..., None], -1)[..., 0].astype(np.float32)
  return logp.astype(np.float32), at_label, (prior / prior.sum()).astype(np.float32), mask


def reference(label_logp, prior, mask, top_k=J):
  """Weights and mixture token by token, with probabilities instead of their logarithms."""
  weights, mixed = np.zeros((J, B, S)), np.zeros((B, S))
  for b in range(B):
    w = prior.astype(np.float64)
    for t in range(S):
      weights[:, b, t] = w / w.sum()
      if mask[b, t]:
        p = np.exp(label_logp[:, b, t].astype(np.float64))
        best = np.argsort(-weights[:, b, t], kind="stable")[:top_k]
        kept = weights[best, b, t]
        mixed[b, t] = np.log(kept @ p[best] / kept.sum())
        w = weights[:, b, t] * p
  return weights, mixed


@few
@seeds
def test_equals_the_reference(seed):
  _, label, prior, mask = draw(seed)
  weights, mixed = reference(label, prior, mask)
  np.testing.assert_allclose(jnp.exp(posterior(label, prior, mask)), weights, rtol=2e-4, atol=1e-7)
  np.testing.assert_allclose(mixture(label, prior, mask), mixed, rtol=1e-4, atol=1e-6)
  for top_k in (1, J):
    _, mixed = reference(label, prior, mask, top_k)
    got = mixture(label, prior, mask, top_k)
    np.testing.assert_allclose(got, mixed, rtol=1e-4, atol=1e-6)


@few
@seeds
def test_the_chain_rule_and_the_regret_bound(seed):
  """Summed over a sequence it is the mixture of whole sequences."""
  _, label, prior, mask = draw(seed)
  total_JB = (label * mask).astype(np.float64).sum(-1)
  with np.errstate(divide="ignore"):
    joint_JB = np.log(prior.astype(np.float64))[:, None] + total_JB
  whole_B = np.log(np.exp(joint_JB).sum(0))
  got_B = np.asarray(mixture(label, prior, mask), np.float64).sum(-1)
  np.testing.assert_allclose(got_B, whole_B, rtol=1e-5, atol=1e-5)
  assert (got_B >= joint_JB.max(0) - 1e-4).all()  # at most -log prior worse than the best


def test_an_inclusive_sum_leaks():
  """It breaks the chain rule: the tokens look likelier than any mixture can make them."""
  _, label, prior, mask = draw(3)
  leaked = jax.nn.logsumexp(inclusive(label, prior, mask) + label * mask, 0).sum(-1)
  assert (leaked > mixture(label, prior, mask).sum(-1) + 0.1).all()


@few
@seeds
def test_weights(seed):
  _, label, prior, mask = draw(seed)
  log_w = np.asarray(posterior(label, prior, mask))
  np.testing.assert_allclose(np.exp(log_w).sum(0), 1, rtol=1e-6)
  np.testing.assert_allclose(np.exp(log_w[..., 0]), np.tile(prior[:, None], (1, B)), atol=1e-6)
  shifted = posterior(label + np.linspace(-2, 0, S, dtype=np.float32), prior, mask)
  np.testing.assert_allclose(np.exp(shifted), np.exp(log_w), atol=1e-5)
  order = np.roll(np.arange(J), 1)
  permuted = posterior(label[order], prior[order], mask)
  np.testing.assert_allclose(np.exp(permuted), np.exp(log_w[order]), atol=1e-6)
  later = label.copy()
  later[..., 4:] -= np.arange(1, J + 1, dtype=np.float32)[:, None, None]
  np.testing.assert_array_equal(posterior(later, prior, mask)[..., :5], log_w[..., :5])
  same = np.tile(label[:1], (J, 1, 1))
  np.testing.assert_allclose(np.exp(posterior(same, prior, mask))[..., -1], np.exp(log_w[..., 0]),
                             atol=1e-6)  # fmt: skip


def test_a_prior_of_one_expert_is_that_expert():
  _, label, _, mask = draw(0)
  one_hot = np.asarray([0, 1, 0], np.float32)
  np.testing.assert_allclose(mixture(label, one_hot, mask), label[1] * mask, atol=1e-6)
  impossible = label.copy()
  impossible[1, :, 3] = -np.inf  # a token to which the expert gave no probability
  assert not np.isnan(mixture(impossible, None, mask)).any()


def test_next_token_is_a_distribution():
  logp, label, prior, _ = draw(1)
  log_w = posterior(label, prior)[..., 4]
  mixed = hdee.mix_next_token(jnp.asarray(logp[:, :, 4]), log_w)
  np.testing.assert_allclose(np.exp(mixed).sum(-1), 1, rtol=1e-6)
  want = np.einsum("jb,jbv->bv", np.exp(log_w), np.exp(logp[:, :, 4]))
  np.testing.assert_allclose(np.exp(mixed), want, rtol=1e-5)
  with pytest.raises(ValueError, match="pass logits=True"):
    hdee.mix_next_token(jnp.asarray(logp[:, :, 4]) + 1, log_w)
  again = hdee.mix_next_token(jnp.asarray(logp[:, :, 4]) + 1, log_w, logits=True)
  np.testing.assert_allclose(again, mixed, atol=1e-5)


def test_experts_on_an_axis_send_what_the_formula_says():
  experts = 4
  mesh = jax.make_mesh((experts,), ("expert",), devices=jax.devices()[:experts],
                       axis_types=(jax.sharding.AxisType.Auto,))  # fmt: skip
  rng = np.random.default_rng(0)
  label = np.log(rng.random((experts, B, 256))).astype(np.float32)

  @jax.jit
  @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P())
  def sharded(label_1BS):
    return hdee.sharded_mixture_log_prob(label_1BS[0])

  compiled = sharded.lower(label).compile()
  np.testing.assert_allclose(compiled(label), mixture(label), rtol=1e-5, atol=1e-5)
  sent = collective_bytes(compiled, mesh).by_axis["expert"]
  assert sent == hdee.sharded_mixture_bytes(B, 256, experts)


@pytest.mark.parametrize("form", ["ema", "btm", "release"])
def test_forms_of_the_prior(form):
  rng = np.random.default_rng(2)
  logp = np.log(rng.random((J, 6, S)))
  logp[:, 2] = 0.0  # a sequence without any token
  p = np.exp(logp.sum(-1))[:, [0, 1, 3, 4, 5]]
  p = p / p.sum(0)
  if form == "release":
    want = np.ones(J)
    for n in range(1, 6):
      want = 0.4**n * want + p[:, n - 1]
  else:
    i = np.arange(1, 6)
    want = p @ 0.4 ** (i if form == "btm" else 5 - i)
  batches = [logp[:, :4], logp[:, 4:]]
  got = hdee.estimate_prior(batches, num_sequences=5, decay=0.4, form=form)
  np.testing.assert_allclose(got, want / want.sum(), rtol=1e-6)

  constant = np.tile(np.log([[0.5], [0.3], [0.2]]), (1, 40))[..., None]
  got = hdee.estimate_prior([constant], form=form)
  np.testing.assert_allclose(got, [0.5, 0.3, 0.2], rtol=1e-5)


LABEL = np.full((J, B, S), -1.0, np.float32)


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: hdee.mixture_log_prob(LABEL, [0.5, 0.6, 0.1]), "`prior` must be at least 0 and sum"),
    (lambda: hdee.mixture_log_prob(LABEL, [1.5, -0.5, 0]), "`prior` must be at least 0 and sum"),
    (lambda: hdee.mixture_log_prob(LABEL, [0.5, 0.5]), "`prior` must hold a probability for each"),
    (lambda: hdee.mixture_log_prob(LABEL, top_k=4), r"`top_k` must be in \[1, 3\].*got 4"),
    (lambda: hdee.mixture_log_prob(LABEL[0]), "`label_logp` must be a float array of 3 axes"),
    (lambda: hdee.domain_posterior(LABEL, None, LABEL[0, :1]), "`mask` must have the shape"),
    (lambda: hdee.sharded_mixture_log_prob(LABEL[0], "nowhere"), "axis `nowhere` is unbound"),
    (lambda: hdee.estimate_prior([]), "`label_logps` must hold at least one sequence"),
    (lambda: hdee.estimate_prior([LABEL], decay=0.0), r"`decay` must be in \(0, 1\], got 0.0"),
    (lambda: hdee.estimate_prior([LABEL], num_sequences=0), "`num_sequences` must be at least 1"),
    (lambda: hdee.estimate_prior([LABEL], form="last"), "`form` must be one of ema, btm, release"),
  ],
)
def test_bad_input(call, match):
  with pytest.raises(ValueError, match=match):
    call()
