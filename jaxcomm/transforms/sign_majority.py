"""signSGD with majority vote: one bit per element in both directions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomm.collectives import compressed_pmean, compressed_pmean_bytes
from jaxcomm.compressors import Compressor, Payload
from jaxcomm.compressors._packing import pack, packed_bytes, unpack
from jaxcomm.transforms._leafwise import map_leaves


class SignMajorityState(NamedTuple):
  """State of `sign_majority`: count int32[], equal on all devices, the number of votes taken."""

  count: jax.Array


def sign_majority(axis_name: str, *, specs: Any = None) -> optax.GradientTransformation:
  r"""The sign that most devices on `axis_name` have: +1 or -1, in the dtype of the updates.

  .. math:: u = \mathrm{sign}\Big(\sum_i \mathrm{sign}(g_i)\Big)

  One bit cannot say zero: a zero, and a tied vote, count as +1 at even updates and as -1 at odd
  ones, so that a parameter without gradients swings by one learning rate and drifts nowhere. Each
  device decides the votes on its own part of the elements, hence all get the same bits. One vote of
  NaN counts as a zero: a device cannot spoil the result, nor be noticed.

  Put momentum before it and the learning rate behind:
  `optax.chain(optax.ema(0.9), sign_majority("replica"), optax.scale_by_learning_rate(3e-4))`; the
  momentum then differs per device.

  Wire, per device and update, over `axis_name`: an all-to-all and an all-gather of packed bits,
  :math:`2 (N-1) \lceil \lceil d / N \rceil / 8 \rceil` bytes per leaf (`sign_majority_bytes`). A
  leaf sharded over inner mesh axes is voted on shard by shard, so nothing crosses those axes.

  Per device: nothing. A restore works with any number of replicas.

  Args:
    axis_name: axis of the voters, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    specs: how leaves are sharded over the other mesh axes, see `compressed_mean`.

  Returns:
    A `GradientTransformation` with `SignMajorityState`.

  Raises:
    ValueError: in update, as `compressed_mean`.

  References:
    Bernstein et al., signSGD, https://arxiv.org/abs/1802.04434; signSGD with Majority Vote is
    Communication Efficient and Fault Tolerant, https://arxiv.org/abs/1810.05291.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm import sign_majority
    >>> tx = sign_majority("replica")
    >>> grads = jnp.array([[1.0, -9.0], [2.0, 1.0], [-3.0, 1.0]])
    >>> jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="replica")(grads)[0].tolist()
    [1.0, 1.0]
  """

  def init_fn(params):
    del params
    return SignMajorityState(jnp.zeros((), jnp.int32))

  def vote(leaf, count, g):
    del leaf
    flip = jnp.where(count % 2 == 0, 1.0, -1.0)
    mean = compressed_pmean(flip * g.astype(jnp.float32), axis_name, _Sign())
    # On one device the mean is the input.
    return (jnp.where(_is_positive(mean), flip, -flip).astype(g.dtype),)

  def update_fn(updates, state, params=None):
    del params
    (votes,) = map_leaves(vote, state.count, updates, axis_name=axis_name, specs=specs)
    return votes, SignMajorityState(jnp.asarray(optax.safe_increment(state.count)))

  return optax.GradientTransformation(init_fn, update_fn)


def sign_majority_bytes(shape: tuple[int, ...], axis_size: int) -> int:
  r"""Bytes that one device sends per `sign_majority` of an array of `shape` (its local shard).

  :math:`2 (N-1) \lceil \lceil d / N \rceil / 8 \rceil`.

  >>> from jaxcomm.transforms import sign_majority_bytes
  >>> sign_majority_bytes((1024,), 4)
  192
  """
  return compressed_pmean_bytes(shape, axis_size, _Sign())


def _is_positive(x: jax.Array) -> jax.Array:
  return ~(x < 0)  # also zero and NaN


@dataclasses.dataclass(frozen=True)
class _Sign(Compressor):
  """+1 or -1 as one bit, without the scale that makes `scaled_sign` a compressor of vectors."""

  def _encode(self, key: jax.Array | None, x_D: jax.Array) -> Payload:
    del key
    return {"signs": pack(_is_positive(x_D).astype(jnp.uint8), 1)}

  def _decode(self, payload: Payload, size: int, key: jax.Array | None) -> jax.Array:
    del key
    return 2.0 * unpack(payload["signs"], size, 1).astype(jnp.float32) - 1

  def _num_bytes(self, size: int) -> int:
    return packed_bytes(size, 1)
