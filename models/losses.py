"""Losses shared by the language models. B batch, S sequence, V vocabulary."""

import jax
import jax.numpy as jnp

from jaxcomm import _axes


def cross_entropy(
  logits_BSV: jax.Array,
  targets_BS: jax.Array,
  mask_BS: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
  axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Masked mean cross-entropy in nats, computed in float32.

  .. math:: \frac{\sum m (\log Z - l_t + \zeta \log^2 Z)}{\sum m}, \quad Z = \sum_v e^{l_v}

  Args:
    logits_BSV: any float dtype.
    targets_BS: int; ids must lie in [0, V), which host code checks.
    mask_BS: weight of each position, or None for all ones. All zeros give loss 0.
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, §5).
    axis_name: manual axis over which V is cut, as in `sharded_cross_entropy`.

  Returns:
    (objective, aux), float32 scalars: `aux["loss"]` is the cross-entropy alone, `aux["tokens"]`
    the sum of the mask, and with `z_loss` also `aux["z_loss"]`, the mean of log² Z.

  Raises:
    ValueError: shapes disagree, `targets_BS` is not an integer array, or `z_loss` is negative.

  Example:
    >>> value, aux = cross_entropy(jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), int))
    >>> print(f"{value:.4f} {aux['tokens']:.0f}")
    2.0794 2
  """
  _check(logits_BSV, targets_BS, mask_BS, z_loss)
  log_z_BS, target_BS = _log_z_and_target(logits_BSV.astype(jnp.float32), targets_BS, axis_name)
  if mask_BS is None:
    mask_BS = jnp.ones(targets_BS.shape, jnp.float32)
  mask_BS = mask_BS.astype(jnp.float32)
  count = mask_BS.sum()
  per_token = 1.0 / jnp.where(count > 0, count, 1.0)
  loss = ((log_z_BS - target_BS) * mask_BS).sum() * per_token
  aux = {"loss": loss, "tokens": count}
  if z_loss == 0.0:
    return loss, aux
  aux["z_loss"] = (jnp.square(log_z_BS) * mask_BS).sum() * per_token
  return loss + z_loss * aux["z_loss"], aux


def sharded_cross_entropy(local_logits: jax.Array, targets: jax.Array, axis_name: str) -> jax.Array:
  """Cross-entropy of each token, nats, of logits that are cut over devices along the vocabulary.

  Wire over `axis_name` (manual): three float32 per token are reduced, and nothing in the backward
  pass but what made the logits. Megatron-LM (arXiv 1909.08053) §3.

  Args:
    local_logits: [B, S, V / T], any float dtype; device r has those of ids from r V / T on.
    targets: int[B, S], ids in [0, V), equal on all devices.
    axis_name: of T devices.

  Returns:
    float32[B, S], equal on all devices.

  Raises:
    ValueError: shapes disagree, `targets` are not integers, or there is no such axis.

  Example:
    >>> local_logits = jnp.zeros((4, 1, 2, 2))  # four devices with two of eight ids each
    >>> loss = lambda x: sharded_cross_entropy(x, jnp.zeros((1, 2), int), "tensor")
    >>> print(jax.vmap(loss, axis_name="tensor")(local_logits)[0].round(4))
    [[2.0794 2.0794]]
  """
  _check(local_logits, targets, None, 0.0)
  log_z, target = _log_z_and_target(local_logits.astype(jnp.float32), targets, axis_name)
  return log_z - target


def _log_z_and_target(logits_BSV, targets_BS, axis_name):
  """log Z and the logit of the target of each token."""
  vocab_V = jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2)
  if axis_name is not None:
    _axes.axis_size(axis_name)  # there is such an axis
    vocab_V += jax.lax.axis_index(axis_name) * logits_BSV.shape[-1]
  # Compare and add instead of a gather: its gradient is no scatter, and V may be sharded.
  target_BS = jnp.where(vocab_V == targets_BS[..., None], logits_BSV, 0.0).sum(-1)
  if axis_name is None:
    return jax.nn.logsumexp(logits_BSV, axis=-1), target_BS
  peak_BS = jax.lax.stop_gradient(logits_BSV).max(-1)
  peak_BS = jax.lax.pmax(_axes.vary(peak_BS, axis_name), axis_name)
  z_BS = jnp.exp(logits_BSV - peak_BS[..., None]).sum(-1)
  z_BS, target_BS = jax.lax.psum(_axes.vary((z_BS, target_BS), axis_name), axis_name)
  return jnp.log(z_BS) + peak_BS, target_BS


def _check(logits, targets, mask, z_loss):
  if targets.shape != logits.shape[:-1]:
    raise ValueError(
      f"`targets` must have the shape of the logits without V, {logits.shape[:-1]},"
      f" got {targets.shape}."
    )
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"`targets` must be integers, got {targets.dtype}.")
  if mask is not None and mask.shape != targets.shape:
    raise ValueError(f"`loss_mask` must have shape {targets.shape}, got {mask.shape}.")
  if z_loss < 0:
    raise ValueError(f"`z_loss` must not be negative, got {z_loss}.")
