"""What the training step of a partition plan does on one device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm.training import TrainState
from jaxcomm.training._layout import Layout
from jaxcomm.transforms import apply_updates, exchange_level, just_synced
from jaxcomm.transforms._local_updates import at_outer_params
from parallel import _zero_hops
from parallel._zero_costs import copied_axes
from parallel._zero_hops import scatter_levels, vary_all
from parallel._zero_plan import PartitionPlan, axes_of
from parallel._zero_shards import is_shard, leaf_keys, make_shards, make_weights
from parallel.mesh import REPLICA

P = jax.P
LossFn = Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class StepParts:
  """The arguments of `make_zero_step`, and what its step does on one device."""

  loss_fn: LossFn
  tx: optax.GradientTransformation
  mesh: jax.sharding.Mesh
  plan: PartitionPlan
  dtype: Any
  shapes: Any
  grad_accum: int
  seed: int

  @property
  def inner(self) -> tuple[str, ...]:
    return tuple(a for a in self.mesh.axis_names if a != REPLICA)

  def flatten(self, x: jax.Array, like: Any) -> jax.Array:
    padded = self.plan.padded_size(like.size, self.mesh.shape)
    return _zero_hops.flatten(x.astype(jnp.float32), like.shape, padded)

  def step(self, layout: Layout) -> Callable:
    def local_step(state: TrainState, batch):
      grads, metrics = self.gradients(state, batch)
      updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
      params = apply_updates(state.params, updates, opt_state)
      return self.clear_padding(TrainState(state.step + 1, params, opt_state)), metrics

    over_replicas = layout.over_replicas(self.on_devices(layout, local_step, True))

    def step(state, batch):
      self.check_rows(batch)
      state, metrics = over_replicas(state, batch)
      found = {"synced": just_synced(state.opt_state), "level": exchange_level(state.opt_state)}
      return state, metrics | {name: x for name, x in found.items() if x is not None}

    return step

  def clear_padding(self, state: TrainState) -> TrainState:
    """Zeros where leaves are padded: votes and means of signs write others there.

    So a checkpoint, which has no padding, loses nothing, and no scale of a block depends on it.
    """
    axes = axes_of(self.plan.optimizer)

    def leaf(x, like):
      if self.plan.padded_size(like.size, self.mesh.shape) == like.size:
        return x
      part = jax.lax.axis_index(axes) if axes else 0
      whole, rest = divmod(like.size, x.shape[-1])  # parts without padding, elements of the next
      count = jnp.where(part < whole, x.shape[-1], jnp.where(part == whole, rest, 0))
      kept = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) < count
      return jnp.where(kept, x, jnp.zeros_like(x))

    return map_leaves(self.tx, leaf, state, self.shapes)

  def evaluate(self, layout: Layout) -> Callable:
    def local_eval(state: TrainState, batch):
      params = at_outer_params(state.params, state.opt_state)
      weights = make_weights(params, self.shapes, self.plan, self.dtype)
      loss, aux = self.loss_fn(make_shards(weights, self.shapes, self.plan, None), batch)
      tokens = jnp.asarray(aux.get("tokens", 1.0), jnp.float32)
      sums = {"loss_sum": loss.astype(jnp.float32) * tokens, "tokens": tokens}
      return self.sum_scalars(sums)

    return layout.over_replicas(self.on_devices(layout, local_eval, False), returns_state=False)

  def on_devices(self, layout: Layout, fn: Callable, returns_state: bool) -> Callable:
    """`fn(state, batch)` of one device as a function of one replica's arrays."""
    specs = layout.local_specs
    return jax.shard_map(
      fn,
      in_specs=(specs, P(self.inner)),
      out_specs=(specs, P()) if returns_state else P(),
      axis_names=set(self.inner),
    )

  def gradients(self, state: TrainState, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    """This device's part over `plan.optimizer` of the mean gradient, float32, and the metrics."""
    plan = self.plan
    weights = make_weights(state.params, self.shapes, plan, self.dtype)
    key = jax.random.fold_in(jax.random.key(self.seed), state.step) if plan.grad_bits else None
    grads, sums = self.micro_steps(weights, batch, key)
    sums = self.sum_scalars(sums)
    mean = {k: v if k == "tokens" else v / sums["tokens"] for k, v in sums.items()}
    scale = math.prod(self.mesh.shape[a] for a in self.inner) / sums["tokens"]
    copies = copied_axes(plan, self.mesh.axis_names)

    def finish(path, grad, like):
      last_key = leaf_keys(_fold_in(key, self.grad_accum), path, ())
      grad = grad.astype(self.dtype)
      grad = scatter_levels(grad, plan.last_hops, plan, like.size, last_key)
      grad = grad.astype(jnp.float32)
      return (jax.lax.pmean(grad, copies) if copies else grad) * scale

    return jax.tree_util.tree_map_with_path(finish, grads, self.shapes), mean

  def micro_steps(self, weights: Any, batch: Any, key: jax.Array | None) -> Any:
    """Over this device's rows, weighted by tokens: parts of the gradients, and sums of metrics."""

    def micro_step(rows, index):
      shards = make_shards(weights, self.shapes, self.plan, _fold_in(key, index))
      slots = jax.tree.map(lambda s: s.slot, shards, is_leaf=is_shard)
      return jax.grad(self.objective, has_aux=True)(slots, shards, rows)

    if self.grad_accum == 1:
      return micro_step(batch, 0)

    def body(total, inputs):
      new = jax.tree.map(lambda x: x.astype(jnp.float32), micro_step(*inputs))
      return jax.tree.map(jnp.add, total, new), None

    rows = jax.tree.map(lambda x: x.reshape(self.grad_accum, -1, *x.shape[1:]), batch)
    like = jax.eval_shape(micro_step, jax.tree.map(lambda x: x[0], rows), 0)
    zeros = vary_all(jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), like))
    return jax.lax.scan(body, zeros, (rows, jnp.arange(self.grad_accum)))[0]

  def objective(self, slots: Any, shards: Any, rows: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This device's loss times its tokens, and all metrics times them, as float32 scalars."""
    shards = jax.tree.map(lambda s, slot: s.replace(slot=slot), shards, slots, is_leaf=is_shard)
    loss, aux = self.loss_fn(shards, rows)
    aux = {k: jnp.asarray(v, jnp.float32) for k, v in aux.items()}
    tokens = aux.pop("tokens", jnp.ones(()))
    loss = loss.astype(jnp.float32) * tokens
    sums = {"loss": loss, **{k: v * tokens for k, v in aux.items()}, "tokens": tokens}
    return loss, vary_all(sums)

  def sum_scalars(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Sums over the devices of a replica, in one all-reduce."""
    total = jax.lax.psum(vary_all(jnp.stack(list(sums.values()))), self.inner)
    return dict(zip(sums, total))

  def check_rows(self, batch: Any) -> None:
    needed = self.mesh.size * self.grad_accum
    for x in jax.tree.leaves(batch):
      if not x.shape or x.shape[0] % needed:
        raise ValueError(
          f"`batch` must have rows divisible by devices * grad_accum = {self.mesh.size} *"
          f" {self.grad_accum}, got an array of shape {x.shape}."
        )


def map_leaves(
  tx: optax.GradientTransformation, fn: Callable, state: TrainState, shapes: Any
) -> TrainState:
  """`fn(x, layer's shape)` on parameters and on what the optimizer keeps for each of them."""
  masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
  opt_state = optax.tree.map_params(
    tx,
    lambda x, like: x if masked(x) else fn(x, like),
    state.opt_state,
    shapes,
    is_leaf=masked,
  )
  return TrainState(state.step, jax.tree.map(fn, state.params, shapes), opt_state)


def _fold_in(key: jax.Array | None, data: Any) -> jax.Array | None:
  return None if key is None else jax.random.fold_in(key, data)
