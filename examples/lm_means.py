"""The mean over replicas that the flags of `train_lm.py` ask for."""

from typing import TYPE_CHECKING, Any

import optax

import jaxcomm
from jaxcomm import compressors

if TYPE_CHECKING:
  from lm_methods import MethodConfig

SPARSE = ("rand_k", "top_k")


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
  if config.rounding != "nearest" and name not in ("int8", "int4", "fp8", "e3m0"):
    raise ValueError(f"`rounding` has no effect on compressor {name!r}, got {config.rounding!r}.")


def build_compressor(config: "MethodConfig") -> compressors.Compressor:
  """The compressor that the flags name."""
  name, rounding = config.compressor_name, config.rounding
  if name in ("int8", "int4", "e3m0", "fp8"):
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
