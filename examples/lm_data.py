"""What scripts that train on text share about their data."""


def evaluation_rows(available: int, batch_size: int, parts: int, seq_len: int) -> int:
  """Rows of an evaluation batch: as many as of a training batch, or fewer of a short text.

  Args:
    available: sequences for validation.
    batch_size: rows of a training batch.
    parts: into which devices and microbatches cut the rows.
    seq_len: tokens per sequence.

  Raises:
    ValueError: there are fewer sequences than parts.
  """
  rows = min(batch_size, available // parts * parts)
  if not rows:
    raise ValueError(
      f"`data` must have {parts} sequences of {seq_len} tokens for validation, one for each"
      f" replica, shard and microbatch, got {available}: give more data or shorter sequences."
    )
  return rows
