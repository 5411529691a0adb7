"""Ensembles of bigram tables, whose mixtures can be written down, and of Llama models."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.training import make_train_step
from models import generate, hdee, llama

V = 6


def bigram(params, tokens, **_):
  return params[tokens]


def decode(params, tokens, cache):
  return params[tokens], cache


def expert(name, seed, vocab=V, **more):
  params = np.random.default_rng(seed).normal(0, 2, (vocab, vocab)).astype(np.float32)
  functions = {"init_cache_fn": lambda *_: (), "decode_fn": decode} | more
  return hdee.ExpertSpec(
    name=name, domain=name, apply_fn=bigram, params=jnp.asarray(params), **functions
  )


EXPERTS = [expert("a", 0), expert("b", 1), expert("c", 2)]


def make_batch(seed=0, masked=True):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (4, 8)).astype(np.int32)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
  if masked:
    batch["loss_mask"] = (rng.random((4, 7)) < 0.8).astype(np.float32)
    batch["loss_mask"][1] = 0
  return batch


def test_one_expert_and_equal_experts_are_that_expert():
  batch, one = make_batch(), hdee.EnsembleLM(EXPERTS[:1])
  alone = one.label_log_probs(batch)[0]
  np.testing.assert_array_equal(one.log_prob(batch), alone)
  twins = [EXPERTS[0], dataclasses.replace(EXPERTS[0], name="twin")]
  for mixing in ("posterior", "average", "geometric"):
    got = hdee.EnsembleLM(twins, mixing=mixing).log_prob(batch)
    np.testing.assert_allclose(got, alone, atol=1e-6)


@pytest.mark.parametrize("mixing", ["posterior", "average", "geometric"])
def test_every_rule_is_a_distribution(mixing):
  batch = make_batch(masked=False)
  ensemble = hdee.EnsembleLM(EXPERTS, mixing=mixing)
  last = []
  for v in range(V):  # the last target only, which no weight depends on
    targets = batch["targets"].copy()
    targets[:, -1] = v
    last.append(ensemble.log_prob(batch | {"targets": targets})[:, -1])
  np.testing.assert_allclose(np.exp(last).sum(0), 1, rtol=1e-5)
  if mixing == "geometric":  # not normalised it is below the arithmetic mean everywhere
    logp = ensemble.label_log_probs(batch)
    arithmetic = hdee.EnsembleLM(EXPERTS, mixing="average").log_prob(batch)
    assert (logp.mean(0) <= arithmetic + 1e-6).all()
    assert (logp.mean(0) <= ensemble.log_prob(batch) + 1e-6).all()


def test_perplexity_counts_what_is_not_masked():
  batches = [make_batch(0), make_batch(1)]
  ensemble = hdee.EnsembleLM(EXPERTS, prior=[0.2, 0.3, 0.5])
  got = ensemble.perplexity(batches)
  total = sum(float(np.asarray(ensemble.log_prob(b), np.float64).sum()) for b in batches)
  tokens = sum(int(b["loss_mask"].sum()) for b in batches)
  assert got["loss"] == pytest.approx(-total / tokens)
  assert got["perplexity"] == pytest.approx(np.exp(-total / tokens))
  assert (got["tokens"], got["sequences"], got["empty_sequences"]) == (tokens, 6, 2)


def test_the_prior_comes_from_other_batches():
  ensemble, scored, held_out = hdee.EnsembleLM(EXPERTS), [make_batch(0)], [make_batch(1)]
  prior = hdee.estimate_prior(map(ensemble.label_log_probs, held_out))
  want = ensemble.with_prior(prior).perplexity(scored)
  assert ensemble.perplexity(scored, held_out) == want != ensemble.perplexity(scored)
  with pytest.raises(ValueError, match="`prior_batches` must not be `batches`"):
    ensemble.perplexity(scored, scored)


def test_experts_on_devices_of_their_own():
  placed = [
    dataclasses.replace(e, params=jax.device_put(e.params, d))
    for e, d in zip(EXPERTS, jax.devices()[1:])
  ]
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[4:6], axis_types=auto)
  sharded = jax.device_put(EXPERTS[2].params, jax.NamedSharding(mesh, jax.P(None, "fsdp")))
  placed[2] = dataclasses.replace(placed[2], params=sharded)
  batch = make_batch()
  got = hdee.EnsembleLM(placed).log_prob(batch)
  np.testing.assert_allclose(got, hdee.EnsembleLM(EXPERTS).log_prob(batch), atol=1e-6)
  assert len(got.devices()) == 1


@pytest.mark.parametrize("top_k", [None, 1])
def test_generation_follows_the_posterior(top_k):
  """The likeliest token of the mixture whose weights know the prompt and what was generated."""
  prior = np.asarray([0.1, 0.3, 0.6])
  ensemble = hdee.EnsembleLM(EXPERTS, prior=prior, top_k=top_k)
  prompt = np.asarray([[1, 4, 2], [5, 0, 0]])
  got = ensemble.generate(prompt, 6, jax.random.key(0), temperature=0.0)
  p_JVV = np.asarray(jax.nn.softmax(jnp.stack([e.params for e in EXPERTS])), np.float64)
  for row, start in zip(got, prompt):
    np.testing.assert_array_equal(row[:3], start)
    w = prior
    for t in range(1, 9):
      if t >= 3:
        kept = np.where(w == w.max(), w, 0) if top_k else w
        assert row[t] == (kept @ p_JVV[:, row[t - 1]]).argmax()
      w = w * p_JVV[:, row[t - 1], row[t]]


@pytest.mark.slow
def test_generation_draws_from_the_mixture():
  ensemble = hdee.EnsembleLM(EXPERTS, mixing="average")
  prompt = np.full((4000, 1), 3)
  drawn = ensemble.generate(prompt, 1, jax.random.key(1))[:, 1]
  p = np.asarray(jnp.stack([jax.nn.softmax(e.params[3]) for e in EXPERTS]).mean(0))
  share = np.bincount(drawn, minlength=V) / 4000
  assert (np.abs(share - p) < 5 * np.sqrt(p / 4000)).all()  # five standard deviations


@pytest.mark.slow
def test_a_llama_expert_generates_what_the_model_does():
  cfg = dataclasses.replace(llama.nano(), num_layers=1, vocab_size=32)
  params = jax.jit(llama.init, static_argnums=1)(jax.random.key(0), cfg)
  one = hdee.llama_expert("one", "x", params, cfg, seq_len=8)
  prompt = np.arange(10).reshape(2, 5)
  got = hdee.EnsembleLM([one]).generate(prompt, 6, jax.random.key(0), temperature=0.0)
  want = generate(params, prompt.tolist(), cfg, max_new_tokens=6)
  np.testing.assert_array_equal(got[:, 5:], want)
  tokens = got[:, :-1]
  label = hdee.EnsembleLM([one]).label_log_probs({"tokens": tokens, "targets": got[:, 1:]})
  logits = jax.jit(llama.apply, static_argnums=2)(params, tokens, cfg)[0]
  want = -optax.softmax_cross_entropy_with_integer_labels(logits, got[:, 1:])
  np.testing.assert_allclose(label[0], want, atol=1e-5)


def test_a_branch_starts_from_its_parent():
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))

  def loss(p, batch):
    return jnp.mean((p["w"] - batch["x"]) ** 2), {}

  for tx in (optax.adam(0.1), optax.chain(optax.trace(0.9), optax.scale(-0.1))):
    step = make_train_step(loss, lambda key: {"w": jnp.zeros(3)}, tx, mesh, num_replicas=2)
    parent = {"w": jnp.arange(3.0)}
    state = hdee.branch(step, parent).init(jax.random.key(0))
    np.testing.assert_array_equal(state.params["w"], np.tile(np.arange(3.0), (2, 1)))
    assert int(state.step) == 0
  with pytest.raises(ValueError, match="branches keep their size"):
    hdee.branch(step, {"w": jnp.zeros(4)})


def test_experts_of_one_size_merge_and_stack():
  trees = [{"w": e.params} for e in EXPERTS]
  merged = hdee.merge_average(trees, [1, 0, 3])["w"]
  np.testing.assert_allclose(merged, 0.25 * trees[0]["w"] + 0.75 * trees[2]["w"], rtol=1e-6)
  np.testing.assert_array_equal(hdee.stack_experts(trees)["w"][1], trees[1]["w"])


def tree(size):
  return {"w": jnp.zeros(size)}


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: hdee.EnsembleLM([]), "`experts` must hold at least one expert, got none"),
    (lambda: hdee.EnsembleLM([EXPERTS[0]] * 2), r"`experts` must have names that differ.*'a', 'a'"),
    (
      lambda: hdee.EnsembleLM([EXPERTS[0], expert("big", 0, vocab=9)]),
      "one vocabulary, got sizes {'a': 6, 'big': 9}",
    ),
    (
      lambda: hdee.EnsembleLM([EXPERTS[0], expert("other", 0, tokenizer="x")]),
      r"one tokenizer, got \['None', 'x'\]",
    ),
    (lambda: hdee.EnsembleLM(EXPERTS, top_k=4), r"`top_k` must be in \[1, 3\].*got 4"),
    (lambda: hdee.EnsembleLM(EXPERTS, mixing="average", top_k=2), "`prior` and `top_k` have no"),
    (lambda: hdee.EnsembleLM(EXPERTS, mixing="sum"), "`mixing` must be one of posterior, average"),
    (lambda: hdee.EnsembleLM(EXPERTS).perplexity([]), "`batches` must hold at least one token"),
    (lambda: generate_with(prompt=[[9]]), r"`prompt` must be in \[0, 6\)"),
    (lambda: generate_with(prompt=[[]]), "`prompt` must be integers"),
    (lambda: generate_with(temperature=-1.0), "`temperature` must be finite and at least 0"),
    (lambda: generate_with(num_tokens=0), "`num_tokens` must be at least 1, got 0"),
    (
      lambda: generate_with(experts=[expert("plain", 0, decode_fn=None)]),
      r"`experts` must have a `decode_fn` to generate, \['plain'\] have none",
    ),
    (lambda: hdee.merge_average([tree(2), tree(3)]), "mix the predictions of unequal experts with"),
    (lambda: hdee.merge_average([]), "`params_list` must hold at least one expert"),
    (lambda: hdee.merge_average([tree(2)], [0.0]), "`weights` must be a number >= 0 for each"),
    (lambda: hdee.stack_experts([tree(2), tree(3)]), "must be of models of one size"),
  ],
)
def test_bad_input(call, match):
  with pytest.raises(ValueError, match=match):
    call()


def generate_with(experts=EXPERTS, prompt=((1,),), num_tokens=1, temperature=1.0):
  prompt = np.asarray(prompt, np.int32)
  key = jax.random.key(0)
  return hdee.EnsembleLM(experts).generate(prompt, num_tokens, key, temperature=temperature)
