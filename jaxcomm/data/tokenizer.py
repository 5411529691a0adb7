"""Byte-level BPE (Sennrich et al., 2016; on bytes as in Radford et al., 2019), trained locally."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jaxcomm.data._extras import require

if TYPE_CHECKING:
  import tokenizers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE on `documents`; the same input gives the same tokenizer.

  Every text round-trips: the vocabulary starts with `<|endoftext|>` (id 0) and the 256 bytes. It
  has fewer than `vocab_size` entries when the documents hold too few distinct pairs.

  Args:
    documents: texts of the train split only.
    vocab_size: entries wanted, at least 257.

  Raises:
    ValueError: `vocab_size` is below 257 or there is no text.
    ImportError: the extra `train` is missing.

  Example:
    >>> tokenizer = train_tokenizer(["to be or not to be"] * 9, vocab_size=260)
    >>> tokenizer.decode(tokenizer.encode("to bee \\n").ids)
    'to bee \\n'
  """
  check_vocab_size(vocab_size)
  documents = list(documents)
  if not any(documents):
    raise ValueError("`documents` must hold text, got none.")
  tk = require("tokenizers")
  tokenizer = tk.Tokenizer(tk.models.BPE())
  tokenizer.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tk.decoders.ByteLevel()
  trainer = tk.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=sorted(tk.pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(documents, trainer, length=len(documents))
  return _as_plain_text(tokenizer)


def load_tokenizer(path: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """Reads a `tokenizer.json` written by `prepare_text`."""
  return _as_plain_text(require("tokenizers").Tokenizer.from_file(os.fspath(path)))


def check_vocab_size(vocab_size: int) -> None:
  """Raises ValueError unless 256 bytes and `<|endoftext|>` fit into uint32 ids."""
  if not 257 <= vocab_size <= 2**32:
    raise ValueError(
      f"`vocab_size` must be in [257, 2**32] (256 bytes and {END_OF_TEXT}), got {vocab_size}."
    )


def _as_plain_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  # A document may hold the characters "<|endoftext|>"; only we may end a document.
  tokenizer.encode_special_tokens = True
  return tokenizer
