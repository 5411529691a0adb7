"""Min-max problems of `masha_minmax.py`, and how far a point is from their solutions."""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomm.transforms import saddle_operator

ROWS = 64  # inputs of each worker of the regression


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A min-max problem of which every worker holds a part.

  Attributes:
    name: of the data, for the summary.
    operator: (z, data of a worker) -> F_m(z), with x and y one after the other in the vector z.
    data: arrays with a leading worker axis.
    size: numbers in z. The start is zero.
    distance: z -> scalar, zero at the solution of the mean over workers.
    flops: of an operator value of one worker.
  """

  name: str
  operator: Callable[[jax.Array, Any], jax.Array]
  data: Any
  size: int
  distance: Callable[[jax.Array], jax.Array]
  flops: float

  @property
  def provenance(self) -> dict[str, str]:
    """Name and hash of the data."""
    digest = hashlib.sha256(b"".join(x.tobytes() for x in jax.tree.leaves(self.data)))
    return {"name": self.name, "sha256": digest.hexdigest()}


def bilinear(seed: int, workers: int, size: int) -> Problem:
  """f_m = |x|^2 / 2 + y^T A_m x + b_m^T x - c_m^T y - |y|^2 / 2; squared distance."""
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(workers, size, size)) * (4 / size) ** 0.5
  b, c = rng.normal(size=(2, workers, size))
  mean = a.mean(0)
  jacobian = np.block([[np.eye(size), mean.T], [-mean, np.eye(size)]])
  solution = np.linalg.solve(jacobian, -np.concatenate([b.mean(0), c.mean(0)]))

  def payoff(x, y, data):
    a, b, c = data
    return x @ x / 2 + y @ (a @ x) + b @ x - c @ y - y @ y / 2

  return Problem(
    name=f"bilinear game, seed {seed}",
    operator=_on_vector(saddle_operator(payoff), size),
    data=(a, b, c),
    size=2 * size,
    distance=lambda z: jnp.sum((z - solution.astype(z.dtype)) ** 2),
    flops=8.0 * size**2,
  )


def adversarial(seed: int, workers: int, size: int) -> Problem:
  """f_m = mean log(1 + exp(-label w^T (input + y_class))) + 0.05 |w|^2 - |y|^2.

  The distance is the squared norm of the mean operator.
  """
  rng = np.random.default_rng(seed + 1)
  direction = rng.normal(size=size) / size**0.5
  labels = np.where(rng.random((workers, ROWS)) < 0.5, -1.0, 1.0)
  inputs = rng.normal(size=(workers, ROWS, size)) + labels[..., None] * direction
  inputs += 0.5 * rng.normal(size=(workers, 1, size))  # workers differ

  def payoff(weights, shifts, data):
    inputs, labels = data
    shifted = inputs + shifts.reshape(2, size)[(labels > 0).astype(int)]
    loss = jax.nn.softplus(-labels * (shifted @ weights)).mean()
    return loss + 0.05 * weights @ weights - shifts @ shifts

  operator = _on_vector(saddle_operator(payoff), size)

  def distance(z):
    data = inputs.astype(z.dtype), labels.astype(z.dtype)  # of all workers: measured, not sent
    return jnp.sum(jax.vmap(operator, (None, 0))(z, data).mean(0) ** 2)

  return Problem(
    name=f"adversarial regression, seed {seed}",
    operator=operator,
    data=(inputs, labels),
    size=3 * size,
    distance=distance,
    flops=10.0 * ROWS * size,
  )


def _on_vector(operator: Callable, size: int) -> Callable[[jax.Array, Any], jax.Array]:
  """An operator on (x, y) as one on the vector of both, so that one message holds both."""

  def of_vector(z, data):
    return jnp.concatenate(operator((z[:size], z[size:]), data))

  return of_vector
