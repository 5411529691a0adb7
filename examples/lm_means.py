"""The mean over replicas that the flags of `train_lm.py` ask for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optax

import jaxcomm
from jaxcomm import compressors
from jaxcomm.collectives import tree_compressed_pmean
from models import llama
from parallel import average_gradient, mean_in_backward

if TYPE_CHECKING:
  from lm_methods import MethodConfig

SPARSE = ("rand_k", "top_k")
BLOCKS = ("int8", "int4", "fp8", "e3m0")
# Elements per message within the backward pass. A thread of XLA on CPU that waits for a message
# holds up what it has queued, so several small ones go on while one large one would not.
OVERLAP_BUCKET = 2**17


def check_compressor(config: "MethodConfig", *, takes: bool) -> None:
  """Raises ValueError where a compressor has no effect, or is missing.

  Args:
    config: the flags.
    takes: whether the method has a mean to compress.
  """
  name = config.compressor_name
  if config.compressor not in ("auto", "none") and not takes:
    raise ValueError(
      f"`compressor` has no effect with method {config.method!r}, got {config.compressor!r}."
    )
  if config.compressor not in ("auto", "none") and config.replicas == 1:
    raise ValueError(
      f"`compressor` acts between replicas, of which there is one, got {config.compressor!r}."
    )
  if config.method == "ef21" and name == "none":
    raise ValueError("`compressor` must not be 'none' with method 'ef21'.")
  if config.error_feedback and (name == "none" or config.method == "ef21"):
    raise ValueError(
      "`error_feedback` needs a `compressor`, and another method than ef21, got compressor"
      f" {name!r} and method {config.method!r}."
    )
  if config.rounding != "nearest" and name not in BLOCKS:
    raise ValueError(f"`rounding` has no effect on compressor {name!r}, got {config.rounding!r}.")


def check_overlap(config: "MethodConfig") -> None:
  """Raises ValueError where gradients cannot be averaged within the backward pass."""
  if not config.overlap or config.method != "ddp":
    return
  if config.compressor_name not in ("none", *BLOCKS):
    raise ValueError(
      f"`overlap` needs a `compressor` of {('none', *BLOCKS)}, got {config.compressor_name!r}."
    )
  if config.error_feedback or config.rounding != "nearest":
    raise ValueError(
      "`overlap` keeps no state: it needs `rounding` 'nearest' and no `error_feedback`, got"
      f" {config.rounding!r} and {config.error_feedback}."
    )
  for name in ("fsdp", "stages", "tensor", "seq_shards"):
    if (value := getattr(config, name)) != 1:
      raise ValueError(f"`{name}` must be 1 with `overlap`, got {value}.")


def averaging_loss(
  config: "MethodConfig", loss: Callable[..., Any], model: llama.LlamaConfig
) -> Callable[..., Any]:
  """`loss(params, batch)` whose gradient is averaged layer by layer, for `--overlap`."""

  def mean(tree):
    if config.compressor_name == "none":
      return jaxcomm.pmean_over("replica").update(tree, optax.EmptyState())[0]
    compressor = build_compressor(config)
    return tree_compressed_pmean(tree, "replica", compressor, bucket_size=OVERLAP_BUCKET)

  shared = ("embed_VD",) if model.tie_embeddings else ()
  partition = mean_in_backward(mean, skip=shared)

  def averaged(params, batch):
    held = {name: average_gradient(params[name], mean) for name in shared}
    return loss(params | held, batch, partition=partition)

  return averaged


def build_compressor(config: "MethodConfig") -> compressors.Compressor:
  """The compressor that the flags name."""
  name, rounding = config.compressor_name, config.rounding
  if name in BLOCKS:
    return getattr(compressors, name)(rounding=rounding)
  if name == "top_k":
    return compressors.top_k(ratio=config.keep_ratio)
  if name == "rand_k":  # feedback needs a contractive compressor
    feedback = config.error_feedback or config.method == "ef21"
    return compressors.rand_k(ratio=config.keep_ratio, scaled=not feedback)
  if name == "sign":
    return compressors.scaled_sign()
  if name == "qsgd":
    return compressors.qsgd(levels=15)
  return compressors.natural()


def build_mean(config: "MethodConfig", specs: Any) -> optax.GradientTransformation:
  """The mean over `replica` that the flags ask for."""
  if config.compressor_name == "none":
    return jaxcomm.pmean_over("replica")
  return jaxcomm.compressed_mean(
    "replica",
    build_compressor(config),
    error_feedback=config.error_feedback,
    # A second rounding of a sparse mean would drop most of what the replicas sent.
    algorithm="all_gather" if config.compressor_name in SPARSE else "two_hop",
    specs=specs,
    seed=config.seed,
  )
