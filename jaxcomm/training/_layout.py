"""Where each leaf of a training state lives: equal everywhere, or one value per replica."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxcomm import _axes, _shards
from jaxcomm.transforms import (
  AdaGossipState,
  ADPSGDState,
  FragmentsState,
  LocalUpdatesState,
  SGPState,
  apply_updates,
  just_synced,
)
from jaxcomm.transforms._states import find_states

AxisType = jax.sharding.AxisType
P = jax.sharding.PartitionSpec
# Their `inner_state` is of an optimizer that sees one replica only.
_HAVE_INNER = (LocalUpdatesState, FragmentsState, SGPState, ADPSGDState, AdaGossipState)


class TrainState(struct.PyTreeNode):
  """What training carries. Leaves that differ per replica have a leading `replica` axis.

  Attributes:
    step: int32[], equal everywhere; steps taken.
    params: parameters; stacked over replicas if the method lets them differ.
    opt_state: of the optax transform, stacked leaf by leaf where it differs.
  """

  step: jax.Array
  params: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Placement of a `TrainState` on a mesh.

  Attributes:
    mesh: has an axis `replica`, of size 1 if replicas are stacked on the devices.
    num_replicas: R.
    param_specs: `PartitionSpec` of every parameter over the other axes.
    varying: `TrainState` of bool: which leaves have a leading axis of size R.
    shapes: `TrainState` of `jax.ShapeDtypeStruct` with `NamedSharding`.
  """

  mesh: jax.sharding.Mesh
  num_replicas: int
  param_specs: Any
  varying: TrainState
  shapes: TrainState

  @property
  def row_axes(self) -> tuple[str, ...]:
    """Mesh axes that cut the rows of a batch: along the others devices work on the same rows."""
    return tuple(a for a in self.mesh.axis_names if a not in ("stage", "seq", "tensor"))

  @property
  def stacked(self) -> bool:
    """Whether replicas share devices (`jax.vmap`) instead of having their own."""
    return self.mesh.shape["replica"] != self.num_replicas

  @property
  def shardings(self) -> TrainState:
    """`TrainState` of `NamedSharding`."""
    return jax.tree.map(lambda s: s.sharding, self.shapes)

  def stack(self, state: TrainState) -> TrainState:
    """Copies the leaves that will differ to every replica."""

    def leaf(x, varies):
      return jnp.broadcast_to(x, (self.num_replicas, *x.shape)) if varies else x

    return jax.tree.map(leaf, state, self.varying)

  @property
  def local_specs(self) -> TrainState:
    """`TrainState` of `PartitionSpec`: each leaf of one replica over the other axes."""

    def local(shape, varies):
      spec = shape.sharding.spec
      return P(*spec[1:]) if varies else spec

    return jax.tree.map(local, self.shapes, self.varying)

  def typed(self, fun: Callable, in_specs: Any) -> Callable:
    """`fun` of one replica, its arguments sharded by `in_specs`; in their types on Explicit axes.

    On Auto axes the compiler is told too: else it may shard a replicated leaf while it updates it,
    and gather it afterwards.
    """
    if self.mesh.size == self.mesh.shape["replica"]:
      return fun
    explicit = tuple(a for a in self._explicit_axes if a != "replica")
    if explicit:
      known = jax.tree.map(lambda s: _shards.only(s, explicit), in_specs)
      fun = jax.sharding.explicit_axes(fun, axes=explicit, in_sharding=known)

    def call(*args):
      mesh = self.mesh if self.stacked else jax.sharding.get_abstract_mesh()
      shardings = jax.tree.map(lambda s: jax.NamedSharding(mesh, s), in_specs)
      return fun(*jax.lax.with_sharding_constraint(args, shardings))

    return call

  @property
  def _explicit_axes(self) -> tuple[str, ...]:
    kinds = zip(self.mesh.axis_names, self.mesh.axis_types)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)

  def over_replicas(self, fun: Callable, *, returns_state: bool = True) -> Callable:
    """Lifts `fun(state, batch)` of one replica to the stacked state and the global batch.

    `fun` returns `(state, metrics)`, or only metrics; metrics come back as float32[R].
    """
    local = fun if returns_state else lambda state, batch: ((), fun(state, batch))
    lifted = self._vmapped if self.stacked else self._sharded
    out = lifted(local, self.varying if returns_state else ())
    return out if returns_state else lambda state, batch: out(state, batch)[1]

  def _sharded(self, fun: Callable, varying_out: Any) -> Callable:
    def spec(varies):
      return P("replica") if varies else P()

    def body(state, batch):
      state = jax.tree.map(lambda x, varies: x[0] if varies else x, state, self.varying)
      state, metrics = fun(state, batch)
      lead = lambda x: _axes.vary(x, "replica")[None]  # noqa: E731
      state = jax.tree.map(lambda x, varies: lead(x) if varies else x, state, varying_out)
      return state, jax.tree.map(lambda x: lead(jnp.asarray(x, jnp.float32)), metrics)

    # JAX 0.10 gathers what is sharded over an Explicit axis where it enters or leaves a region that
    # is manual over other axes only: cross that border with Auto axes.
    explicit = self._explicit_axes
    call = jax.shard_map(
      body,
      mesh=None if explicit else self.mesh,
      in_specs=(jax.tree.map(spec, self.varying), P("replica")),
      out_specs=(jax.tree.map(spec, varying_out), P("replica")),
      axis_names={"replica"},
    )
    if not explicit:
      return call

    def typed(spec):  # types know Explicit axes only
      return jax.NamedSharding(self.mesh, _shards.only(spec, explicit))

    state_out = jax.tree.map(lambda s: typed(s.spec), self.shardings) if varying_out else ()
    out = (state_out, typed(P("replica")))
    return jax.sharding.auto_axes(call, axes=explicit, out_sharding=out)

  def _vmapped(self, fun: Callable, varying_out: Any) -> Callable:
    def axis(varies):
      return 0 if varies else None

    def call(state, batch):
      with _shards.around_stacked_replicas(self.mesh):
        return jax.vmap(
          fun,
          in_axes=(jax.tree.map(axis, self.varying), 0),
          out_axes=(jax.tree.map(axis, varying_out), 0),
          axis_name="replica",
        )(state, jax.tree.map(self._split_rows, batch))

    return call

  def _split_rows(self, x: jax.Array) -> jax.Array:
    """[rows, ...] to [R, rows / R, ...], each replica's rows spread over the devices.

    Without the constraint the compiler would give whole replicas to devices, and gather their
    parameters and optimizer states in every step.
    """
    x = x.reshape(self.num_replicas, -1, *x.shape[1:])
    spec = P(None, self.row_axes)
    if not _shards.divides(spec, x.shape, self.mesh):
      return x
    return jax.lax.with_sharding_constraint(x, jax.NamedSharding(self.mesh, spec))


def init_state(
  init_params: Callable[[jax.Array], Any], tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """The state of one replica at step 0."""
  params = init_params(key)
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_layout(
  init_params: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  param_specs: Any,
  num_replicas: int,
  *,
  equal_grads: bool = False,
) -> Layout:
  """Finds by types which leaves differ per replica, and gives every leaf a sharding."""
  if mesh.shape["replica"] != num_replicas and AxisType.Explicit in mesh.axis_types:
    raise ValueError(
      "replicas can be stacked on the devices only on a `mesh` of Auto axes,"
      f" got {dict(zip(mesh.axis_names, mesh.axis_types))}."
    )
  key = jax.eval_shape(lambda: jax.random.key(0))
  shapes = jax.eval_shape(lambda k: init_state(init_params, tx, k), key)
  if param_specs is None or isinstance(param_specs, P):
    one = P() if param_specs is None else param_specs
    param_specs = jax.tree.map(lambda _: one, shapes.params)
  specs = TrainState(cast(Any, P()), param_specs, _opt_specs(tx, shapes, param_specs, mesh))
  varying = _varying_leaves(tx, mesh, num_replicas, shapes, specs, equal_grads)
  replica = "replica" if mesh.shape["replica"] == num_replicas else None

  def place(shape, spec, varies):
    lead = (num_replicas,) if varies else ()
    spec = P(replica, *spec) if varies else spec
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct((*lead, *shape.shape), shape.dtype, sharding=sharding)

  return Layout(
    mesh=mesh,
    num_replicas=num_replicas,
    param_specs=param_specs,
    varying=varying,
    shapes=jax.tree.map(place, shapes, specs, varying),
  )


def _opt_specs(
  tx: optax.GradientTransformation, shapes: TrainState, param_specs: Any, mesh: jax.sharding.Mesh
) -> Any:
  """Like the parameter where an array of the state has its shape, or as many dimensions that its
  spec divides (something of every shard); else replicated."""
  masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

  def like_param(x, param, spec):
    if masked(x):
      return x
    parts = x.ndim == param.ndim and _shards.divides(spec, x.shape, mesh)
    return spec if x.shape == param.shape or parts else P()  # factored moments are neither

  return optax.tree.map_params(
    tx,
    like_param,
    shapes.opt_state,
    shapes.params,
    param_specs,
    transform_non_params=lambda _: P(),
    is_leaf=masked,
  )


def _varying_leaves(tx, mesh, num_replicas, shapes, specs, equal_grads) -> TrainState:
  """Least set of leaves typed as differing over `replica` that one update maps into itself.

  Everything starts equal; gradients differ, but for `equal_grads`. What an update types as varying
  must be stored per replica, which may make more vary, until nothing changes.
  """
  sizes = {**mesh.shape, "replica": num_replicas}
  abstract = jax.sharding.AbstractMesh(
    tuple(sizes.values()), tuple(sizes), axis_types=mesh.axis_types
  )
  varying = jax.tree.map(lambda _: False, shapes)
  while True:
    try:
      found = _vary_once(tx, abstract, varying, shapes, specs, equal_grads)
    except (TypeError, AssertionError) as e:  # the latter from zeros_like in optax.MultiSteps
      found = _with_varying_inner(varying)
      if jax.tree.leaves(found) == jax.tree.leaves(varying):
        _explain(e, shapes.opt_state)
        raise
    _check_skipping(found.opt_state)
    if just_synced(found.opt_state):
      raise ValueError(
        "`tx` must end rounds on all replicas at once, but its step counter differs per replica:"
        " what skips steps by a replica's own gradient belongs inside `inner`."
      )
    if jax.tree.leaves(found) == jax.tree.leaves(varying):
      return varying
    varying = found


def _vary_once(tx, mesh, varying, shapes, specs, equal_grads) -> TrainState:
  found: list[TrainState] = []
  grads_vary = jax.tree.map(lambda _: not equal_grads, shapes.params)

  def update(state: TrainState, grads):
    local = lambda x, varies: x[0] if varies else x  # noqa: E731
    state = jax.tree.map(local, state, varying)
    grads = jax.tree.map(local, grads, grads_vary)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates, opt_state)
    new = TrainState(state.step, params, opt_state)
    differs = jax.tree.map(lambda x: "replica" in _axes.varying_axes(x), new)
    found.append(jax.tree.map(lambda a, b: a or b, differs, varying))
    return ()

  def stacked(shape, spec, varies):
    lead = (mesh.shape["replica"],) if varies else ()
    sharding = jax.NamedSharding(mesh, P("replica", *spec) if varies else spec)
    return jax.ShapeDtypeStruct((*lead, *shape.shape), shape.dtype, sharding=sharding)

  manual = jax.shard_map(
    update,
    mesh=mesh,
    in_specs=jax.tree.map(lambda v: P("replica") if v else P(), (varying, grads_vary)),
    out_specs=(),
    axis_names={"replica"},
  )
  grads = jax.tree.map(stacked, shapes.params, specs.params, grads_vary)
  jax.eval_shape(manual, jax.tree.map(stacked, shapes, specs, varying), grads)
  return found[-1]


def _with_varying_inner(varying: TrainState) -> TrainState:
  """`varying`, and all that inner optimizers keep.

  A condition in one of them (`optax.apply_if_finite`) has branches of unequal types, one with what
  the gradient changed and one with what was there, for as long as the latter counts as equal.
  """

  def leaf(x):
    if not isinstance(x, _HAVE_INNER):
      return x
    return x._replace(inner_state=jax.tree.map(lambda _: True, x.inner_state))

  return jax.tree.map(leaf, varying, is_leaf=lambda x: isinstance(x, _HAVE_INNER))


_SKIPPING = (
  "`tx` must not hold optax.apply_if_finite around a mean: by its own gradient one replica would"
  " skip an exchange that the others wait for; put it into `inner` of a method that has one, or"
  " behind the mean."
)


def _check_skipping(varying: Any) -> None:
  """Raises ValueError if replicas that exchange may each skip a step."""
  for state in find_states(varying, optax.ApplyIfFiniteState, outside=_HAVE_INNER):
    if state.last_finite:
      raise ValueError(_SKIPPING)


def _explain(error: Exception, opt_state: Any) -> None:
  """Raises ValueError in place of an error of types whose cause is known."""
  if "MultiStepsState" in str(jax.tree.structure(opt_state)):
    raise ValueError(
      "`tx` must not hold optax.MultiSteps over values that differ per replica (its two branches"
      " get unequal types): accumulate gradients in `loss_fn`, or put the mean before it."
    ) from error
  if find_states(opt_state, optax.ApplyIfFiniteState, outside=_HAVE_INNER):
    raise ValueError(_SKIPPING) from error
