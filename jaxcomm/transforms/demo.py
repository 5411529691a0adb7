"""DeMo: momentum stays at home, its largest cosine coefficients travel."""

import functools
import math
import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcomm import _axes
from jaxcomm.transforms._checks import check_count, check_decay
from jaxcomm.transforms._leafwise import map_leaves
from jaxcomm.transforms._matrices import MatrixView

_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class DemoState(NamedTuple):
  """State of `demo` (the first part of its chain).

  Attributes:
    count: int32[], equal on all devices; updates made.
    delta: like the parameters, float32, differs per device: momentum that was not sent yet.
  """

  count: jax.Array
  delta: optax.Updates


def demo(
  learning_rate: optax.ScalarOrSchedule,
  axis_name: str,
  *,
  compression_decay: float = 0.999,
  compression_topk: int = 32,
  compression_chunk: int = 64,
  value_dtype: Literal["float32", "bfloat16"] = "float32",
  weight_decay: float = 0.0,
  specs: Any = None,
) -> optax.GradientTransformation:
  r"""Decoupled momentum: sign descent along what the replicas' momenta have most of.

  Each leaf is cut into chunks with sides of the largest divisors of its dimensions that are at most
  `compression_chunk`; q is the orthonormal cosine transform (DCT-II) of each, in one dimension for
  vectors and in two for matrices, and T keeps the k = `compression_topk` largest of each chunk:

  .. math::
    \delta_i \leftarrow \beta \delta_i + \gamma g_i, \quad q_i = T(\mathrm{DCT}(\delta_i)), \quad
    \delta_i \leftarrow \delta_i - \mathrm{IDCT}(q_i), \quad
    \theta \leftarrow (1 - \gamma \lambda) \theta -
    \gamma\, \mathrm{sign}(\mathrm{IDCT}(\mathrm{mean}(q)))

  The mean of a coefficient is taken over the replicas that sent it, not over all, in the order of
  the ranks: all get the same bits. Residual and message make up :math:`\delta_i` exactly. The
  learning rate stands inside of :math:`\delta`, so a schedule weighs past gradients.

  More than two dimensions are cut into rows and columns where the sum of both is smallest. A
  dimension without a divisor near `compression_chunk` compresses badly (127 gives chunks of 1;
  warned of). A chunk with no more than k elements is sent whole.

  Wire, per device and update, over `axis_name`: an all-gather of k indices (uint16, or int32 in
  chunks of more than 65,536) and values per chunk: (N - 1) (chunks) k (2 + 4) bytes (`demo_bytes`),
  for 64 x 64 chunks and k = 32 about 0.05 (N - 1) per parameter, 0.03 with bfloat16 values. A leaf
  sharded over inner mesh axes is cut shard by shard, so nothing crosses those axes.

  Per device: `delta`. Equal: `count`. A restore needs the same number of replicas, or a named
  replica change.

  Args:
    learning_rate: a number or an optax schedule; about that of other sign methods.
    axis_name: axis of the replicas, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    compression_decay: decay of what was not sent, in [0, 1).
    compression_topk: k, coefficients per chunk.
    compression_chunk: longest side of a chunk.
    value_dtype: of the values on the wire; what bfloat16 rounds off stays in `delta`.
    weight_decay: decoupled, times the learning rate.
    specs: how leaves are sharded over the other mesh axes, see `compressed_mean`.

  Returns:
    A `GradientTransformation`: the last one of a chain; gradients must not be averaged before it.

  Raises:
    ValueError: an argument outside these rules; in update as `compressed_mean`. Warns (UserWarning)
      of chunks of one element, and of gradients that are typed as equal on all replicas.

  References:
    Peng, Quesnelle, Kingma, Decoupled Momentum Optimization, https://arxiv.org/abs/2411.19870.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm import demo
    >>> tx = demo(0.5, "replica", compression_topk=1)
    >>> grads = jnp.array([[1.0, 1.0, 1.0, 1.0], [3.0, 1.0, -1.0, -3.0]])  # cosines 0 and 1
    >>> step = lambda g: tx.update(g, tx.init(g), g)[0]
    >>> jax.vmap(step, axis_name="replica")(grads)[0].tolist()
    [-0.5, -0.5, 0.5, 0.5]
  """
  check_decay("compression_decay", compression_decay)
  check_count("compression_topk", compression_topk, at_least=1)
  check_count("compression_chunk", compression_chunk, at_least=1)
  if value_dtype not in ("float32", "bfloat16"):
    raise ValueError(f"`value_dtype` must be 'float32' or 'bfloat16', got {value_dtype!r}.")
  if weight_decay < 0:
    raise ValueError(f"`weight_decay` must be at least 0, got {weight_decay!r}.")

  def init_fn(params):
    delta = optax.tree.zeros_like(params, dtype=jnp.float32)
    return DemoState(jnp.zeros((), jnp.int32), delta)

  def sign_of_leaf(leaf, rate, g, delta):
    chunks = _Chunks(g.shape, compression_chunk)
    _warn(leaf.name, chunks, axis_name in _axes.varying_axes(delta) - _axes.varying_axes(g))
    delta = compression_decay * delta + rate * g.astype(jnp.float32)
    message = _largest(chunks.transform(delta), compression_topk, value_dtype)
    sent_CK = _scatter(jnp.zeros((chunks.num, chunks.size)), message)
    delta = delta - chunks.inverse(sent_CK)
    everyone = _axes.all_gather_equal(message, axis_name)
    mean = chunks.inverse(_mean_of_senders(everyone, sent_CK.shape))
    return jnp.sign(mean).astype(g.dtype), delta

  def update_fn(updates, state, params=None):
    del params
    rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate, jnp.float32)
    signs, delta = map_leaves(
      sign_of_leaf, rate, updates, state.delta, axis_name=axis_name, specs=specs
    )
    return signs, DemoState(jnp.asarray(optax.safe_increment(state.count)), delta)

  core = optax.GradientTransformation(init_fn, update_fn)
  decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
  return optax.chain(core, *decay, optax.scale_by_learning_rate(learning_rate))


def demo_bytes(
  shape: tuple[int, ...],
  axis_size: int,
  *,
  compression_topk: int = 32,
  compression_chunk: int = 64,
  value_dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
  """Bytes that one device sends per update of `demo` for an array of `shape` (its local shard).

  (N - 1) times, for every chunk, min(k, elements of the chunk) indices and values.

  >>> from jaxcomm.transforms import demo_bytes
  >>> demo_bytes((256, 256), 4), demo_bytes((256, 256), 4, value_dtype="bfloat16")
  (9216, 6144)
  """
  chunks = _Chunks(tuple(shape), compression_chunk)
  width = chunks.index_dtype.itemsize + jnp.dtype(value_dtype).itemsize
  return (axis_size - 1) * chunks.num * min(compression_topk, chunks.size) * width


class _Chunks:
  """The chunks of an array, and their cosine transform.

  Letters: C chunks of K coefficients; an array as A rows and B columns of chunks of a x b.
  """

  def __init__(self, shape: tuple[int, ...], longest: int):
    self.shape = shape
    self.shape_2d = _two_sides(shape)
    self.sides = tuple(_largest_divisor(n, longest) for n in self.shape_2d)
    self.grid = tuple(n // k for n, k in zip(self.shape_2d, self.sides))
    self.num, self.size = math.prod(self.grid), math.prod(self.sides)

  @property
  def index_dtype(self) -> np.dtype:
    return np.dtype(np.uint16 if self.size <= 2**16 else np.int32)

  def transform(self, x: jax.Array) -> jax.Array:
    """float32[C, K]"""
    (rows, columns), (a, b) = self.grid, self.sides
    x_AaBb = x.reshape(rows, a, columns, b)
    q_ABij = _einsum("ia,AaBb,jb->ABij", _dct_matrix(a), x_AaBb, _dct_matrix(b))
    return q_ABij.reshape(self.num, self.size)

  def inverse(self, q_CK: jax.Array) -> jax.Array:
    """The array whose transform is `q_CK`."""
    q_ABij = q_CK.reshape(*self.grid, *self.sides)
    a, b = self.sides
    x_AaBb = _einsum("ia,ABij,jb->AaBb", _dct_matrix(a), q_ABij, _dct_matrix(b))
    return x_AaBb.reshape(self.shape)


def _two_sides(shape: tuple[int, ...]) -> tuple[int, int]:
  if len(shape) < 2:
    return 1, math.prod(shape)
  if len(shape) == 2:
    return shape[0], shape[1]
  view = MatrixView(shape)
  return view.rows, view.columns


def _largest_divisor(n: int, longest: int) -> int:
  return max((k for k in range(1, min(n, longest) + 1) if n % k == 0), default=1)


@functools.cache
def _dct_matrix(n: int) -> np.ndarray:
  """Orthonormal DCT-II, float32[n, n]: coefficients are its product with a column."""
  k, x = np.arange(n)[:, None], np.arange(n)[None]
  cosines = np.cos(np.pi * (2 * x + 1) * k / (2 * n)) * np.sqrt(2 / n)
  cosines[0] /= np.sqrt(2)
  return cosines.astype(np.float32)


def _largest(q_CK: jax.Array, num: int, value_dtype: str) -> dict[str, jax.Array]:
  """Indices and values of the coefficients to send; bfloat16 as the uint16 that holds it."""
  _, index = jax.lax.top_k(jnp.abs(q_CK), min(num, q_CK.shape[1]))
  value = jnp.take_along_axis(q_CK, index, axis=1)
  if value_dtype == "bfloat16":
    value = jax.lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)
  small = q_CK.shape[1] <= 2**16
  return {"index": index.astype(jnp.uint16 if small else jnp.int32), "value": value}


def _values(message: dict[str, jax.Array]) -> jax.Array:
  value = message["value"]
  if value.dtype == jnp.uint16:
    value = jax.lax.bitcast_convert_type(value, jnp.bfloat16)
  return value.astype(jnp.float32)


def _scatter(into_CK: jax.Array, message: dict[str, jax.Array], value: Any = None) -> jax.Array:
  rows_C1 = jnp.arange(into_CK.shape[0])[:, None]
  value = _values(message) if value is None else value
  return into_CK.at[rows_C1, message["index"].astype(jnp.int32)].add(value, unique_indices=True)


def _mean_of_senders(everyone: dict[str, jax.Array], shape: tuple[int, ...]) -> jax.Array:
  """Per coefficient, over the devices that sent it, added from first to last."""

  def message_of(i):
    return jax.tree.map(lambda x: x[i], everyone)

  def add(i, sums):
    total_CK, count_CK = sums
    return _scatter(total_CK, message_of(i)), _scatter(count_CK, message_of(i), 1.0)

  num_devices = everyone["index"].shape[0]
  sums = add(0, (jnp.zeros(shape), jnp.zeros(shape)))
  total_CK, count_CK = jax.lax.fori_loop(1, num_devices, add, sums)
  return total_CK / jnp.maximum(count_CK, 1.0)


def _warn(leaf_name: str, chunks: _Chunks, averaged: bool) -> None:
  name = leaf_name or "the root"
  for n, side in zip(chunks.shape_2d, chunks.sides):
    if side == 1 and n > 1:
      warnings.warn(
        f"`compression_chunk`: no compression along the {n} elements of {name}, of which no divisor"
        " is short enough.",
        stacklevel=2,
      )
  if averaged:
    warnings.warn(
      f"the gradient of {name} is equal on all replicas: `demo` must get each replica's own.",
      stacklevel=2,
    )
