"""From a loss, an optax transform and a mesh to one compiled training step.

The step is manual over `replica` only: there the transform decides what crosses the slow link.
Everything else (`data`, `fsdp`, `seq`, `tensor`) is left to the compiler through shardings.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.collectives import consensus_distance
from jaxcomm.training._compiler_options import overlap_options
from jaxcomm.training._layout import Layout, TrainState, init_state, make_layout
from jaxcomm.transforms import apply_updates, exchange_level, just_synced
from jaxcomm.transforms._local_updates import at_outer_params, select_outer_params
from jaxcomm.transforms.healthy_mean import left_out

P = jax.sharding.PartitionSpec
LossFn = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
  """A training step with the layout of its state. Made by `make_train_step`.

  Attributes:
    init: `init(key) -> TrainState`, sharded: no device holds more than its part.
    step: `step(state, batch) -> (state, metrics)`, jitted, donates `state`. Metrics are float32[R],
      one value per replica (nothing crosses the slow link for them); `synced`, bool[], says
      whether this step ended a round, if the method has rounds; `level`, int32[], how much it
      exchanged (`exchange_level`), unless every step exchanges the same; `total_left_out`, replicas
      left out of means so far, if the method may leave some out (`healthy_mean`).
    evaluate: `evaluate(state, batch) -> {"loss_sum", "tokens"}`, float32[R] each: at the outer
      parameters where the method keeps them, else at each replica's own; every replica takes its
      rows of the batch.
    layout: which leaves differ per replica, and the sharding of each.
    tx: the optax transform.
    disagreement: `disagreement(state) -> float32[R]`, all equal: how far the parameters that
      `evaluate` takes are apart (`consensus_distance`), for the price of a dense mean over
      `replica`; None where they are equal on all replicas.
  """

  init: Callable[[jax.Array], TrainState]
  step: Any
  evaluate: Any
  layout: Layout
  tx: optax.GradientTransformation
  disagreement: Any = None

  @property
  def logical_layout(self) -> Layout:
    """Of `to_logical`'s result: what checkpoints hold."""
    return self.layout

  def to_logical(self, state: TrainState) -> TrainState:
    """The state as it is saved: each array in its parameter's shape. Here the state itself."""
    return state

  def from_logical(self, state: TrainState) -> TrainState:
    """The inverse of `to_logical`."""
    return state

  @property
  def batch_sharding(self) -> jax.sharding.NamedSharding:
    """Of every leaf of a batch: rows over `Layout.row_axes`, tokens over `seq` if it is cut."""
    mesh = self.layout.mesh
    tokens = ("seq",) if mesh.shape.get("seq", 1) > 1 else ()
    return jax.NamedSharding(mesh, P(self.layout.row_axes, *tokens))

  def abstract_batch(self, batch: Any) -> Any:
    """`jax.ShapeDtypeStruct`s like `batch`, with its sharding."""
    sharding = self.batch_sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)

  def local_rows(self, batch_size: int) -> dict[str, int]:
    """`row_start` and `row_count`: the rows of a global batch that this process reads.

    Raises:
      ValueError: `batch_size` is not divisible by the parts into which the mesh cuts rows and by
        replicas, or the rows of this process are not neighbours (order the devices by process).
    """
    mesh, replicas = self.layout.mesh, self.layout.num_replicas
    shards = math.prod(mesh.shape[axis] for axis in self.layout.row_axes)
    if batch_size < 1 or batch_size % shards or batch_size % replicas:
      raise ValueError(
        f"`batch_size` must be a positive number divisible by the {shards} devices that share its"
        f" rows and the {replicas} replicas, got {batch_size}."
      )
    rows_only = jax.NamedSharding(mesh, P(self.layout.row_axes))
    parts: Any = rows_only.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({i for (part,) in parts for i in range(*part.indices(batch_size))})
    if rows[-1] - rows[0] + 1 != len(rows):
      raise ValueError(f"the rows of this process must be neighbours in `mesh`, got {rows}.")
    return {"row_start": rows[0], "row_count": len(rows)}

  def compile(self, batch: Any) -> jax.stages.Compiled:
    """The compiled step for batches shaped like `batch`; nothing runs."""
    return self.step.lower(self.layout.shapes, self.abstract_batch(batch)).compile()


def make_train_step(
  loss_fn: LossFn,
  init_params: Callable[[jax.Array], Any],
  tx: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  *,
  param_specs: Any = None,
  num_replicas: int | None = None,
  eval_loss_fn: LossFn | None = None,
  mean_in_loss: bool = False,
  step_in_loss: bool = False,
) -> TrainStep:
  """Builds the step; which state differs per replica is read from the types of the update.

  Wire: over `replica` only what `tx` sends; over the other axes what the compiler inserts for
  data parallelism and FSDP. The step is compiled with `overlap_options` of the mesh's devices.

  Args:
    loss_fn: `(params, batch) -> (loss, aux)`: the mean loss over the batch given, and a dict of
      scalars (`tokens`, the number of targets, weights the evaluation).
    init_params: `key -> params`, traceable.
    tx: transform that averages over `replica` (`pmean_over`, `diloco`, ...).
    mesh: with an axis `replica`; the other axes shard batch and parameters: rows of a batch over
      all but `stage`, `seq` and `tensor`, tokens over `seq`.
    param_specs: a `PartitionSpec` per parameter over the other axes; default replicated.
    num_replicas: default the size of the mesh axis. More, with a mesh axis of size 1, stacks the
      replicas on the devices under `jax.vmap`.
    eval_loss_fn: of `evaluate`, like `loss_fn`, which is the default.
    mean_in_loss: gradients of `loss_fn` are means over `replica` already: all weights pass through
      `parallel.mean_in_backward`. `tx` then needs no mean.
    step_in_loss: `loss_fn` takes a third argument, int32[], the steps taken so far: it can draw by
      it, and draws the same after a resume. `eval_loss_fn` does not take it, and must be given.

  Raises:
    ValueError: the mesh lacks `replica`, its size is neither 1 nor `num_replicas`, replicas are to
      be stacked on a mesh with Explicit axes, `step_in_loss` comes without an `eval_loss_fn`, or
      the types of `tx` do not work out: an outer chain without a mean, a round counter that differs
      per replica, optax.MultiSteps before the mean, optax.apply_if_finite around it.

  Example:
    >>> import jax, jax.numpy as jnp, optax, jaxcomm
    >>> from jaxcomm.training import make_train_step
    >>> mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> loss = lambda p, batch: (jnp.mean((p["w"] - batch["x"]) ** 2), {})
    >>> tx = jaxcomm.diloco(optax.sgd(0.1), sync_period=10)
    >>> ts = make_train_step(loss, lambda key: {"w": jnp.zeros(())}, tx, mesh, num_replicas=2)
    >>> state, metrics = ts.step(ts.init(jax.random.key(0)), {"x": jnp.ones((4,))})
    >>> metrics["loss"].tolist(), state.params["w"].shape
    ([1.0, 1.0], (2,))
  """
  if step_in_loss and eval_loss_fn is None:
    raise ValueError("`eval_loss_fn` must be given with `step_in_loss`: evaluation has no step.")
  if "replica" not in mesh.shape:
    raise ValueError(f"`mesh` must have an axis 'replica', got axes {mesh.axis_names}.")
  size = mesh.shape["replica"]
  num_replicas = size if num_replicas is None else num_replicas
  if isinstance(num_replicas, bool) or not isinstance(num_replicas, int) or num_replicas < 1:
    raise ValueError(f"`num_replicas` must be an integer >= 1, got {num_replicas!r}.")
  if size not in (1, num_replicas):
    raise ValueError(
      f"mesh axis 'replica' must have size 1 or `num_replicas`={num_replicas}, got {size}."
    )
  layout = make_layout(init_params, tx, mesh, param_specs, num_replicas, equal_grads=mean_in_loss)
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

  def update(state: TrainState, grads):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = apply_updates(state.params, updates, opt_state)
    return TrainState(state.step + 1, params, opt_state)

  typed_update = layout.typed(update, (layout.local_specs, layout.param_specs))

  def local_step(state: TrainState, batch):
    # Equal parameters get the sum of the gradients, unless the loss casts and averages itself.
    params = state.params if mean_in_loss else _axes.vary(state.params, "replica")
    (loss, aux), grads = grad_fn(params, batch, *([state.step] if step_in_loss else []))
    state = typed_update(state, grads)
    return state, {"loss": loss, **aux, **left_out(state.opt_state)}

  def local_eval(state: TrainState, batch):
    loss, aux = (eval_loss_fn or loss_fn)(at_outer_params(state.params, state.opt_state), batch)
    tokens = jnp.asarray(aux.get("tokens", 1.0), jnp.float32)
    return {"loss_sum": loss.astype(jnp.float32) * tokens, "tokens": tokens}

  def local_distance(state: TrainState, batch):
    del batch
    return consensus_distance(at_outer_params(state.params, state.opt_state), "replica")

  def distance(state):
    return layout.over_replicas(local_distance, returns_state=False)(state, ())

  evaluated = select_outer_params(layout.varying.params, layout.varying.opt_state)

  def step(state, batch):
    state, metrics = layout.over_replicas(local_step)(state, batch)
    found = {"synced": just_synced(state.opt_state), "level": exchange_level(state.opt_state)}
    return state, metrics | {name: x for name, x in found.items() if x is not None}

  def init(key):
    return layout.stack(init_state(init_params, tx, key))

  return TrainStep(
    init=jax.jit(init, out_shardings=layout.shardings),
    step=jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(layout.shardings, None),
      compiler_options=overlap_options(mesh.devices.flat[0]) or None,
    ),
    evaluate=jax.jit(layout.over_replicas(local_eval, returns_state=False)),
    layout=layout,
    tx=tx,
    disagreement=jax.jit(distance) if any(jax.tree.leaves(evaluated)) else None,
  )
