"""Sizes of Llama models: the config and its presets. Import them from `models.llama`."""

import dataclasses
import math
from typing import Literal

from models.rope import Llama3RopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
  """Sizes and policies of a model.

  Raises:
    ValueError: a size is not positive, heads do not divide, or an option is unknown.
  """

  vocab_size: int  # V
  hidden_size: int  # D
  num_layers: int  # L
  intermediate_size: int  # F
  num_heads: int  # H
  num_kv_heads: int  # K, divides H
  head_dim: int | None = None  # C; None: D / H
  rope_theta: float = 500_000.0
  rope_scaling: Llama3RopeScaling | None = None
  rms_norm_eps: float = 1e-5
  tie_embeddings: bool = False  # output matrix is the transposed embedding
  attention_bias: bool = False
  mlp_bias: bool = False
  max_seq_len: int = 8192  # longest sequence `apply` takes, tokens
  dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products and activations
  param_dtype: Literal["bfloat16", "float32"] = "float32"
  attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # auto: a kernel where it applies
  remat: Literal["none", "full", "dots"] = "none"  # what the backward pass recomputes
  # With a mesh axis `tensor`: tokens are cut over it between blocks (arXiv 2205.05198).
  sequence_parallel: bool = False
  scan_layers: bool = True  # False: unrolled, slower to compile

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      number = isinstance(value, int | float) and not isinstance(value, bool)
      if number and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{field.name}` must be positive, got {value}.")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"`num_kv_heads` must divide `num_heads` = {self.num_heads}, got {self.num_kv_heads}."
      )
    if self.head_dim is None and self.hidden_size % self.num_heads:
      raise ValueError(
        f"`num_heads` must divide `hidden_size` = {self.hidden_size} when `head_dim` is None,"
        f" got {self.num_heads}."
      )
    if self.head_size % 2:
      raise ValueError(f"`head_dim` must be even for RoPE, got {self.head_size}.")
    for name, allowed in _OPTIONS.items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")

  @property
  def head_size(self) -> int:
    """Head width C: `head_dim`, or D / H."""
    return self.head_dim or self.hidden_size // self.num_heads


_OPTIONS = {
  "attention": ("auto", "xla", "cudnn", "splash"),
  "dtype": ("bfloat16", "float32"),
  "param_dtype": ("bfloat16", "float32"),
  "remat": ("none", "full", "dots"),
}


def nano() -> LlamaConfig:
  """0.13M parameters, float32: experiments of thousands of steps on a CPU."""
  return LlamaConfig(
    vocab_size=512, hidden_size=64, num_layers=2, intermediate_size=192, num_heads=4,
    num_kv_heads=2, rope_theta=10_000.0, tie_embeddings=True, max_seq_len=2048, dtype="float32",
    scan_layers=False,  # a tenth faster on CPU, and two layers compile as fast
  )  # fmt: skip


def tiny() -> LlamaConfig:
  """1.0M parameters, float32: the default of the examples on two CPU cores."""
  return LlamaConfig(
    vocab_size=2048, hidden_size=128, num_layers=4, intermediate_size=336, num_heads=4,
    num_kv_heads=2, rope_theta=10_000.0, tie_embeddings=True, max_seq_len=2048, dtype="float32",
  )  # fmt: skip


def mini() -> LlamaConfig:
  """5.0M parameters, float32: what `scripts/bench_network.py` sends over slow links."""
  return LlamaConfig(
    vocab_size=2048, hidden_size=256, num_layers=6, intermediate_size=704, num_heads=8,
    num_kv_heads=4, rope_theta=10_000.0, tie_embeddings=True, max_seq_len=2048, dtype="float32",
    scan_layers=False,  # a tenth faster on CPU, and exchanges can overlap the backward pass
  )  # fmt: skip


def small() -> LlamaConfig:
  """0.1B parameters: one accelerator."""
  return LlamaConfig(
    vocab_size=32_000, hidden_size=768, num_layers=12, intermediate_size=2048, num_heads=12,
    num_kv_heads=4, rope_theta=10_000.0, tie_embeddings=True, max_seq_len=4096,
  )  # fmt: skip


def llama3_2_1b() -> LlamaConfig:
  """Llama 3.2 1B."""
  return LlamaConfig(
    vocab_size=128_256, hidden_size=2048, num_layers=16, intermediate_size=8192, num_heads=32,
    num_kv_heads=8, tie_embeddings=True, max_seq_len=131_072,
    rope_scaling=Llama3RopeScaling(factor=32.0),
  )  # fmt: skip


def llama3_2_3b() -> LlamaConfig:
  """Llama 3.2 3B."""
  return LlamaConfig(
    vocab_size=128_256, hidden_size=3072, num_layers=28, intermediate_size=8192, num_heads=24,
    num_kv_heads=8, tie_embeddings=True, max_seq_len=131_072,
    rope_scaling=Llama3RopeScaling(factor=32.0),
  )  # fmt: skip


def llama3_8b() -> LlamaConfig:
  """Llama 3.1 8B."""
  return LlamaConfig(
    vocab_size=128_256, hidden_size=4096, num_layers=32, intermediate_size=14_336, num_heads=32,
    num_kv_heads=8, max_seq_len=131_072, rope_scaling=Llama3RopeScaling(factor=8.0),
  )  # fmt: skip


def llama3_70b() -> LlamaConfig:
  """Llama 3.1 70B."""
  return LlamaConfig(
    vocab_size=128_256, hidden_size=8192, num_layers=80, intermediate_size=28_672, num_heads=64,
    num_kv_heads=8, max_seq_len=131_072, rope_scaling=Llama3RopeScaling(factor=8.0),
  )  # fmt: skip


def llama3_405b() -> LlamaConfig:
  """Llama 3.1 405B."""
  return LlamaConfig(
    vocab_size=128_256, hidden_size=16_384, num_layers=126, intermediate_size=53_248,
    num_heads=128, num_kv_heads=8, max_seq_len=131_072,
    rope_scaling=Llama3RopeScaling(factor=8.0),
  )  # fmt: skip
