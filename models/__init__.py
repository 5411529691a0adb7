"""Language models: one architecture per file."""

from models import hdee, llama, llama_decode, losses, rope
from models.generation import generate
from models.hugging_face import load_hf, save_hf

__all__ = ["generate", "hdee", "llama", "llama_decode", "load_hf", "losses", "rope", "save_hf"]
