"""ZeRO, ZeRO++ and partitioning by levels of a mesh: the training step of a plan.

Between steps a device holds its part of the float32 parameters and of the optimizer's state over
`plan.optimizer`, and nothing else: weights in the dtype of the computation, and the secondary copy,
are made from them in each step. So there is no second copy that could be out of date.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm.training import TrainState, TrainStep, overlap_options
from jaxcomm.training._layout import Layout, init_state, make_layout
from parallel import _zero_hops
from parallel._zero_optimizer import check_elementwise
from parallel._zero_plan import PartitionPlan, axes_of, check_mesh, layer_shapes
from parallel._zero_step import LossFn, StepParts, map_leaves
from parallel.mesh import REPLICA

P = jax.P


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroStep(TrainStep):
  """A `TrainStep` whose state is flat, padded and sharded; made by `make_zero_step`.

  Attributes:
    plan: the plan.
    shapes: `jax.ShapeDtypeStruct` of one layer of each parameter.
  """

  plan: PartitionPlan
  shapes: Any

  @functools.cached_property
  def logical_layout(self) -> Layout:
    """That of `to_logical`'s result; the same for every plan, but for meshes and shardings."""
    params = jax.tree.map(lambda s: s.sharding.spec, self.logical_shapes.params)
    local = lambda spec, varies: P(*spec[1:]) if varies else spec  # noqa: E731
    return dataclasses.replace(
      self.layout,
      shapes=self.logical_shapes,
      param_specs=jax.tree.map(local, params, self.layout.varying.params),
    )

  def to_logical(self, state: TrainState) -> TrainState:
    """The state with every array in the shape of its parameter, as any plan can restore it.

    Arrays that may differ per replica keep their leading axis of replicas, also of one.

    Wire: what moves flat parts to `logical_shapes`: nothing for leaves whose first axis (after
    replicas and layers) the devices divide.
    """
    return self._to_logical(state)

  def from_logical(self, state: TrainState) -> TrainState:
    """The inverse of `to_logical`: flat, padded and sharded by this plan."""
    return self._from_logical(state)

  @functools.cached_property
  def _to_logical(self) -> Callable:
    return self._jit(self._unflatten, self.logical_shapes)

  @functools.cached_property
  def _from_logical(self) -> Callable:
    return self._jit(self._flatten, self.layout.shapes)

  def _jit(self, fn: Callable, shapes: TrainState) -> Callable:
    out = jax.tree.map(lambda s: s.sharding, shapes)
    kinds = zip(self.layout.mesh.axis_names, self.layout.mesh.axis_types)
    explicit = tuple(a for a, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    if explicit:  # types cannot say how a part of a sharded axis is sharded
      fn = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out)
    return jax.jit(fn, out_shardings=out)

  @functools.cached_property
  def logical_shapes(self) -> TrainState:
    """`jax.ShapeDtypeStruct`s with shardings of `to_logical`'s result, to restore a checkpoint."""
    untyped = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), self.layout.shapes)
    shapes = jax.eval_shape(self._unflatten, untyped)
    mesh, axes = self.layout.mesh, axes_of(self.plan.optimizer)

    def place(flat, logical):
      spec = flat.sharding.spec
      if flat.shape != logical.shape or (len(spec) and spec[-1] is not None):
        lead = max(len(spec), flat.ndim) - 1
        spec = P(*(spec[i] for i in range(lead)), _first_axis(logical.shape[lead:], axes, mesh))
      sharding = jax.NamedSharding(mesh, spec)
      return jax.ShapeDtypeStruct(logical.shape, logical.dtype, sharding=sharding)

    return jax.tree.map(place, self.layout.shapes, shapes)

  def _unflatten(self, state: TrainState) -> TrainState:
    unflatten = lambda x, like: _zero_hops.unflatten(x, like.shape)  # noqa: E731
    return map_leaves(self.tx, unflatten, state, self.shapes)

  def _flatten(self, state: TrainState) -> TrainState:
    sizes = self.layout.mesh.shape

    def leaf(x, like):
      return _zero_hops.flatten(x, like.shape, self.plan.padded_size(like.size, sizes))

    return map_leaves(self.tx, leaf, state, self.shapes)


def _first_axis(shape: tuple[int, ...], axes: tuple[str, ...], mesh: Any) -> Any:
  """The most of `axes`, from the first on, that divide the first dimension of `shape`."""
  for n in range(len(axes), 0, -1):
    if shape and shape[0] % math.prod(mesh.shape[a] for a in axes[:n]) == 0:
      return axes[:n]
  return None


def make_zero_step(
  loss_fn: LossFn,
  init_params: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  plan: PartitionPlan,
  *,
  dtype: Any = jnp.float32,
  stacked: Any = False,
  grad_accum: int = 1,
  seed: int = 0,
) -> ZeroStep:
  """Builds the training step of `plan`; all axes of `mesh` but `replica` share a batch's rows.

  In one step: make weights of the float32 parameters (once), then per micro-step forward and
  backward, each layer gathered before and its gradient reduce-scattered after its use; then the
  last hops of the gradient, and the optimizer on this device's part. The gradient is the mean over
  all rows of a replica; `tokens` in the loss's aux, if there, weighs the devices' means.

  Wire per level: `traffic_per_step`, and one all-reduce of the scalars in the metrics; over
  `replica` what `tx` sends. Restore on another topology: through `to_logical`.

  Args:
    loss_fn: `(shards, batch) -> (loss, aux)`, on a device's own rows: `shards` is a tree of
      `Shard` in the structure of the parameters, to be used through `partitioned`.
    init_params: `key -> params`, traceable.
    tx: works element by element, or sums over shards (`clip_by_global_norm` of this package); it
      also averages over `replica`, where there are several.
    mesh: has the axes of `plan`, and `replica`, of size 1 if there is one.
    plan: the plan.
    dtype: that the model computes in: float32 or bfloat16; also on the wire.
    stacked: tree prefix of bool: leaves with a leading axis of layers, gathered one at a time.
    grad_accum: micro-steps, added up in float32.
    seed: of stochastic rounding.

  Raises:
    ValueError: the mesh lacks `replica` or an axis of the plan, a parameter is not floating point,
      `tx` mixes elements, `dtype` or `grad_accum` is out of range; in a call of the step, a batch
      that devices times micro-steps do not divide.

  Sources: see `PartitionPlan`.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> from parallel import PartitionPlan, partitioned
    >>> mesh = jax.make_mesh((1, 2, 4), ("replica", "node", "gpu"), devices=jax.devices()[:8])
    >>> plan = PartitionPlan.zeropp(("node", "gpu"), "gpu")
    >>> def loss(params, batch):
    ...   return jnp.mean((batch["x"] @ params["w"]) ** 2), {}
    >>> ts = make_zero_step(
    ...   partitioned(loss, plan), lambda key: {"w": jnp.ones((4, 3))}, optax.sgd(0.1), mesh, plan
    ... )
    >>> state, metrics = ts.step(ts.init(jax.random.key(0)), {"x": jnp.ones((8, 4))})
    >>> metrics["loss"].tolist(), ts.to_logical(state).params["w"].shape
    ([16.0], (1, 4, 3))
  """
  _check(mesh, plan, dtype, grad_accum)
  params = jax.eval_shape(init_params, jax.random.key(0))
  shapes = layer_shapes(params, stacked)
  check_elementwise(tx, shapes, axes_of(plan.optimizer))
  parts = StepParts(loss_fn, tx, mesh, plan, jnp.dtype(dtype), shapes, grad_accum, seed)

  def init_flat(key):
    return jax.tree.map(parts.flatten, init_params(key), shapes)

  specs = flat_specs(params, plan, stacked=stacked)
  layout = make_layout(init_flat, tx, mesh, specs, mesh.shape[REPLICA])

  def init(key):
    return layout.stack(init_state(init_flat, tx, key))

  return ZeroStep(
    init=jax.jit(init, out_shardings=layout.shardings),
    step=jax.jit(
      parts.step(layout),
      donate_argnums=0,
      out_shardings=(layout.shardings, None),
      compiler_options=overlap_options(mesh.devices.flat[0]) or None,
    ),
    evaluate=jax.jit(parts.evaluate(layout)),
    layout=layout,
    tx=tx,
    plan=plan,
    shapes=shapes,
  )


def flat_specs(params: Any, plan: PartitionPlan, *, stacked: Any = False) -> Any:
  """The `PartitionSpec` of each parameter as the optimizer sees it: flat, or [layers, flat].

  For transforms that ask for `specs`, such as `jaxcomm.compressed_mean`.

  Args:
    params: tree of arrays or `jax.ShapeDtypeStruct`.
    plan, stacked: as in `make_zero_step`.

  >>> import jax
  >>> from parallel import PartitionPlan
  >>> flat_specs({"w": jax.ShapeDtypeStruct((2, 3, 4), "f4")}, PartitionPlan.topo(), stacked=True)
  {'w': P(None, ('gcd', 'gpu', 'node'))}
  """
  axes = axes_of(plan.optimizer) or None

  def spec(x, layer):
    return P(None, axes) if len(x.shape) > len(layer.shape) else P(axes)

  return jax.tree.map(spec, params, layer_shapes(params, stacked))


def shard_state(step: ZeroStep, params: Any) -> TrainState:
  """The state of `step` at step 0 with these parameters, for example of a checkpoint."""
  return step.from_logical(
    step.layout.stack(init_state(lambda _: params, step.tx, jax.random.key(0)))
  )


def _check(mesh: jax.sharding.Mesh, plan: PartitionPlan, dtype: Any, grad_accum: int) -> None:
  if REPLICA not in mesh.shape:
    raise ValueError(f"`mesh` must have an axis 'replica', got axes {mesh.axis_names}.")
  if REPLICA in axes_of(plan.optimizer):
    raise ValueError("`plan` must not name the axis 'replica': parameters may differ along it.")
  check_mesh(plan, mesh.axis_names)
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f"`dtype` must be float32 or bfloat16, got {dtype}.")
  if isinstance(grad_accum, bool) or not isinstance(grad_accum, int) or grad_accum < 1:
    raise ValueError(f"`grad_accum` must be an integer >= 1, got {grad_accum!r}.")
