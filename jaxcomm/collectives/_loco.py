"""LoCo: reduce-scatter with an error that is carried from step to step as a moving average."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxcomm import _axes
from jaxcomm.collectives._common import check_input
from jaxcomm.collectives._layout import check_axis
from jaxcomm.collectives._linear import all_gather, scatter_with_error
from jaxcomm.collectives._options import BackwardBits, Bits, compressor_of, wire_of
from jaxcomm.collectives._quantized_psum_scatter import quantized_psum_scatter_bytes
from jaxcomm.collectives._straight_through import as_differing, backward_key, straight_through
from jaxcomm.compressors import Compressor, Payload, identity


class LocoState(NamedTuple):
  """State of `loco_psum_scatter`, for one array.

  Attributes:
    count: int32[], equal on all devices: steps taken.
    error: the payload of the carried error, of as many elements as `x`: int8 codes and scales, or
      float32 values with `error_bits=None`. Differs between devices.
  """

  count: jax.Array
  error: Payload


def loco_init(x: jax.Array, *, error_bits: Bits = 8, block_size: int = 256) -> LocoState:
  """The state before the first step: no error.

  Args:
    x: an array of the shape that will be summed (its values do not matter).
    error_bits: how the error is stored between steps: 8 (as in DeepSpeed), 4, "fp8", or None for
      float32.
    block_size: elements per scale of the stored error.

  >>> import jax.numpy as jnp
  >>> from jaxcomm.collectives import loco_init
  >>> {name: leaf.nbytes for name, leaf in loco_init(jnp.zeros(512)).error.items()}
  {'codes': 512, 'scales': 8}
  """
  store = _store(error_bits, block_size)
  error = store.compress(None, jnp.zeros(x.shape, jnp.float32))
  for axis_name in sorted(_axes.varying_axes(x)):
    error = _axes.vary(error, axis_name)
  return LocoState(jnp.zeros((), jnp.int32), error)


def loco_psum_scatter(
  x: jax.Array,
  state: LocoState,
  axis_name: str,
  *,
  bits: Bits = 4,
  block_size: int = 256,
  rounding: Literal["nearest", "stochastic"] = "nearest",
  key: jax.Array | None = None,
  hadamard: int | None = None,
  backward_bits: BackwardBits = "same",
  scatter_dimension: int = 0,
  tiled: bool = True,
  err_beta: float = 0.8,
  reset_every: int | None = 1024,
  error_bits: Bits = 8,
) -> tuple[jax.Array, LocoState]:
  r"""`quantized_psum_scatter` (one shot) with error feedback.

  .. math::
    h_i = x_i + e_i, \quad y = \sum_i D(C(h_i)), \quad
    e_i' = \beta e_i + (1 - \beta) (h_i - D(C(h_i)))

  `err_beta` 0 is plain error feedback (EF14), 1 carries nothing. After every `reset_every` steps
  the error is zero again. A step is one call; every array has its own state and count.

  For two hops chain two calls, each with a state of its own: the first over the fast axis, the
  second with its result over the slow one.

  Wire: `loco_psum_scatter_bytes`; the error stays at home. On restore the state needs the same
  number of devices.

  Derivative of the sum in `x`: as `quantized_psum_scatter`; the state has none.

  Args:
    x: any shape but a scalar, floating-point dtype.
    state: of `loco_init`, or from the previous step.
    axis_name: one bound axis.
    bits, block_size, rounding, key, hadamard, backward_bits: as in `quantized_all_gather`.
    scatter_dimension, tiled: as in `quantized_psum_scatter`.
    err_beta: weight of the old error, in [0, 1].
    reset_every: steps, or None for never.
    error_bits: as given to `loco_init`, and `block_size` too.

  Returns:
    (sum of this device's chunk in the dtype of `x`, new state).

  Raises:
    ValueError: an argument outside these rules, a state that is not for this `x`, an unbound axis,
      a missing key.

  Source: LoCo (arXiv 2407.04480). Resets count steps, not tensors.

  >>> import jax, jax.numpy as jnp
  >>> from jaxcomm.collectives import loco_init, loco_psum_scatter
  >>> def two_steps(x):
  ...   options = {"err_beta": 0.0, "error_bits": None}
  ...   first, state = loco_psum_scatter(x, loco_init(x, error_bits=None), "data", **options)
  ...   return first, loco_psum_scatter(x, state, "data", **options)[0]
  >>> x = jnp.broadcast_to(jnp.asarray([7.0, 1.4]), (2, 2, 2))  # (device, row, column)
  >>> first, second = jax.jit(jax.vmap(two_steps, axis_name="data"))(x)
  >>> first[0].tolist(), second[0].tolist()
  ([[14.0, 2.0]], [[14.0, 4.0]])
  """
  wire = wire_of(bits, backward_bits, block_size, rounding, hadamard)
  store = _store(error_bits, block_size)
  check_input(x, axis_name)
  _check(state, x, store, err_beta, reset_every)
  axis = check_axis(scatter_dimension, x.ndim, "scatter_dimension")
  size = x.shape[axis]

  def step(x, key_and_state):
    key, state = key_and_state
    error = store.decompress(state.error, x.shape)
    h = x.astype(jnp.float32) + error
    y, lost = scatter_with_error(h, axis_name, wire.forward, key, axis, tiled)
    error = err_beta * error + (1 - err_beta) * lost
    count = state.count + 1
    if reset_every is not None:
      error = jnp.where(count % reset_every == 0, 0.0, error)
    return y.astype(x.dtype), LocoState(count, store.compress(None, error))

  def transpose(ct, key_and_state):
    ct, key = as_differing(ct[0], axis_name), backward_key(key_and_state[0])
    ct = all_gather(ct, axis_name, wire.transposed, key, axis=axis, tiled=tiled)
    return jax.lax.slice_in_dim(ct, 0, size, axis=axis)  # without the padding

  with jax.named_scope("loco_psum_scatter"):
    return straight_through(step, transpose, as_differing(x, axis_name), (key, state))


def _store(error_bits: Any, block_size: int) -> Compressor:
  if error_bits not in (4, 8, "fp8", None):
    raise ValueError(f"`error_bits` must be 4, 8, 'fp8' or None, got {error_bits!r}.")
  return compressor_of(error_bits, block_size) or identity()


def _check(state: Any, x: jax.Array, store: Compressor, err_beta: Any, reset_every: Any) -> None:
  if not 0 <= err_beta <= 1:
    raise ValueError(f"`err_beta` must be in [0, 1], got {err_beta!r}.")
  if reset_every is not None and (not isinstance(reset_every, int) or reset_every < 1):
    raise ValueError(f"`reset_every` must be a number of steps >= 1 or None, got {reset_every!r}.")
  want = jax.eval_shape(store.compress, None, jax.ShapeDtypeStruct(x.shape, jnp.float32))
  if not _same_shapes(state.error, want):
    got = jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", state.error)
    raise ValueError(
      f"`state` must come from loco_init for the shape {x.shape} and the same `error_bits` and"
      f" `block_size`, got the error {got}."
    )


def _same_shapes(tree: Any, other: Any) -> bool:
  describe = lambda a: (a.shape, a.dtype)  # noqa: E731
  return jax.tree.map(describe, tree) == jax.tree.map(describe, other)


def loco_psum_scatter_bytes(shape: Any, axis_size: int, *, bits: Bits = 4, **options: Any) -> int:
  """Bytes that one device sends in a step: those of `quantized_psum_scatter_bytes`.

  >>> from jaxcomm.collectives import loco_psum_scatter_bytes
  >>> loco_psum_scatter_bytes((4096,), 8)
  1848
  """
  return quantized_psum_scatter_bytes(shape, axis_size, bits=bits, **options)
