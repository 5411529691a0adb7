"""Llama's config and tensors under their Hugging Face names. Import from `models`."""

from collections.abc import Mapping
from typing import Any

from models._llama_config import LlamaConfig
from models.rope import Llama3RopeScaling

# Leaf: (name of the tensor, its dimensions in the letters of the leaf). "HC" is one dimension, the
# heads one after the other.
OUTER = {
  "embed_VD": ("model.embed_tokens.weight", ("V", "D")),
  "final_norm_D": ("model.norm.weight", ("D",)),
  "head_DV": ("lm_head.weight", ("V", "D")),
}
LAYER = {
  "attn_norm_D": ("input_layernorm.weight", ("D",)),
  "q_DHC": ("self_attn.q_proj.weight", ("HC", "D")),
  "k_DKC": ("self_attn.k_proj.weight", ("KC", "D")),
  "v_DKC": ("self_attn.v_proj.weight", ("KC", "D")),
  "o_HCD": ("self_attn.o_proj.weight", ("D", "HC")),
  "q_bias_HC": ("self_attn.q_proj.bias", ("HC",)),
  "k_bias_KC": ("self_attn.k_proj.bias", ("KC",)),
  "v_bias_KC": ("self_attn.v_proj.bias", ("KC",)),
  "o_bias_D": ("self_attn.o_proj.bias", ("D",)),
  "mlp_norm_D": ("post_attention_layernorm.weight", ("D",)),
  "gate_DF": ("mlp.gate_proj.weight", ("F", "D")),
  "up_DF": ("mlp.up_proj.weight", ("F", "D")),
  "down_FD": ("mlp.down_proj.weight", ("D", "F")),
  "gate_bias_F": ("mlp.gate_proj.bias", ("F",)),
  "up_bias_F": ("mlp.up_proj.bias", ("F",)),
  "down_bias_D": ("mlp.down_proj.bias", ("D",)),
}
LAYER_NAME = "model.layers.{}.{}"
# Computed from the config; old files hold it.
IGNORED = ("self_attn.rotary_emb.inv_freq",)

_SIZES = {
  "vocab_size": "vocab_size",
  "hidden_size": "hidden_size",
  "num_layers": "num_hidden_layers",
  "intermediate_size": "intermediate_size",
  "num_heads": "num_attention_heads",
}
_ROPE_NUMBERS = {
  "factor": "factor",
  "low_freq_factor": "low_freq_factor",
  "high_freq_factor": "high_freq_factor",
  "original_max_position": "original_max_position_embeddings",
}


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
  """The config of a config.json with `model_type` "llama"; absent keys as in transformers.

  Raises:
    ValueError: a size is missing, or something is asked for that this model does not compute.
    NotImplementedError: a kind of RoPE other than plain and "llama3".
  """
  if missing := sorted(name for name in _SIZES.values() if name not in config):
    raise ValueError(f"`path`: config.json lacks {missing}.")
  for name, allowed in _FIXED.items():
    if config.get(name) not in (None, *allowed):
      raise ValueError(f"`path`: `{name}` in config.json must be {allowed}, got {config[name]!r}.")
  theta, scaling = _rope(config)
  stored = config.get("dtype") or config.get("torch_dtype") or "float32"
  return LlamaConfig(
    **{ours: config[theirs] for ours, theirs in _SIZES.items()},
    num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
    head_dim=config.get("head_dim"),
    rope_theta=theta,
    rope_scaling=scaling,
    rms_norm_eps=config.get("rms_norm_eps", 1e-6),
    tie_embeddings=config.get("tie_word_embeddings", False),
    attention_bias=config.get("attention_bias", False),
    mlp_bias=config.get("mlp_bias", False),
    max_seq_len=config.get("max_position_embeddings", 2048),
    dtype="bfloat16" if stored == "bfloat16" else "float32",
  )


_FIXED = {
  "hidden_act": ("silu", "swish"),
  "partial_rotary_factor": (1, 1.0),
  "quantization_config": (),
  "attention_dropout": (0, 0.0),
}


def _rope(config: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
  """(theta, scaling), of `rope_parameters` or of the older `rope_theta` and `rope_scaling`."""
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind == "default":
    return float(theta), None
  if kind != "llama3":
    raise NotImplementedError(
      f"`path`: `rope_type` in config.json must be 'default' or 'llama3', got {kind!r}."
    )
  if missing := sorted(name for name in _ROPE_NUMBERS.values() if name not in rope):
    raise ValueError(f"`path`: the RoPE scaling in config.json lacks {missing}.")
  numbers = {ours: rope[theirs] for ours, theirs in _ROPE_NUMBERS.items()}
  return float(theta), Llama3RopeScaling(**numbers)


def config_to_hf(cfg: LlamaConfig) -> dict[str, Any]:
  """The config.json with which transformers builds the same model."""
  scaling = None
  if cfg.rope_scaling is not None:
    numbers = {name: getattr(cfg.rope_scaling, ours) for ours, name in _ROPE_NUMBERS.items()}
    scaling = {"rope_type": "llama3", **numbers}
  return {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    **{theirs: getattr(cfg, ours) for ours, theirs in _SIZES.items()},
    "num_key_value_heads": cfg.num_kv_heads,
    "head_dim": cfg.head_size,
    "rope_theta": cfg.rope_theta,
    "rope_scaling": scaling,
    "rms_norm_eps": cfg.rms_norm_eps,
    "tie_word_embeddings": cfg.tie_embeddings,
    "attention_bias": cfg.attention_bias,
    "mlp_bias": cfg.mlp_bias,
    "max_position_embeddings": cfg.max_seq_len,
    "torch_dtype": cfg.param_dtype,
  }
