"""From tokens on disk to batches: packing, global shuffle, the rows of one process, resume.

Letters: S sequence length, B rows of the batch that this process reads.

Nothing crosses the wire here: each process reads its own rows of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcomm.data._extras import require
from jaxcomm.data.text import TextCorpus

if TYPE_CHECKING:
  import grain

_ENDLESS = 2**40  # batches; grain counts in int64 and rounds in float64


class PackedSource:
  """Windows of the stream of documents, by index; see `pack`."""

  def __init__(self, tokens: np.ndarray, seq_len: int, eot_id: int):
    self._tokens, self._seq_len, self._eot_id = tokens, seq_len, eot_id

  def __len__(self) -> int:
    return (len(self._tokens) - 1) // self._seq_len

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    start = int(index) * self._seq_len
    return pack(self._tokens[start : start + self._seq_len + 1], self._eot_id)


def pack(window: np.ndarray, eot_id: int) -> dict[str, np.ndarray]:
  """One packed sequence from S + 1 consecutive tokens.

  Args:
    window: integer[S + 1]; documents lie end to end, each closed by `eot_id`.
    eot_id: id of `<|endoftext|>`.

  Returns:
    `tokens` int32[S]; `targets` int32[S], the next tokens; `segment_ids` int32[S], from 1, the
    next number after each `eot_id`; `positions` int32[S], from 0 in each segment; `loss_mask`
    float32[S], 0 where the input is `eot_id`: its target opens another document.

  Example:
    >>> packed = pack(np.array([5, 6, 0, 7, 8]), eot_id=0)
    >>> for name, value in packed.items():
    ...   print(name, value)
    tokens [5 6 0 7]
    targets [6 0 7 8]
    segment_ids [1 1 1 2]
    positions [0 1 2 0]
    loss_mask [1. 1. 0. 1.]
  """
  window = window.astype(np.int32)
  tokens = window[:-1]
  ends = tokens == eot_id
  index = np.arange(len(tokens), dtype=np.int32)
  starts = np.concatenate([[False], ends[:-1]])
  return {
    "tokens": tokens,
    "targets": window[1:],
    "segment_ids": 1 + np.cumsum(starts, dtype=np.int32),
    "positions": index - np.maximum.accumulate(np.where(starts, index, 0)),
    "loss_mask": (~ends).astype(np.float32),
  }


def load_text(corpus: TextCorpus, *, split: str, seq_len: int) -> grain.MapDataset:
  """The packed sequences of `split`, in the order of its documents.

  Sequence i holds tokens `[i * seq_len, (i + 1) * seq_len]` of the split; neighbours share one
  token (the last target is the next input) and the incomplete last window is dropped.

  Args:
    corpus: from `prepare_text`.
    split: "train", "validation" or "test".
    seq_len: S, tokens per sequence.

  Returns:
    A `grain.MapDataset` of dicts of arrays, see `pack`.

  Raises:
    ValueError: `split` is unknown, `seq_len` is below 1, or the split has too few tokens for one
      sequence.
    ImportError: the extra `train` is missing.
  """
  grain = require("grain")
  if seq_len < 1:
    raise ValueError(f"`seq_len` must be at least 1, got {seq_len}.")
  tokens = corpus.tokens(split)
  if len(tokens) < seq_len + 1:
    raise ValueError(
      f"`split` {split!r} must hold at least `seq_len` + 1 = {seq_len + 1} tokens,"
      f" got {len(tokens)} in {corpus.meta['source']}: give more data or a smaller `seq_len`."
    )
  return grain.MapDataset.source(PackedSource(tokens, seq_len, corpus.eot_id))


def mix(datasets: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
  """Takes elements of `datasets` in turn, in the shares of `weights`, each in its own order.

  It ends where the first of them does, so no element comes twice. The order is fixed: after any
  number of elements, each share is right within one element per dataset.

  Args:
    datasets: at least one.
    weights: a positive number for each, in any unit; grain rounds them to 1 % of the smallest.

  Raises:
    ValueError: the numbers differ, or a weight is not positive and finite.

  Example:
    >>> import grain
    >>> a, b = grain.MapDataset.range(0, 9), grain.MapDataset.range(100, 109)
    >>> list(mix([a, b], [2, 1]))[:6]
    [0, 1, 100, 2, 3, 101]
  """
  if len(weights) != len(datasets) or not all(0 < w < math.inf for w in weights):
    raise ValueError(
      f"`weights` must be a positive finite number for each of {len(datasets)} datasets,"
      f" got {list(weights)}."
    )
  if len(datasets) == 1:
    return datasets[0]
  return require("grain").MapDataset.mix(list(datasets), list(weights))


def batches(
  dataset: grain.MapDataset | list[grain.MapDataset],
  *,
  batch_size: int,
  seed: int,
  weights: Sequence[float] | None = None,
  shuffle: bool = True,
  row_start: int = 0,
  row_count: int | None = None,
  repeat: bool = True,
) -> grain.DatasetIterator:
  """Iterates over this process's rows of the global batches.

  The global order is a shuffle by (`seed`, epoch), epoch after epoch; global batch s takes places
  `[s * batch_size, (s + 1) * batch_size)` of it, so a batch may straddle two epochs and no sample
  is lost or repeated within one. The order does not depend on who reads which rows: the rows of
  all processes, put together, are the same global batch for any number of processes.

  A mixture of several datasets takes from each in turn (see `mix`), and each has epochs of its own:
  a small one with a large weight comes around more often.

  Args:
    dataset: one sequence per element, e.g. from `load_text`; or a list of such datasets.
    batch_size: rows of the global batch.
    seed: of the shuffle, in [0, 2**32).
    weights: shares of the datasets in a list, positive, in any unit.
    shuffle: False keeps the order of `dataset`.
    row_start: first row that this process reads.
    row_count: B, number of rows that it reads; default: all from `row_start`.
    repeat: False stops after the last whole batch of one epoch; of a mixture, of the epoch that
      ends first.

  Returns:
    A `grain.DatasetIterator` of batches (a leading axis B on every array), read ahead by a thread.
    `get_state()` gives a small JSON-able dict, the same on every process; `set_state()` continues
    from it exactly, also in another process or with other rows.

  Raises:
    ValueError: `batch_size` exceeds the dataset, rows lie outside the batch, or `weights` do not
      fit the datasets.
  """
  datasets = dataset if isinstance(dataset, list) else [dataset]
  if isinstance(dataset, list) != (weights is not None):
    raise ValueError(f"`weights` must be given for a list of datasets, only then, got {weights}.")
  row_count = _check_rows(sum(map(len, datasets)), batch_size, row_start, row_count)
  if not 0 <= seed < 2**32:
    raise ValueError(f"`seed` must be in [0, 2**32), got {seed}.")
  if shuffle:
    datasets = [d.shuffle((seed + i) % 2**32) for i, d in enumerate(datasets)]
  if repeat:
    datasets = [d.repeat() for d in datasets]
  stream = datasets[0] if weights is None else mix(datasets, weights)
  num_batches = _ENDLESS if repeat else len(stream) // batch_size
  return iter(_rows(stream, num_batches, batch_size, row_start, row_count))


def eval_batches(
  dataset: grain.MapDataset,
  batch_size: int,
  num_batches: int | None = None,
  *,
  row_start: int = 0,
  row_count: int | None = None,
) -> grain.IterDataset:
  """The first `num_batches` whole batches of `dataset`, in order, all of one shape.

  Args:
    dataset: one sequence per element.
    batch_size: rows of the global batch.
    num_batches: default: as many whole batches as there are.
    row_start: first row that this process reads.
    row_count: number of rows that it reads; default: all from `row_start`.

  Returns:
    A `grain.IterDataset` of `num_batches` batches; every iteration starts from the first.

  Raises:
    ValueError: the dataset has fewer batches, or rows lie outside the batch.
  """
  row_count = _check_rows(len(dataset), batch_size, row_start, row_count)
  available = len(dataset) // batch_size
  num_batches = available if num_batches is None else num_batches
  if not 1 <= num_batches <= available:
    raise ValueError(
      f"`num_batches` must be in [1, {available}] ({len(dataset)} sequences, `batch_size`"
      f" {batch_size}), got {num_batches}."
    )
  return _rows(dataset, num_batches, batch_size, row_start, row_count)


def check_token_ids(tokens: Any, vocab_size: int) -> None:
  """Raises ValueError where a token id is outside `[0, vocab_size)`.

  Args:
    tokens: integers on the host, any shape.
    vocab_size: rows of the model's embedding.

  Example:
    >>> check_token_ids(np.array([3, 9]), vocab_size=8)
    Traceback (most recent call last):
    ...
    ValueError: `tokens` must be in [0, 8) (`vocab_size`), got ids from 3 to 9.
  """
  tokens = np.asarray(tokens)
  if not np.issubdtype(tokens.dtype, np.integer):
    raise ValueError(f"`tokens` must be integers, got {tokens.dtype}.")
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
    raise ValueError(
      f"`tokens` must be in [0, {vocab_size}) (`vocab_size`),"
      f" got ids from {tokens.min()} to {tokens.max()}."
    )


def _check_rows(num_sequences: int, batch_size: int, row_start: int, row_count: int | None) -> int:
  if batch_size < 1:
    raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
  if num_sequences < batch_size:
    raise ValueError(
      f"`batch_size` must be at most the number of sequences {num_sequences}, got {batch_size}:"
      " give more data, a smaller batch or shorter sequences."
    )
  row_count = batch_size - row_start if row_count is None else row_count
  if row_start < 0 or row_count < 1 or row_start + row_count > batch_size:
    raise ValueError(
      f"`row_start`, `row_count` must select rows within `batch_size` {batch_size},"
      f" got {row_start}, {row_count}."
    )
  return row_count


def _rows(
  stream: grain.MapDataset, num_batches: int, batch_size: int, row_start: int, row_count: int
) -> grain.IterDataset:
  """Batch s: elements `s * batch_size + row_start + [0, row_count)` of `stream`."""
  grain = require("grain")

  def element(i):
    step, row = divmod(int(i), row_count)
    return stream[step * batch_size + row_start + row]

  rows = grain.MapDataset.range(num_batches * row_count).map(element).batch(row_count)
  # One thread hides the latency of reading; more only contend for the interpreter.
  return rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
