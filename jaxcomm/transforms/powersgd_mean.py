"""PowerSGD: the mean of matrices by one step of power iteration, low rank on the wire."""

import dataclasses
import functools
import math
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes, _shards
from jaxcomm.inspect._ring_bytes import all_reduce_bytes
from jaxcomm.transforms._checks import check_count
from jaxcomm.transforms._leafwise import map_leaves
from jaxcomm.transforms._matrices import MatrixView, is_matrix

P = jax.sharding.PartitionSpec
_UNSHARDED = P()
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class PowerSGDState(NamedTuple):
  """State of `powersgd_mean`: trees like the parameters, `optax.MaskedNode()` at what has none.

  With r the rank, n and m the rows and columns of a leaf; a factor has as many dimensions as its
  leaf (r and ones in place of the other side's), times the number of shards if it is sharded.

  Attributes:
    count: int32[], equal on all devices; number of means taken.
    residual: float32, like the compressed leaves, differs per device: what compression still owes.
    left: float32, n r elements, equal on all devices; "alternating" only.
    right: float32, r m elements, equal on all devices; the warm start.
    exact: bool[], equal on all devices; whether the last update came before `start_step`.
  """

  count: jax.Array
  residual: Any
  left: Any
  right: Any
  exact: jax.Array


def powersgd_mean(
  axis_name: str,
  rank: int = 1,
  *,
  variant: Literal["two_sided", "alternating"] = "two_sided",
  error_feedback: bool = True,
  error: Literal["local", "global"] = "local",
  warm_start: bool = True,
  min_compression_rate: float = 2.0,
  start_step: int = 0,
  stacked: Any = 0,
  specs: Any = None,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
  seed: int = 0,
) -> optax.GradientTransformation:
  r"""Mean over `axis_name` of matrices, as a product of two factors of `rank` columns.

  With :math:`M_i = G_i + E_i`, orth(.) an orthonormal basis of the columns (QR), and R the right
  factor of the last update (the first is drawn from N(0, 1), equally on all devices):

  .. math::
    \text{"two_sided":} \quad U &= \mathrm{orth}(\tfrac1N \sum_i M_i\, \mathrm{orth}(R)), &
    R &\leftarrow \tfrac1N \sum_i M_i^T U, & \hat M &= U R^T \\
    \text{"alternating":} \quad V &= \mathrm{orth}(R), & L &\leftarrow \tfrac1N \sum_i M_i V, &
    \hat M &= L V^T

  "alternating" exchanges the roles of L and R at every update: half the bytes, half an iteration.
  The residual is :math:`E_i' = M_i - U U^T M_i` ("local", each device's own projection) or
  :math:`E_i' = M_i - \hat M` ("global", as in torch). Their means agree, and with them, but
  for rounding, all results; but in "global" the differences between devices pile up, never sent.

  A leaf is compressed if it has two dimensions or more behind its `stacked` ones, and
  (n + m) r `min_compression_rate` < n m (of its local shard); r is at most n and m. More than two
  dimensions are cut into rows and columns where n + m is smallest. Other leaves get the exact
  float32 mean, without residual. Where all gradients are zero the factors stay as they were.

  Wire, per device and update, over `axis_name`: an all-reduce of n r and one of r m float32 per
  matrix, :math:`2\frac{N-1}{N} 4 r (n + m)` bytes in a ring; "alternating" one of the two in turn;
  `powersgd_bytes`. Nothing crosses inner mesh axes: every shard of a leaf is a matrix of its own.

  Per device: `residual`. Equal: `count`, `left`, `right`. A restore needs the same number of
  replicas, or a named replica change, and the same inner sharding, which the factors' shapes hold.

  Args:
    axis_name: axis to average over, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    rank: r.
    variant: "two_sided" (the paper, torch) or "alternating" (the authors' later package).
    error_feedback: keep what compression lost and add it to the next input.
    error: what that is, "local" or "global".
    warm_start: keep R; otherwise draw a new one for every update.
    min_compression_rate: leaves that would shrink by less go uncompressed.
    start_step: updates with exact means before the first compressed one. Torch waits for 1000; in
      short runs with Adam a tenth to a fifth of all steps makes up for most of what low rank costs.
    stacked: leading dimensions that count matrices (layers of a scan): one number for all leaves,
      or a tree of numbers like the updates.
    specs: how leaves are sharded over the other mesh axes, see `compressed_mean`; needed for
      Explicit axes as well.
    mesh: where any leaf is sharded: the mesh, whose sizes say how many shards there are.
    seed: of the first right factors, or of all.

  Returns:
    A `GradientTransformation` with `PowerSGDState`.

  Raises:
    ValueError: an argument outside these rules; in update as `compressed_mean`, or a state made for
      other shards (by init without `specs` and `mesh`).

  References:
    Vogels, Karimireddy, Jaggi, PowerSGD, https://arxiv.org/abs/1905.13727.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxcomm import powersgd_mean
    >>> tx = powersgd_mean("replica", rank=1, min_compression_rate=1.0)
    >>> column, row = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[1.0, 2.0, 4.0]])
    >>> grads = jnp.stack([column * row, 3 * column * row])  # their mean has rank 1
    >>> mean = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="replica")(grads)
    >>> bool(jnp.allclose(mean[0], 2 * column * row, rtol=1e-5))
    True
  """
  check_count("rank", rank, at_least=1)
  check_count("start_step", start_step, at_least=0)
  for num in jax.tree.leaves(stacked):
    check_count("stacked", num, at_least=0)
  _check_options(variant, error, error_feedback, warm_start, min_compression_rate)
  method = _PowerSGD(
    axis_name, rank, variant == "alternating", error_feedback, error == "local", warm_start,
    min_compression_rate, start_step, stacked, specs, mesh, seed,
  )  # fmt: skip
  return optax.GradientTransformation(method.init, method.update)


def powersgd_bytes(
  shape: tuple[int, ...],
  axis_size: int,
  rank: int = 1,
  *,
  variant: Literal["two_sided", "alternating"] = "two_sided",
  min_compression_rate: float = 2.0,
  stacked: int = 0,
) -> float:
  r"""Bytes that one device sends per `powersgd_mean` of an array of `shape` (its local shard).

  :math:`2\frac{N-1}{N} 4 B r (n + m)` for B matrices, half of it (on average over two updates) for
  "alternating", :math:`2\frac{N-1}{N} 4 d` for arrays of d elements that are not compressed.

  >>> from jaxcomm.transforms import powersgd_bytes
  >>> powersgd_bytes((256, 256), 4, rank=4), powersgd_bytes((256,), 4)
  (12288.0, 1536.0)
  """
  plan = _plan(tuple(shape), rank, min_compression_rate, stacked)
  if plan is None:
    return all_reduce_bytes(4 * math.prod(shape), axis_size)
  view = plan.view
  sent = 4 * view.num_matrices * plan.rank * (view.rows + view.columns)
  return all_reduce_bytes(sent, axis_size) / (2 if variant == "alternating" else 1)


class _Plan(NamedTuple):
  """How the shards of a leaf are compressed: each as `view`, in so many shards per dimension."""

  view: MatrixView
  rank: int
  shards: tuple[int, ...]

  @property
  def left_shape(self) -> tuple[int, ...]:
    """Of the left factors of all shards."""
    return tuple(a * b for a, b in zip(self.view.left_shape(self.rank), self.shards))

  @property
  def right_shape(self) -> tuple[int, ...]:
    """Of the right factors of all shards."""
    return tuple(a * b for a, b in zip(self.view.right_shape(self.rank), self.shards))


def _plan(shape, rank, min_compression_rate, stacked, spec=_UNSHARDED, mesh=None) -> _Plan | None:
  """None for an array that is not compressed."""
  shards = _shards.shards_per_dim(spec, len(shape), mesh)
  local = tuple(a // b for a, b in zip(shape, shards))
  if not is_matrix(local, stacked):
    return None
  view = MatrixView(local, stacked)
  n, m = view.rows, view.columns
  rank = min(rank, n, m)
  return _Plan(view, rank, shards) if (n + m) * rank * min_compression_rate < n * m else None


@dataclasses.dataclass(frozen=True)
class _PowerSGD:
  """Init and update; fields as the arguments of `powersgd_mean`."""

  axis_name: str
  rank: int
  alternates: bool
  error_feedback: bool
  local_error: bool
  warm_start: bool
  min_compression_rate: float
  start_step: int
  stacked: Any
  specs: Any
  mesh: Any
  seed: int

  def init(self, params) -> PowerSGDState:
    treedef = jax.tree.structure(params)
    one = self.specs is None or isinstance(self.specs, P)
    specs = [self.specs or P()] * treedef.num_leaves if one else None
    plans = self._plans(params, specs or _shards.leaves_like(treedef, self.specs), self.mesh)

    def tree(make, wanted=True):
      def leaf(path, p):
        plan = plans[jax.tree_util.keystr(path)]
        return make(path, p, plan) if wanted and plan else optax.MaskedNode()

      return jax.tree_util.tree_map_with_path(leaf, params)

    return PowerSGDState(
      count=jnp.zeros((), jnp.int32),
      residual=tree(lambda path, p, plan: jnp.zeros(p.shape), self.error_feedback),
      left=tree(lambda path, p, plan: self._draw(path, 0, plan.left_shape), self.alternates),
      right=tree(lambda path, p, plan: self._draw(path, 1, plan.right_shape), self.warm_start),
      exact=jnp.zeros((), jnp.bool_),
    )

  def update(self, updates, state, params=None):
    del params
    _axes.axis_size(self.axis_name)
    leaves, treedef = jax.tree.flatten(updates)
    specs = _shards.leaf_specs(leaves, treedef, self.specs)
    plans = self._plans(updates, specs, jax.sharding.get_abstract_mesh())
    if self.warm_start:
      _check_factors(plans, treedef.flatten_up_to(state.right))

    def mean_of_leaf(leaf, count, g, *own_state):
      plan = plans[leaf.name]
      if plan is None:
        return _axes.pmean_f32(g, self.axis_name), *own_state
      return self._mean_of_leaf(plan, leaf, count, g, *own_state)

    trees = state.residual, state.left, state.right
    means, *trees = map_leaves(
      mean_of_leaf, state.count, updates, *trees, axis_name=self.axis_name, specs=self.specs
    )
    count = jnp.asarray(optax.safe_increment(state.count))
    return means, PowerSGDState(count, *trees, exact=state.count < self.start_step)

  def _plans(self, params, specs, mesh) -> dict[str, _Plan | None]:
    """By the names of the leaves."""
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    one = isinstance(self.stacked, int)
    stacked = [self.stacked] * len(specs) if one else _shards.leaves_like(treedef, self.stacked)
    return {
      jax.tree_util.keystr(path): _plan(
        jnp.shape(x), self.rank, self.min_compression_rate, num, spec, mesh
      )
      for (path, x), num, spec in zip(paths_and_leaves, stacked, specs)
    }

  def _draw(self, path, side: int, shape) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(self.seed), side)
    key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
    return jax.random.normal(key, shape)

  def _mean_of_leaf(self, plan, leaf, count, g, residual, left, right):
    view, rank = plan.view, plan.rank
    m_BNM = view.matrices(g.astype(jnp.float32))
    if self.error_feedback:
      m_BNM = m_BNM + view.matrices(residual)
    left_BNR = jax.tree.map(lambda x: x.reshape(-1, view.rows, rank), left)
    right_BRM = jax.tree.map(lambda x: x.reshape(-1, rank, view.columns), right)
    if not self.warm_start:
      key = leaf.key(self.seed, count)
      right_BRM = jax.random.normal(key, (view.num_matrices, rank, view.columns))

    def low_rank(m_BNM, left_BNR, right_BRM):
      return self._low_rank(count, m_BNM, left_BNR, right_BRM)

    def exact(m_BNM, left_BNR, right_BRM):
      return _axes.pmean_f32(m_BNM, self.axis_name), m_BNM, left_BNR, right_BRM

    args = m_BNM, left_BNR, right_BRM
    if self.start_step:
      out = _axes.cond(count < self.start_step, exact, low_rank, *args)
    else:
      out = low_rank(*args)
    mean_BNM, sent_BNM, left_BNR, right_BRM = out
    if self.error_feedback:
      residual = (m_BNM - sent_BNM).reshape(g.shape)
    left = jax.tree.map(lambda x, old: x.reshape(old.shape), left_BNR, left)
    if self.warm_start:
      right = right_BRM.reshape(right.shape)
    return mean_BNM.reshape(g.shape).astype(g.dtype), residual, left, right

  def _low_rank(self, count, m_BNM, left_BNR, right_BRM):
    """The mean, what this device counts as sent, and the factors for the next update."""

    def from_left(m_BNM, left_BNR, right_BRM):
      mean_BNM, own_BNM, new_BRM = _project(m_BNM, left_BNR, self.axis_name)
      sent_BNM = own_BNM if self.local_error else mean_BNM
      return mean_BNM, sent_BNM, left_BNR, _unless_zero(new_BRM, right_BRM)

    def from_right(m_BNM, left_BNR, right_BRM):
      mean_BMN, sent_BMN, right_BMR, left_BRN = from_left(m_BNM.mT, right_BRM.mT, left_BNR.mT)
      return mean_BMN.mT, sent_BMN.mT, left_BRN.mT, right_BMR.mT

    if self.alternates:
      even = count % 2 == 0
      return _axes.cond(even, from_right, from_left, m_BNM, left_BNR, right_BRM)
    new_BNR = _matmul(m_BNM, _orthonormal(right_BRM.mT))
    new_BNR = _axes.pmean_f32(new_BNR, self.axis_name)
    mean_BNM, sent_BNM, _, right_BRM = from_left(m_BNM, new_BNR, right_BRM)
    return mean_BNM, sent_BNM, left_BNR, right_BRM


def _project(m_BNM, left_BNR, axis_name: str):
  """The mean of all matrices projected on the columns of `left`, this device's own, its factor."""
  basis_BNR = _orthonormal(left_BNR)
  own_BRM = _matmul(basis_BNR.mT, m_BNM)
  mean_BRM = _axes.pmean_f32(own_BRM, axis_name)
  return _matmul(basis_BNR, mean_BRM), _matmul(basis_BNR, own_BRM), mean_BRM


def _orthonormal(x_BNR: jax.Array) -> jax.Array:
  """A basis of r columns, also where those of x do not span as much."""
  return jnp.linalg.qr(x_BNR)[0]


def _unless_zero(new: jax.Array, old: jax.Array) -> jax.Array:
  """A factor of zero gradients would span nothing that the next ones need."""
  return jnp.where(jnp.any(new != 0, axis=(1, 2), keepdims=True), new, old)


def _check_factors(plans: dict[str, _Plan | None], rights: list[Any]) -> None:
  for (name, plan), right in zip(plans.items(), rights):
    want = plan.right_shape if plan else None
    got = None if isinstance(right, optax.MaskedNode) else right.shape
    if got != want:
      raise ValueError(
        f"`specs` and `mesh` must be given for leaves that are sharded: the right factor of"
        f" {name or 'the root'} must have shape {want} on this mesh, got {got}."
      )


def _check_options(variant, error, error_feedback, warm_start, min_compression_rate) -> None:
  if variant not in ("two_sided", "alternating"):
    raise ValueError(f"`variant` must be 'two_sided' or 'alternating', got {variant!r}.")
  if error not in ("local", "global"):
    raise ValueError(f"`error` must be 'local' or 'global', got {error!r}.")
  if error == "global" and not error_feedback:
    raise ValueError("`error` has no effect without `error_feedback`, got 'global'.")
  if variant == "alternating" and not warm_start:
    raise ValueError("`warm_start` must be True for `variant='alternating'`, got False.")
  if not min_compression_rate > 0:
    raise ValueError(f"`min_compression_rate` must be positive, got {min_compression_rate!r}.")
