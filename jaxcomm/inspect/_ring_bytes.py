"""Bytes that one device sends in one collective over a ring of `group_size` devices.

These are the bandwidth-optimal counts, reached by the ring algorithms and by every algorithm that
splits its message evenly (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters
of workstations", J. Parallel Distrib. Comput. 69, 2009). `num_bytes` is the size of the local array
named in each function; a group of one device sends nothing.
"""


def all_reduce_bytes(num_bytes: float, group_size: int) -> float:
  """`2 (g - 1) / g * num_bytes`: a reduce-scatter and an all-gather of the local array.

  Raises:
    ValueError: `num_bytes` is negative or `group_size` is below 1.

  Example:
    >>> all_reduce_bytes(4096, group_size=4)
    6144.0
  """
  return 2 * _others(num_bytes, group_size)


def all_gather_bytes(num_bytes: float, group_size: int) -> float:
  """`(g - 1) / g * num_bytes`, where `num_bytes` is the size of the gathered *output*.

  Raises:
    ValueError: `num_bytes` is negative or `group_size` is below 1.

  Example:
    >>> all_gather_bytes(4096, group_size=4)
    3072.0
  """
  return _others(num_bytes, group_size)


def reduce_scatter_bytes(num_bytes: float, group_size: int) -> float:
  """`(g - 1) / g * num_bytes`, where `num_bytes` is the size of the *input*.

  Raises:
    ValueError: `num_bytes` is negative or `group_size` is below 1.

  Example:
    >>> reduce_scatter_bytes(4096, group_size=4)
    3072.0
  """
  return _others(num_bytes, group_size)


def all_to_all_bytes(num_bytes: float, group_size: int) -> float:
  """`(g - 1) / g * num_bytes`: every device keeps one of its `g` blocks.

  Raises:
    ValueError: `num_bytes` is negative or `group_size` is below 1.

  Example:
    >>> all_to_all_bytes(4096, group_size=4)
    3072.0
  """
  return _others(num_bytes, group_size)


def collective_permute_bytes(num_bytes: float, group_size: int) -> float:
  """`num_bytes` for a ring of at least two devices, else 0.

  Raises:
    ValueError: `num_bytes` is negative or `group_size` is below 1.

  Example:
    >>> collective_permute_bytes(4096, group_size=4)
    4096.0
  """
  _check(num_bytes, group_size)
  return float(num_bytes) if group_size > 1 else 0.0


def _others(num_bytes: float, group_size: int) -> float:
  """The share of `num_bytes` that belongs to the other devices of the group."""
  _check(num_bytes, group_size)
  return num_bytes * (group_size - 1) / group_size


def _check(num_bytes: float, group_size: int) -> None:
  if num_bytes < 0:
    raise ValueError(f"`num_bytes` must not be negative, got {num_bytes}.")
  if group_size < 1:
    raise ValueError(f"`group_size` must be at least 1, got {group_size}.")
