"""Language models: one architecture per file."""

from models import (
  hdee,
  ladder,
  ladder_decode,
  llama,
  llama_decode,
  llama_pipeline,
  losses,
  rope,
)
from models.generation import generate
from models.hugging_face import load_hf, load_hf_config, save_hf

__all__ = [
  "generate",
  "hdee",
  "ladder",
  "ladder_decode",
  "llama",
  "llama_decode",
  "llama_pipeline",
  "load_hf",
  "load_hf_config",
  "losses",
  "rope",
  "save_hf",
]
