"""Losses shared by the language models. B batch, S sequence, V vocabulary."""

import jax
import jax.numpy as jnp


def cross_entropy(
  logits_BSV: jax.Array,
  targets_BS: jax.Array,
  mask_BS: jax.Array | None = None,
  *,
  z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  r"""Masked mean cross-entropy in nats, computed in float32.

  .. math:: \frac{\sum m (\log Z - l_t + \zeta \log^2 Z)}{\sum m}, \quad Z = \sum_v e^{l_v}

  Args:
    logits_BSV: any float dtype.
    targets_BS: int; ids must lie in [0, V), which host code checks.
    mask_BS: weight of each position, or None for all ones. All zeros give loss 0.
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, §5).

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
  logits_BSV = logits_BSV.astype(jnp.float32)
  log_z_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
  # Compare and add instead of a gather: its gradient is no scatter, and V may be sharded.
  vocab_V = jax.lax.broadcasted_iota(targets_BS.dtype, logits_BSV.shape, 2)
  target_BS = jnp.where(vocab_V == targets_BS[..., None], logits_BSV, 0.0).sum(-1)
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
