"""What `masha1`, `masha2` and `extragradient` share: state, refreshes, means, checks."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxcomm import _axes
from jaxcomm.collectives import allgather_pmean_bytes
from jaxcomm.compressors import Compressor
from jaxcomm.transforms._compressed import shares_support

Refresh = Literal["random", "deterministic", "host"]
Reference = Literal["new", "old"]


class MashaState(NamedTuple):
  """State of `masha1` and `masha2`.

  Attributes:
    step: int32[], equal on all workers; steps taken.
    workers: int32[], equal; how many workers `local_operator` was taken with.
    needs_refresh: bool[], equal; whether the operators are not those of `reference`. Set it after
      the workers or their data changed, and call `refresh`.
    reference: like the parameters, equal: the point w.
    local_operator: like the parameters, differs per worker: F_m(w).
    mean_operator: like the parameters, equal: F(w).
    worker_error: like the parameters, float32, differs per worker (MASHA2).
    server_error: like the parameters, float32, equal (MASHA2 with a server compressor).

  Errors that a method does not have are `optax.EmptyState()`.
  """

  step: jax.Array
  workers: jax.Array
  needs_refresh: jax.Array
  reference: optax.Params
  local_operator: optax.Updates
  mean_operator: optax.Updates
  worker_error: Any
  server_error: Any


def draw_refresh(seed: int, step: int | jax.Array, tau: float) -> jax.Array:
  """bool[]: whether step `step` ends with a refresh, true with probability 1 - tau.

  Equal wherever it is drawn: on all workers, and on a host that decides for them
  (`refresh="host"`).
  """
  return jax.random.bernoulli(_key(seed, 1, jnp.asarray(step)), 1 - tau)


def draw_participants(seed: int, step: jax.Array, num: int, axis_name: str) -> jax.Array:
  """bool[], differs per worker: whether it is one of the `num` that answer in this step."""
  order = jax.random.permutation(_key(seed, 2, step), _axes.axis_size(axis_name))
  return order[jax.lax.axis_index(axis_name)] < num


def server_key(seed: int, key: jax.Array) -> jax.Array:
  """A key that all workers share, of a leaf's key."""
  return jax.random.fold_in(key, seed + 3)


def _key(seed: int, purpose: int, step: jax.Array) -> jax.Array:
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def default_tau(params: Any, compressor: Compressor) -> float:
  """1 - compressed / dense bytes: refreshes then cost as much as all other messages."""
  leaves = jax.tree.leaves(params)
  dense = sum(4 * x.size for x in leaves)
  return max(0.0, 1 - message_bytes(params, compressor) / dense) if dense else 0.0


def message_bytes(params: Any, compressor: Compressor) -> int:
  """Bytes of one worker's message."""
  return sum(compressor.payload_bytes(x.shape) for x in jax.tree.leaves(params))


def masha_bytes(params: Any, axis_size: int, compressor: Compressor) -> tuple[int, int]:
  """Bytes that one device of a mesh sends in a step, and in addition in a refresh.

  A step is an all-gather of payloads, (M - 1) payload(d) per leaf; with Rand-k on a shared support
  an all-reduce of k floats, 2 (M - 1) / M 4k. A refresh is an all-reduce of 2 (M - 1) / M 4d, twice
  that in float64. Between workers and a server a worker sends the payload, and 4d.

  Args:
    params: the parameters, or their shapes.
    axis_size: M, number of workers.
    compressor: of the workers.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxcomm.compressors import rand_k
    >>> from jaxcomm.transforms import masha_bytes
    >>> masha_bytes(jnp.zeros(1000), 4, rand_k(ratio=0.1, shared_support=True))
    (600, 6000)
  """
  leaves = jax.tree.leaves(params)
  ring = 2 * (axis_size - 1) / axis_size
  refresh = sum(ring * x.size * jnp.dtype(x.dtype).itemsize for x in leaves)
  if shares_support(compressor):
    step = sum(math.ceil(ring * compressor.payload_bytes(x.shape)) for x in leaves)
  else:
    step = sum(allgather_pmean_bytes(x.shape, axis_size, compressor) for x in leaves)
  return step, math.ceil(refresh)


def dense_mean(tree: Any, axis_name: str) -> Any:
  """Mean over workers in the dtype of each leaf, which is float32 or float64."""
  _axes.axis_size(axis_name)  # raises if unbound
  return jax.tree.map(lambda x: jax.lax.pmean(x, axis_name), tree)


def no_prox(tree: Any, gamma: Any) -> Any:
  """The proximal map of h = 0."""
  del gamma
  return tree


def step_from(z: Any, gamma: Any, direction: Any, prox: Callable) -> Any:
  """prox(z - gamma * direction), in the dtypes of z."""
  moved = jax.tree.map(lambda p, d: (p - gamma * d).astype(p.dtype), z, direction)
  return prox(moved, gamma)


def unless_stale(half: Any, stale: jax.Array) -> Any:
  """`half`; if a refresh is missing, an error, or under jit NaN, which cannot raise."""
  if not isinstance(stale, Tracer):
    if bool(stale):
      raise ValueError(
        "`refresh` must be called before extrapolate: the operators in the state are not those of"
        " its reference point or of these workers."
      )
    return half
  return jax.tree.map(lambda x: jnp.where(stale, jnp.asarray(jnp.nan, x.dtype), x), half)


def check_rate(learning_rate: Any) -> None:
  """Raises ValueError unless the rate is positive and finite, or traced."""
  if not isinstance(learning_rate, Tracer) and not 0 < learning_rate < math.inf:
    raise ValueError(f"`learning_rate` must be positive and finite, got {learning_rate!r}.")


def check_params(params: Any) -> None:
  """Raises ValueError for what differences of nearby points would lose their digits in."""
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if x.dtype not in (jnp.float32, jnp.float64):
      where = jax.tree_util.keystr(path) or "the root"
      raise ValueError(
        f"`params` must be float32 or float64, got {x.dtype} at {where}: differences of nearby"
        " points lose their digits in narrower types."
      )


def check_operator(value: Any, params: Any, axis_name: str) -> None:
  """Raises ValueError unless an operator's value looks like the parameters, and is a worker's own.

  Where `jax.shard_map` checks types, `jax.grad` at a point that all workers share returns the sum
  of their gradients; it and nothing else is typed as equal.
  """
  _check_like(value, params)
  leaves = jax.tree.leaves(value)
  checked = axis_name in _axes.varying_axes(_axes.vary(jnp.zeros(()), axis_name))
  if checked and leaves and not any(axis_name in _axes.varying_axes(x) for x in leaves):
    raise ValueError(
      f"the operator must return a value of each worker of its own, got one that is equal over"
      f" `{axis_name}`: jax.grad at a point that all share sums over workers. Take it at"
      f' jax.lax.pcast(point, "{axis_name}", to="varying").'
    )


def _check_like(value: Any, params: Any) -> None:
  got, want = jax.tree.structure(value), jax.tree.structure(params)
  if got != want:
    raise ValueError(f"the operator must return a tree like `params`, {want}, got {got}.")
  for (path, x), p in zip(jax.tree_util.tree_leaves_with_path(value), jax.tree.leaves(params)):
    if jnp.shape(x) != jnp.shape(p):
      where = jax.tree_util.keystr(path) or "the root"
      raise ValueError(
        f"the operator must return a tree like `params`, shape {jnp.shape(p)} at {where}, got"
        f" {jnp.shape(x)}."
      )
