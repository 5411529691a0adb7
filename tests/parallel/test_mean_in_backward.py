"""Gradients averaged within the backward pass, against those averaged after it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcomm.collectives import tree_compressed_pmean, tree_compressed_pmean_bytes
from jaxcomm.compressors import int8
from jaxcomm.inspect import collective_bytes
from jaxcomm.training import make_train_step
from models import llama
from parallel import average_gradient, mean_in_backward

TIED = ("embed_VD",)


def exact(tree):
  return jax.tree.map(lambda g: jax.lax.pmean(g, "replica"), tree)


def rounded(tree):
  return tree_compressed_pmean(tree, "replica", int8())


def config(**changes):
  return dataclasses.replace(llama.nano(), **changes)


def step(cfg, mean, *, within: bool, replicas: int = 4, stacked: bool = False):
  """A step of SGD whose mean is taken within the backward pass, or after it."""
  partition = mean_in_backward(mean, skip=TIED)

  def loss(params, batch):
    if not within:
      return llama.loss(params, batch, cfg)
    params = params | {"embed_VD": average_gradient(params["embed_VD"], mean)}
    return llama.loss(params, batch, cfg, partition=partition)

  after = optax.stateless(lambda g, _: mean(g))
  mesh = jax.make_mesh(
    (1 if stacked else replicas,),
    ("replica",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[: 1 if stacked else replicas],
  )
  return make_train_step(
    loss,
    lambda key: llama.init(key, cfg),
    optax.sgd(1.0) if within else optax.chain(after, optax.sgd(1.0)),
    mesh,
    num_replicas=replicas,
    mean_in_loss=within,
    eval_loss_fn=functools.partial(llama.loss, cfg=cfg),
  )


def batch(train_step, rows=4, length=8):
  ids = np.random.default_rng(0).integers(0, 512, (rows, length + 1), np.int32)
  rows = {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
  return jax.device_put(rows, train_step.batch_sharding)


def advanced(train_step):
  state, metrics = train_step.step(train_step.init(jax.random.key(0)), batch(train_step))
  return jax.device_get(state.params), metrics["loss"]


@pytest.mark.parametrize("scanned", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_mean_is_that_of_the_finished_gradient(scanned):
  cfg = config(scan_layers=scanned)
  params, losses = advanced(step(cfg, exact, within=True))
  expected, expected_losses = advanced(step(cfg, exact, within=False))
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, expected)


@pytest.mark.slow
def test_stacked_replicas_train_like_devices():
  cfg = config(scan_layers=False)
  params, _ = advanced(step(cfg, exact, within=True))
  stacked, _ = advanced(step(cfg, exact, within=True, stacked=True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, stacked)


def products_before_the_first_exchange(text: str) -> float:
  """Share of the matrix products of a scheduled program that stand before its first exchange."""
  lines = text[text.index("\nENTRY") :].splitlines()
  exchanges = [i for i, line in enumerate(lines) if re.search(r" = .*all-to-all\(", line)]
  products = [i for i, line in enumerate(lines) if re.search(r" = .*(ynn_fusion| dot\()", line)]
  return sum(i < exchanges[0] for i in products) / len(products)


@pytest.mark.slow
def test_an_exchange_starts_before_the_backward_pass_ends_and_its_bytes_are_those_of_the_parts():
  cfg = config(scan_layers=False, num_layers=3)
  within, after = (step(cfg, rounded, within=w) for w in (True, False))
  programs = [s.compile(jax.eval_shape(lambda s=s: batch(s))) for s in (within, after)]
  early, late = (products_before_the_first_exchange(p.as_text()) for p in programs)
  assert late == 1.0
  assert early < 0.6  # the forward pass is a third
  shapes = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
  layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes["layers"])
  parts = [shapes["embed_VD"], {"final_norm_D": shapes["final_norm_D"]}, *[layer] * 3]
  sent = sum(tree_compressed_pmean_bytes(part, 4, int8()) for part in parts)
  assert collective_bytes(programs[0], within.layout.mesh).total == pytest.approx(sent)


def test_bad_input():
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    average_gradient(jnp.ones(2), exact)
  part = mean_in_backward(exact, skip=("w",))(lambda weights, x: x)
  with pytest.raises(ValueError, match="`skip` names keys of a dict of weights, got tuple"):
    jax.vmap(lambda x: part((x,), x), axis_name="replica")(jnp.ones(2))
