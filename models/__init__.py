"""Language models: one architecture per file."""

from models import llama, llama_decode, losses, rope
from models.generation import generate
from models.hugging_face import load_hf, save_hf

__all__ = ["generate", "llama", "llama_decode", "load_hf", "losses", "rope", "save_hf"]
