"""Language models: one architecture per file."""

from models import llama, losses, rope

__all__ = ["llama", "losses", "rope"]
