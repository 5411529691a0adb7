"""1F1B in lockstep: a backward pass as soon as there is one, so that few inputs are held.

In a tick every stage does the forward pass of one microbatch and the backward pass of another,
as `schedule_table` says; the order is that of PipeDream-Flush (arXiv 2104.04473).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from parallel._pipeline_gpipe import zeros_of
from parallel._pipeline_parts import Line, LossFn, check_stage, read, split, where


class _Carry(NamedTuple):
  """What a stage keeps between ticks."""

  received: Any  # message from the stage before
  grad: jax.Array  # of the output, from the stage behind
  held: Any  # messages of the last 2 S - 1 microbatches, by number modulo 2 S - 1
  value: Any  # sums so far: (loss, aux) of this stage's part
  grads: Any  # float32, of (stage_params, shared)


def local_value_and_grad(
  line: Line, loss_fn: LossFn, stage_params: Any, shared: Any, batch: Any, step: Any
) -> tuple[Any, Any]:
  """This stage's parts of (loss, aux) and of the gradients of (stage_params, shared)."""
  batch = split(batch, line.num_microbatches)
  run = _Lockstep(line, loss_fn, stage_params, shared, batch, step)
  S, M = line.size, line.num_microbatches
  carry = run.start()
  # Ticks without any forward or backward pass are loops of their own, which cost less.
  for begin, end, work in (
    (0, S - 1, (True, False)),
    (S - 1, M + S - 1, (True, True)),
    (M + S - 1, M + 2 * (S - 1), (False, True)),
  ):
    if end > begin:
      body = lambda carry, t, work=work: (run.tick(carry, t, *work), None)  # noqa: E731
      carry, _ = jax.lax.scan(body, carry, jnp.arange(begin, end))
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), carry.grads, (stage_params, shared))
  return carry.value, grads


class _Lockstep(NamedTuple):
  line: Line
  loss_fn: LossFn
  stage_params: Any
  shared: Any
  batch: Any  # split
  step: Any

  @property
  def slots(self) -> int:
    return 2 * self.line.size - 1

  def start(self) -> _Carry:
    data = read(self.batch, 0)
    x = self.line.input_fn(self.shared, data)
    check_stage(self.line, self.stage_params, x, data)
    empty = self.line.empty(x, self.batch)
    held = jax.tree.map(lambda e: jnp.repeat(e[None], self.slots, axis=0), empty)
    value = zeros_of(jax.eval_shape(self.loss_fn, self.shared, x, data), like=x)
    params = (self.stage_params, self.shared)
    grads = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return _Carry(empty, empty[0], held, value, grads)

  def tick(self, carry: _Carry, t: jax.Array, forward: bool, backward: bool) -> _Carry:
    line = self.line
    received, grad = carry.received, carry.grad
    if forward:
      x, data = line.enter(self.shared, self.batch, t - line.rank, carry.received)
      slot = (t - line.rank) % self.slots
      held = jax.tree.map(
        lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, slot, 0),
        carry.held, line.leave(x, data),
      )  # fmt: skip
      carry = carry._replace(held=held)
      y = line.stage_fn(self.stage_params, x, data)
      received = line.forward(line.leave(y, data), t, self.step)
    if backward:
      after = received[0] if forward else None
      value, grads, grad_x = self._backward(carry, t, after)
      grad = line.backward(grad_x, t, self.step)
      value = jax.tree.map(jnp.add, carry.value, value)
      grads = jax.tree.map(lambda a, g: a + g.astype(a.dtype), carry.grads, grads)
      carry = carry._replace(value=value, grads=grads)
    return carry._replace(received=received, grad=grad)

  def _backward(self, carry: _Carry, t: jax.Array, after: Any) -> tuple[Any, Any, jax.Array]:
    """((loss, aux), gradients, gradient of the input) of one microbatch, zeros in a bubble."""
    line = self.line
    microbatch = t - 2 * (line.size - 1) + line.rank
    own = read(self.batch, microbatch)
    x, data = jax.tree.map(
      lambda h: jax.lax.dynamic_index_in_dim(h, microbatch % self.slots, keepdims=False), carry.held
    )
    data = own if data is None else data
    x = x if after is None else _in_order(x, after, t)
    y, pull = jax.vjp(lambda p, x: line.stage_fn(p, x, data), self.stage_params, x)
    loss, pull_loss, aux = jax.vjp(
      lambda shared, y: self.loss_fn(shared, y, data), self.shared, y, has_aux=True
    )
    at_head, grad_y = pull_loss(jnp.full_like(loss, 1 / line.num_microbatches))
    of_stage, grad_x = pull(jnp.where(line.last, grad_y, carry.grad))
    _, pull_input = jax.vjp(lambda shared: line.input_fn(shared, own), self.shared)
    (at_input,) = pull_input(grad_x)

    valid = line.valid(microbatch)
    value = jax.tree.map(lambda v: v / line.num_microbatches, (loss, aux))
    value = where(valid & line.last, value, jax.tree.map(jnp.zeros_like, value))
    zeros = jax.tree.map(jnp.zeros_like, (of_stage, self.shared))
    of_stage = where(valid, of_stage, zeros[0])
    at_head = where(valid & line.last, at_head, zeros[1])
    at_input = where(valid & line.first, at_input, zeros[1])
    of_shared = jax.tree.map(jnp.add, at_head, at_input)
    return value, (of_stage, of_shared), grad_x


def _in_order(x: jax.Array, after: jax.Array, t: jax.Array) -> jax.Array:
  """`x`, on CPU not before `after` has arrived.

  XLA:CPU would run the hop of the forward pass beside the loop of the backward pass, on some
  devices one first and on others the other: where the loop communicates too, they would wait for
  each other for ever.
  """
  return jax.lax.platform_dependent(
    x, after, t, cpu=lambda x, after, t: jnp.where(t < 0, after, x), default=lambda x, after, t: x
  )
