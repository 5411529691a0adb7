"""Text data: corpora, tokenizer, packing and a deterministic, resumable pipeline."""

from jaxcomm.data.corpus import Corpus as Corpus
from jaxcomm.data.corpus import Document as Document
from jaxcomm.data.corpus import load_corpus as load_corpus
from jaxcomm.data.pipeline import batches as batches
from jaxcomm.data.pipeline import check_token_ids as check_token_ids
from jaxcomm.data.pipeline import eval_batches as eval_batches
from jaxcomm.data.pipeline import load_text as load_text
from jaxcomm.data.pipeline import pack as pack
from jaxcomm.data.text import TextCorpus as TextCorpus
from jaxcomm.data.text import prepare_text as prepare_text
from jaxcomm.data.tokenizer import load_tokenizer as load_tokenizer
from jaxcomm.data.tokenizer import train_tokenizer as train_tokenizer

__all__ = [
  "Corpus",
  "Document",
  "TextCorpus",
  "batches",
  "check_token_ids",
  "eval_batches",
  "load_corpus",
  "load_text",
  "load_tokenizer",
  "pack",
  "prepare_text",
  "train_tokenizer",
]
