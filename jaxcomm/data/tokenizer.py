"""Byte-level BPE (Sennrich et al., 2016; on bytes as in Radford et al., 2019), trained locally.

Or any `tokenizer.json` of the Hugging Face library `tokenizers`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxcomm.data._extras import require
from jaxcomm.data._files import decode_text, read_file

if TYPE_CHECKING:
  import tokenizers

END_OF_TEXT = "<|endoftext|>"

# Of GPT-2 and most others, Llama 3, Llama 2 and Mistral, Gemma, DeepSeek; then plain ones.
_END_NAMES = (
  *(END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>"),
  *("<\uff5cend\u2581of\u2581sentence\uff5c>", "[EOS]", "[eos]", "<EOS>"),
)


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
  """Reads a `tokenizer.json`: the Hugging Face file of a model, or one of `prepare_text`.

  It then neither pads nor cuts, and the names of special tokens in a text are plain text.

  Raises:
    FileNotFoundError, IsADirectoryError: `path` is no file.
    ValueError: the file is no tokenizer.
    ImportError: the extra `train` is missing.
  """
  text = decode_text(read_file(Path(path)), path)
  tk = require("tokenizers")
  try:
    tokenizer = tk.Tokenizer.from_str(text)
  except Exception as e:  # the library raises nothing narrower
    raise ValueError(f"`{path}` is not a tokenizer.json: {e}.") from e
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return _as_plain_text(tokenizer)


def find_end_of_text(path: str | os.PathLike[str]) -> int:
  """The id that ends a document for the tokenizer in `path`.

  It is that of `eos_token` in the `tokenizer_config.json` beside it; without one, the first of the
  usual names in the vocabulary: `<|endoftext|>`, `<|end_of_text|>`, `</s>`, `<eos>` and others.

  Raises:
    ValueError: there is none.
  """
  tokenizer = load_tokenizer(path)
  config = Path(path).with_name("tokenizer_config.json")
  if (name := _eos_token(config)) is not None:
    if (found := tokenizer.token_to_id(name)) is not None:
      return found
    raise ValueError(f"`eos_token` {name!r} of `{config}` is not in the vocabulary of `{path}`.")
  for name in _END_NAMES:
    if (found := tokenizer.token_to_id(name)) is not None:
      return found
  raise ValueError(
    f"`tokenizer` `{path}` must have an end-of-text token, found none of {', '.join(_END_NAMES)}:"
    f' name it in a file `{config.name}` beside it, as {{"eos_token": "..."}}.'
  )


def num_token_ids(tokenizer: tokenizers.Tokenizer) -> int:
  """Rows that an embedding needs: the largest id plus one; a vocabulary may have holes."""
  return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _eos_token(config: Path) -> str | None:
  if not config.exists():
    return None
  try:
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
  except (ValueError, AttributeError) as e:
    raise ValueError(f"`{config}` is not a JSON object: {e}.") from e
  return token.get("content") if isinstance(token, dict) else token


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
