"""Data: text corpora, images and graphs; fetching, tokenizing, packing, exact resume."""

from jaxcomm.data._fetch import fetch as fetch
from jaxcomm.data.corpus import load_corpus as load_corpus
from jaxcomm.data.documents import Corpus as Corpus
from jaxcomm.data.documents import Document as Document
from jaxcomm.data.graph import Graph as Graph
from jaxcomm.data.graph import load_graph as load_graph
from jaxcomm.data.images import Images as Images
from jaxcomm.data.images import load_images as load_images
from jaxcomm.data.images import read_idx as read_idx
from jaxcomm.data.pipeline import batches as batches
from jaxcomm.data.pipeline import check_token_ids as check_token_ids
from jaxcomm.data.pipeline import eval_batches as eval_batches
from jaxcomm.data.pipeline import load_text as load_text
from jaxcomm.data.pipeline import mix as mix
from jaxcomm.data.pipeline import pack as pack
from jaxcomm.data.text import TextCorpus as TextCorpus
from jaxcomm.data.text import prepare_mixture as prepare_mixture
from jaxcomm.data.text import prepare_text as prepare_text
from jaxcomm.data.text import provenance as provenance
from jaxcomm.data.tokenizer import find_end_of_text as find_end_of_text
from jaxcomm.data.tokenizer import load_tokenizer as load_tokenizer
from jaxcomm.data.tokenizer import train_tokenizer as train_tokenizer

__all__ = [
  "Corpus",
  "Document",
  "Graph",
  "Images",
  "TextCorpus",
  "batches",
  "check_token_ids",
  "eval_batches",
  "fetch",
  "find_end_of_text",
  "load_corpus",
  "load_graph",
  "load_images",
  "load_text",
  "load_tokenizer",
  "mix",
  "pack",
  "prepare_mixture",
  "prepare_text",
  "provenance",
  "read_idx",
  "train_tokenizer",
]
