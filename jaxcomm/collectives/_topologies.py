"""Who averages with whom: graphs of replicas whose mixing matrices keep the mean.

Letters: N replicas; a *link* is a permutation of them, one `ppermute`; a *phase* is the links that
one gossip step uses at once, all with the same weight 1 / (number of links + 1).
"""

import abc
import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable

import jax
import numpy as np

Link = tuple[int, ...]  # entry i is the replica that i receives from
Phase = tuple[Link, ...]


@dataclasses.dataclass(frozen=True)
class Topology(abc.ABC):
  r"""A sequence of mixing matrices :math:`W_t`, for any number of replicas.

  A gossip step is :math:`x_i \leftarrow \sum_j w_{ij} x_j`. All rows and columns of W sum to 1 and
  no entry is negative, so the mean stays and differences shrink. The topology knows no number of
  replicas: methods take it from their mesh axis, the functions here as `size`.

  Source: Shi et al., DFedSAM, https://arxiv.org/abs/2302.04083 (ring, grid, exponential, full);
  Assran et al., SGP, https://arxiv.org/abs/1811.10792 (one peer).
  """

  @abc.abstractmethod
  def phases(self, size: int) -> tuple[Phase, ...]:
    """The links of every phase; a link holds, for each replica, from whom it receives.

    Raises:
      ValueError: there is no such graph of `size` replicas.
    """

  @property
  def symmetric(self) -> bool:
    """Whether i and j always weigh each other equally."""
    return True

  def phase(self, step: int | jax.Array, size: int) -> int | jax.Array:
    """Which of `phases` gossip step number `step` uses: they take turns."""
    num_phases = len(self.phases(size))
    return step % num_phases if num_phases > 1 else 0

  def degree(self, size: int) -> int:
    """Messages that the busiest replica sends in a step."""
    own = tuple(range(size))
    return max(sum(link != own for link in links) for links in self.phases(size))

  def matrix(self, size: int, step: int = 0) -> np.ndarray:
    """W of gossip step `step`: float64[size, size], row i for what replica i takes."""
    return _matrix(self.phases(size)[int(self.phase(step, size))], size)

  def contraction(self, size: int) -> float:
    r"""λ: after Q steps :math:`\|x - \bar x\| \le \lambda^Q \|x_0 - \bar x\|`.

    With several phases it holds after whole turns. Of a symmetric W it is the second largest
    modulus of an eigenvalue.
    """
    mean = np.full((size, size), 1 / size)
    matrices = [_matrix(links, size) for links in self.phases(size)]
    turn = functools.reduce(lambda before, w: w @ before, matrices)
    return _root(float(np.linalg.norm(turn - mean, 2)), len(matrices))

  def spectral_gap(self, size: int) -> float:
    """1 - λ, with λ the `contraction`: 1 mixes at once, 0 never.

    Example:
      >>> from jaxcomm.collectives import complete, exponential, ring
      >>> [round(graph.spectral_gap(16), 3) for graph in (ring(), exponential(), complete())]
      [0.051, 0.4, 1.0]
    """
    return 1 - self.contraction(size)


@dataclasses.dataclass(frozen=True)
class Ring(Topology):
  """See `ring`."""

  def phases(self, size):
    return (_shifts(size, (1, -1)),)


@dataclasses.dataclass(frozen=True)
class Torus(Topology):
  """See `torus`."""

  rows: int | None = None

  def phases(self, size):
    if size == 1:
      return ((),)
    rows = self.rows or max(r for r in range(1, math.isqrt(size) + 1) if size % r == 0)
    if rows < 2 or size % rows or size // rows < 2:
      what = "a prime number of" if self.rows is None else f"`rows`={self.rows} and"
      raise ValueError(
        f"a torus needs rows * columns replicas, both at least 2, got {what} {size} replicas:"
        " use ring() or exponential()."
      )
    columns = size // rows
    steps = ((1, 0), (-1, 0), (0, 1), (0, -1))
    cells = [divmod(i, columns) for i in range(size)]
    links = (
      tuple((r + dr) % rows * columns + (c + dc) % columns for r, c in cells) for dr, dc in steps
    )
    return (tuple(dict.fromkeys(links)),)


@dataclasses.dataclass(frozen=True)
class Exponential(Topology):
  """See `exponential`."""

  @property
  def symmetric(self):
    return False

  def phases(self, size):
    return (_shifts(size, _powers(size)),)


@dataclasses.dataclass(frozen=True)
class OnePeerExponential(Topology):
  """See `one_peer_exponential`."""

  @property
  def symmetric(self):
    return False

  def phases(self, size):
    if size & (size - 1):
      warnings.warn(
        f"one_peer_exponential() averages exactly only powers of two of replicas, got {size}.",
        stacklevel=2,
      )
    return tuple(_shifts(size, (offset,)) for offset in _powers(size)) or ((),)


@dataclasses.dataclass(frozen=True)
class Complete(Topology):
  """See `complete`."""

  def phases(self, size):
    return (_shifts(size, range(1, size)),)


@dataclasses.dataclass(frozen=True)
class RandomMatching(Topology):
  """See `random_matching`."""

  seed: int = 0
  bipartite: bool = False

  def phases(self, size):
    if size == 1:
      return ((),)
    if self.bipartite:
      if size % 2:
        raise ValueError(f"`bipartite` needs an even number of replicas, got {size}.")
      return tuple((_odd_even(size, shift),) for shift in range(size // 2))
    return tuple((_circle(size, turn),) for turn in range(size - 1 + size % 2))

  def phase(self, step, size):
    num_phases = len(self.phases(size))
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    return jax.random.randint(key, (), 0, num_phases) if num_phases > 1 else 0

  def contraction(self, size):
    r"""λ in root mean square: :math:`E \|x - \bar x\|^2 \le \lambda^{2Q} \|x_0 - \bar x\|^2`."""
    squares = [w.T @ w for w in (_matrix(links, size) for links in self.phases(size))]
    second_moment = sum(squares) / len(squares) - np.full((size, size), 1 / size)
    return _root(float(np.linalg.norm(second_moment, 2)), 2)


def ring() -> Ring:
  """Both neighbours in a circle. λ = (1 + 2 cos(2π/N)) / 3 from N = 3 on."""
  return Ring()


def torus(rows: int | None = None) -> Torus:
  """The four neighbours in a grid that wraps around, replicas row by row.

  Args:
    rows: of the grid, at least 2; None for the most nearly square one.

  Raises:
    ValueError: `rows` below 2; in use, if the replicas do not fill a grid (a prime number, say).
  """
  if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 2):
    raise ValueError(f"`rows` must be an integer >= 2 or None, got {rows!r}.")
  return Torus(rows)


def exponential() -> Exponential:
  """Every replica sends to those 1, 2, 4, ... places ahead. λ = 1 - 2 / (1 + ⌈log2 N⌉).

  Directed: rows and columns sum to 1, but W is not symmetric.
  """
  return Exponential()


def one_peer_exponential() -> OnePeerExponential:
  """One link of `exponential` at a time: 1 place ahead, then 2, then 4, ...

  With N a power of two, log2 N steps in a row give the exact mean (λ = 0); another number warns.
  """
  return OnePeerExponential()


def complete() -> Complete:
  """Everybody: the mean in one step, at N - 1 messages (`pmean_over` sends two at most)."""
  return Complete()


def random_matching(seed: int = 0, *, bipartite: bool = False) -> RandomMatching:
  r"""Pairs, drawn anew in every step; the same on all replicas, since they share the seed.

  Every partner is as likely as any other. With an odd number one replica, drawn too, stays alone.
  In root mean square :math:`\lambda^2 = 1 - N / (2 (N - 1))` for even N, 1/2 for odd N.

  Args:
    seed: of the draws.
    bipartite: even replicas pair with odd ones only, as in AD-PSGD: λ² = 1/2 from N = 4 on.

  Raises:
    ValueError: in use, `bipartite` with an odd number of replicas.
  """
  return RandomMatching(seed, bipartite)


def _shifts(size: int, offsets: Iterable[int]) -> Phase:
  """Links from replica i to i + offset, each once, none to itself."""
  unique = dict.fromkeys(offset % size for offset in offsets)
  return tuple(tuple((i - s) % size for i in range(size)) for s in unique if s)


def _powers(size: int) -> list[int]:
  return [2**k for k in range((size - 1).bit_length())]


def _circle(size: int, turn: int) -> Link:
  """Round `turn` of a tournament: i meets j where i + j = turn modulo m; the last fills the gap."""
  m = size - 1 + size % 2
  link = [(turn - i) % m for i in range(m)]
  alone = link.index(next(i for i in range(m) if link[i] == i)) if m else 0
  if size % 2 == 0:
    link[alone] = size - 1
    link.append(alone)
  return tuple(link)


def _odd_even(size: int, shift: int) -> Link:
  half = size // 2
  link = [0] * size
  for i in range(half):
    even, odd = 2 * i, 2 * ((i + shift) % half) + 1
    link[even], link[odd] = odd, even
  return tuple(link)


def _matrix(links: Phase, size: int) -> np.ndarray:
  eye = np.eye(size)
  return (eye + sum(eye[list(link)] for link in links)) / (len(links) + 1)


def _root(x: float, degree: int) -> float:
  """Root of a norm that rounding may have left just above zero."""
  return x ** (1 / degree) if x > 1e-12 else 0.0
