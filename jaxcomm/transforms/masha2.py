"""MASHA2: extragradient on compressed differences, for contractive compressors."""

from typing import Any

from jaxcomm.compressors import Compressor
from jaxcomm.transforms._masha import Reference, Refresh, no_prox
from jaxcomm.transforms._masha_steps import Masha
from jaxcomm.transforms.extragradient import ExtragradientTransformation


def masha2(
  learning_rate: float,
  compressor: Compressor,
  *,
  tau: float | None = None,
  server_compressor: Compressor | None = None,
  axis_name: str = "data",
  prox: None = None,
  reference: Reference = "new",
  refresh: Refresh = "random",
  num_participants: int | None = None,
  specs: Any = None,
  seed: int = 0,
) -> ExtragradientTransformation:
  r"""`masha1` with error feedback, for compressors such as Top-k; unconstrained problems only.

  With :math:`z^{k+1/2}` and the refreshes as there, the step size goes inside the compressor:

  .. math::
    v_m = e_m + \gamma (F_m(z^{k+1/2}) - F_m(w^k)), \quad g_m = D(C(v_m)), \quad
    e_m \leftarrow v_m - g_m, \\
    u = e + \frac1M \sum_m g_m, \quad g = D(C_s(u)), \quad e \leftarrow u - g, \quad
    z^{k+1} = z^{k+1/2} - g

  Workers that do not participate in a step keep their :math:`e_m`.

  Wire: as `masha1`. Per worker: `local_operator` and `worker_error`; all else is equal. After a
  change of workers the errors must be summed or dropped by hand, and `refresh` be called.

  Args:
    learning_rate: gamma > 0. Theory: of the order of :math:`\alpha \sqrt{1-\tau} / L`.
    compressor: contractive, e.g. `top_k(ratio=0.1)`, `scaled_sign()`.
    tau: as in `masha1`.
    server_compressor: contractive, of the mean, with an error of its own; None for none.
    axis_name: as in `masha1`.
    prox: must be None.
    reference: as in `masha1`.
    refresh: as in `masha1`.
    num_participants: as in `masha1`.
    specs: as in `masha1`.
    seed: of all keys.

  Returns:
    An `ExtragradientTransformation`.

  Raises:
    ValueError: as `masha1`, but for a compressor without an alpha at the size of a leaf (in init);
      and a `prox`.

  References:
    Beznosikov et al., https://arxiv.org/abs/2110.03313, algorithm 2.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxcomm.compressors import top_k
    >>> from jaxcomm.transforms import masha2, masha_step, saddle_operator
    >>> operator = saddle_operator(lambda x, y, c: jnp.sum(x * x + 2 * x * y - y * y - c * x))
    >>> tx = masha2(0.1, top_k(k=1))
    >>> step = masha_step(operator, tx)
    >>> def solve(c):
    ...   z = (jnp.zeros(4), jnp.zeros(4))
    ...   state = tx.init(z, operator(z, c))
    ...   return jax.lax.fori_loop(0, 300, lambda _, s: step(*s, c)[:2], (z, state))[0]
    >>> x, y = jax.jit(jax.vmap(solve, axis_name="data"))(jnp.asarray([2.0, 6.0]))
    >>> x[0].round(3).tolist(), y[0].round(3).tolist()
    ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0])
  """
  if prox is not None:
    raise ValueError(
      "`prox` must be None: MASHA2 is defined only for unconstrained problems; see masha1."
    )
  return Masha(
    learning_rate=learning_rate,
    compressor=compressor,
    server_compressor=server_compressor,
    tau=tau,
    axis_name=axis_name,
    prox=no_prox,
    reference=reference,
    refresh=refresh,
    num_participants=num_participants,
    specs=specs,
    seed=seed,
    feedback=True,
  ).transformation()
