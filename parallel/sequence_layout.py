"""Which tokens of a sequence each device of an axis holds, and how evenly causal work is spread.

Letters: W devices on the axis, N tokens in all, S = N / W tokens per device.
"""

from typing import Any, Literal

import jax
import numpy as np

Layout = Literal["contiguous", "zigzag", "striped"]
"""contiguous: device r has S neighbours. zigzag: chunks r and 2W - 1 - r of 2W. striped: every W-th
stripe of `granularity` tokens."""

_LAYOUTS = ("contiguous", "zigzag", "striped")


def check_layout(seq_len: int, num_shards: int, layout: str, granularity: int = 1) -> None:
  """Raises ValueError unless `layout` can cut `seq_len` tokens over `num_shards` devices."""
  if layout not in _LAYOUTS:
    raise ValueError(f"`layout` must be one of {_LAYOUTS}, got {layout!r}.")
  if granularity < 1 or (granularity > 1 and layout != "striped"):
    raise ValueError(
      "`granularity` must be at least 1, and 1 unless `layout` is 'striped',"
      f" got {granularity} with {layout!r}."
    )
  if num_shards < 1:
    raise ValueError(f"`num_shards` must be at least 1, got {num_shards}.")
  unit = num_shards * {"contiguous": 1, "zigzag": 2, "striped": granularity}[layout]
  if seq_len < 1 or seq_len % unit:
    raise ValueError(
      f"`seq_len` must be a positive multiple of {unit} with `layout` {layout!r} on {num_shards}"
      f" devices, got {seq_len}."
    )


def shard_tokens(
  shard: int | jax.Array, num_shards: int, shard_len: int, layout: Layout, granularity: int = 1
) -> Any:
  """Places in the sequence of the tokens of device `shard`, in the order in which it holds them.

  Args:
    shard: r, a number or a traced int32[] such as `jax.lax.axis_index(axis_name)`.
    num_shards: W.
    shard_len: S.
    layout: how tokens are dealt out.
    granularity: tokens per stripe of "striped".

  Returns:
    int[S], NumPy's if `shard` is a number. Rotary embeddings take these as positions.

  Raises:
    ValueError: there is no such layout of W S tokens.

  Example:
    >>> [shard_tokens(1, 2, 4, name).tolist() for name in ("contiguous", "zigzag", "striped")]
    [[4, 5, 6, 7], [2, 3, 4, 5], [1, 3, 5, 7]]
  """
  check_layout(num_shards * shard_len, num_shards, layout, granularity)
  local = np.arange(shard_len, dtype=np.int32)
  if layout == "contiguous":
    return shard * shard_len + local
  if layout == "striped":
    stripe, rest = local // granularity, local % granularity
    return (stripe * num_shards + shard) * granularity + rest
  half = shard_len // 2
  late = local // half  # 0 in chunk r, 1 in chunk 2 W - 1 - r
  return (shard + late * (2 * num_shards - 1 - 2 * shard)) * half + local % half


def context_permutation(
  seq_len: int, num_shards: int, layout: Layout, granularity: int = 1
) -> tuple[np.ndarray, np.ndarray]:
  """The order of tokens that, cut into W equal parts, gives each device its own; and the way back.

  Permute tokens, targets, segment ids and positions once per batch on the host, `x[:, order]`, and
  shard dimension 1; `y[:, inverse]` is in the order of the sequence again.

  Args:
    seq_len: N.
    num_shards: W.
    layout: how tokens are dealt out.
    granularity: tokens per stripe of "striped".

  Returns:
    (order, inverse), int32[N] each.

  Raises:
    ValueError: N is not divisible by W (zigzag: by 2 W; striped: by W `granularity`), or an
      argument is out of its range.

  Example:
    >>> order, inverse = context_permutation(8, 2, "zigzag")
    >>> order.tolist(), order[inverse].tolist()
    ([0, 1, 6, 7, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7])
  """
  check_layout(seq_len, num_shards, layout, granularity)
  shards = [
    shard_tokens(r, num_shards, seq_len // num_shards, layout, granularity)
    for r in range(num_shards)
  ]
  order = np.concatenate(shards).astype(np.int32)
  return order, np.argsort(order).astype(np.int32)


def causal_work(seq_len: int, num_shards: int, layout: Layout, granularity: int = 1) -> np.ndarray:
  """Pairs of query and visible key that each device has in each step of the ring.

  Returns:
    int64[W, W]: entry [i, r] is of step i, when device r has the keys of device r - i. The sum is
    N (N + 1) / 2.

  Raises:
    ValueError: as `context_permutation`.

  Example:
    >>> causal_work(8, 2, "contiguous").tolist(), causal_work(8, 2, "zigzag").tolist()
    ([[10, 10], [0, 16]], [[10, 10], [8, 8]])
  """
  order, _ = context_permutation(seq_len, num_shards, layout, granularity)
  shards = np.sort(order.reshape(num_shards, -1), axis=1)
  work = np.empty((num_shards, num_shards), np.int64)
  for step in range(num_shards):
    for r in range(num_shards):
      work[step, r] = np.searchsorted(shards[r - step], shards[r], side="right").sum()
  return work


def causal_balance(seq_len: int, num_shards: int, layout: Layout, granularity: int = 1) -> float:
  r"""How much longer the ring takes than with even work: sum of the busiest over the mean.

  In every step all wait for the device with most pairs. With :math:`S = N / W` tokens per device
  and stripes of g tokens (contiguous: g = S), in closed form

  .. math:: \frac{(W - 1)(S + g) + S + 1}{W S + 1}

  which for large N is :math:`2 - 1/W` for contiguous and 1 for fine stripes; zigzag: exactly 1.

  Raises:
    ValueError: as `context_permutation`.

  Example:
    >>> [round(causal_balance(1024, 8, n), 4) for n in ("contiguous", "striped", "zigzag")]
    [1.8741, 1.0068, 1.0]
  """
  check_layout(seq_len, num_shards, layout, granularity)
  if layout == "zigzag":
    return 1.0
  shard_len = seq_len // num_shards
  stripe = granularity if layout == "striped" else shard_len
  busiest = (num_shards - 1) * (shard_len + stripe) + shard_len + 1
  return busiest / (num_shards * shard_len + 1)
