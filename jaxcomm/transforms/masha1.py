"""MASHA1: extragradient on compressed differences, for unbiased compressors."""

from collections.abc import Callable
from typing import Any

from jaxcomm.compressors import Compressor
from jaxcomm.transforms._masha import Reference, Refresh, no_prox
from jaxcomm.transforms._masha_steps import Masha
from jaxcomm.transforms.extragradient import ExtragradientTransformation


def masha1(
  learning_rate: float,
  compressor: Compressor,
  *,
  tau: float | None = None,
  server_compressor: Compressor | None = None,
  axis_name: str = "data",
  prox: Callable[[Any, float], Any] | None = None,
  reference: Reference = "new",
  refresh: Refresh = "random",
  num_participants: int | None = None,
  specs: Any = None,
  seed: int = 0,
) -> ExtragradientTransformation:
  r"""Solves a monotone variational inequality over `axis_name` with compressed messages.

  With a reference point w, at which all workers know :math:`F(w)` and their own :math:`F_m(w)`:

  .. math::
    \bar z = \tau z^k + (1 - \tau) w^k, \quad
    z^{k+1/2} = \mathrm{prox}_{\gamma h}(\bar z - \gamma F(w^k)), \\
    g = Q_s\Big(\frac1M \sum_m Q(F_m(z^{k+1/2}) - F_m(w^k))\Big), \quad
    z^{k+1} = \mathrm{prox}_{\gamma h}(\bar z - \gamma (F(w^k) + g))

  and with probability 1 - tau a refresh: :math:`w^{k+1} = z^{k+1}`, one dense mean. What is
  compressed vanishes at the solution, and the noise with it. With `identity()` and `tau=0` it is
  extragradient.

  Minibatches: give `update` also `reference_value`, the operator at `state.reference` on the
  minibatch that was used at `half`; refresh on a large one.

  Wire, per worker and step: :math:`(M-1)\,\mathrm{payload}(d)` per leaf, or an all-reduce of k
  floats for `rand_k(shared_support=True)`; and in a refresh, every 1 / (1 - tau) steps, an
  all-reduce of 4d (`masha_bytes`). Towards a server it is the payload and 4d. The random bit costs
  nothing: its key is shared. Independent supports divide the noise by M, a shared one does not.
  `server_compressor` is computed by all workers alike; it saves bytes only where a server sends
  the result.

  Per worker: `local_operator`. All else is equal on all workers. A restore needs the same workers
  and data; otherwise set `needs_refresh` in the state and call `refresh` first.

  Args:
    learning_rate: gamma > 0. Theory: of the order of
      :math:`\sqrt{1-\tau} / (2 L \sqrt{1 + \omega / M})`; more usually works.
    compressor: unbiased, e.g. `rand_k(ratio=0.1)`, `qsgd(4)`.
    tau: in [0, 1); default 1 - payload / (4d): refreshes cost as much as the other messages.
    server_compressor: unbiased, of the mean; None for none.
    axis_name: axis of the workers, bound by `jax.shard_map` or `jax.vmap(axis_name=...)`.
    prox: (tree, gamma) -> tree, the proximal map of gamma h, e.g. a projection; None for h = 0.
    reference: whether a refresh moves w to the "new" point or to the "old" one, z^k.
    refresh: "random"; "deterministic", every round(1 / (1 - tau)) steps, for tests; or "host":
      `update(..., do_refresh=...)` is told, see `draw_refresh`.
    num_participants: how many workers answer in a step, drawn anew each time; None for all. All
      answer in a refresh.
    specs: how leaves are sharded over other mesh axes, see `compressed_mean`.
    seed: of all keys.

  Returns:
    An `ExtragradientTransformation`.

  Raises:
    ValueError: a biased compressor, `tau` outside [0, 1), parameters that are not float32 or
      float64, an operator that does not return a tree like them or returns a sum over workers (see
      `ExtragradientTransformation`), an unbound axis, or (outside of jit; inside the result is NaN)
      a refresh that was left out.

  References:
    Beznosikov et al., Distributed Methods with Compressed Communication for Solving Variational
    Inequalities, with Theoretical Guarantees, https://arxiv.org/abs/2110.03313, algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.compressors import rand_k
    >>> from jaxcomm.transforms import masha1, masha_step, saddle_operator
    >>> operator = saddle_operator(lambda x, y, c: jnp.sum(x * x + 2 * x * y - y * y - c * x))
    >>> tx = masha1(0.1, rand_k(k=1))
    >>> step = masha_step(operator, tx)
    >>> def solve(c):
    ...   z = (jnp.zeros(4), jnp.zeros(4))
    ...   state = tx.init(z, operator(z, c))
    ...   return jax.lax.fori_loop(0, 300, lambda _, s: step(*s, c)[:2], (z, state))[0]
    >>> x, y = jax.jit(jax.vmap(solve, axis_name="data"))(jnp.asarray([2.0, 6.0]))
    >>> x[0].round(3).tolist(), y[0].round(3).tolist()
    ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
  """
  for name, c in (("compressor", compressor), ("server_compressor", server_compressor)):
    if c is not None and not c.unbiased:
      raise ValueError(f"`{name}` must be unbiased (have an omega), got {c}: see masha2.")
  return Masha(
    learning_rate=learning_rate,
    compressor=compressor,
    server_compressor=server_compressor,
    tau=tau,
    axis_name=axis_name,
    prox=prox or no_prox,
    reference=reference,
    refresh=refresh,
    num_participants=num_participants,
    specs=specs,
    seed=seed,
    feedback=False,
  ).transformation()
