"""Writes what PowerSGD and DeMo must give, computed in float64 by loops of NumPy.

    python scripts/make_transform_fixtures.py   # tests/jaxcomm/transforms/fixtures/*.npz

Written from the published algorithms and not from `jaxcomm`, of which it imports nothing: PowerSGD
as torch's communication hook runs it (both factors orthogonalised by Gram-Schmidt, the sum of the
left factors, the mean of the right ones, the residual against the mean result), DeMo as in the
authors' optimizer (arXiv 2411.19870, algorithm 1). Inputs are exact in float32 and stored too.
"""

import pathlib

import numpy as np

OUT = pathlib.Path(__file__).parent.parent / "tests" / "jaxcomm" / "transforms" / "fixtures"
WORKERS, STEPS = 4, 5


# --- PowerSGD


def gram_schmidt(matrix):
  """Orthonormal columns, one after the other."""
  columns = []
  for column in matrix.T:
    for basis in columns:
      column = column - (basis @ column) * basis
    columns.append(column / np.sqrt(column @ column))
  return np.stack(columns, axis=1)


def power_sgd(gradients, right):
  """Results [T, n, m] and last residuals [W, n, m], from gradients [W, T, n, m], right [m, r]."""
  num_workers, num_steps, rows, columns = gradients.shape
  residuals = np.zeros((num_workers, rows, columns))
  results = []
  for step in range(num_steps):
    inputs = [gradients[i, step] + residuals[i] for i in range(num_workers)]
    right = gram_schmidt(right)
    left = gram_schmidt(sum(x @ right for x in inputs))
    right = sum(x.T @ left for x in inputs) / num_workers
    result = left @ right.T
    residuals = np.stack([x - result for x in inputs])
    results.append(result)
  return np.stack(results), residuals


def power_sgd_fixture():
  rng = np.random.default_rng(11)
  shared = rng.normal(size=(1, STEPS, 12, 10))  # what the workers' gradients have in common
  gradients = shared + 0.5 * rng.normal(size=(WORKERS, STEPS, 12, 10))
  gradients = gradients.astype(np.float32)
  arrays = {"gradients": gradients}
  for rank in (1, 2, 4):
    right = rng.normal(size=(10, rank)).astype(np.float32)
    results, residuals = power_sgd(gradients.astype(np.float64), right.astype(np.float64))
    arrays |= {
      f"right_{rank}": right, f"results_{rank}": results, f"residuals_{rank}": residuals
    }  # fmt: skip
  return arrays


# --- DeMo


def cosine_basis(n):
  """Rows are the orthonormal cosines of DCT-II."""
  basis = np.empty((n, n))
  for k in range(n):
    for x in range(n):
      basis[k, x] = np.cos(np.pi * (x + 0.5) * k / n) * np.sqrt((1 if k == 0 else 2) / n)
  return basis


def chunks_of(array, longest):
  """Slices of the chunks; a vector is one row."""
  sides = []
  for n in array.shape:
    sides.append(max(k for k in range(1, longest + 1) if n % k == 0))
  for top in range(0, array.shape[0], sides[0]):
    for start in range(0, array.shape[1], sides[1]):
      yield slice(top, top + sides[0]), slice(start, start + sides[1])


def transform(chunk):
  return cosine_basis(chunk.shape[0]) @ chunk @ cosine_basis(chunk.shape[1]).T


def inverse(coefficients):
  return cosine_basis(coefficients.shape[0]).T @ coefficients @ cosine_basis(coefficients.shape[1])


def demo_step(parameters, deltas, gradients, rate, *, decay, weight_decay, top_k, longest):
  """One update of a matrix: new parameters, new deltas [W, n, m]."""
  deltas = np.stack([decay * d + rate * g for d, g in zip(deltas, gradients)])
  direction = np.zeros_like(parameters)
  for place in chunks_of(parameters, longest):
    total, senders = np.zeros_like(parameters[place]), np.zeros_like(parameters[place])
    for delta in deltas:
      coefficients = transform(delta[place])
      kept = np.zeros_like(coefficients)
      order = np.argsort(-np.abs(coefficients), axis=None)[:top_k]
      for index in zip(*np.unravel_index(order, coefficients.shape)):
        kept[index] = coefficients[index]
        senders[index] += 1
      delta[place] -= inverse(kept)
      total += kept
    direction[place] = inverse(total / np.maximum(senders, 1))
  return parameters * (1 - rate * weight_decay) - rate * np.sign(direction), deltas


def demo_fixture():
  rng = np.random.default_rng(12)
  options = {"decay": 0.9, "weight_decay": 0.1, "top_k": 3, "longest": 8}
  rates = np.asarray([0.1, 0.2, 0.2, 0.1, 0.05], np.float32)
  arrays = {"rates": rates}
  for name, shape in {"matrix": (12, 14), "vector": (1, 10)}.items():
    parameters = rng.normal(size=shape).astype(np.float32)
    gradients = rng.normal(size=(WORKERS, STEPS, *shape)).astype(np.float32)
    arrays |= {f"{name}_start": parameters, f"{name}_gradients": gradients}
    parameters, deltas = parameters.astype(np.float64), np.zeros((WORKERS, *shape))
    history = []
    for step, rate in enumerate(rates.astype(np.float64)):
      step_gradients = gradients[:, step].astype(np.float64)
      parameters, deltas = demo_step(parameters, deltas, step_gradients, rate, **options)
      history.append(parameters)
    arrays |= {f"{name}_parameters": np.stack(history), f"{name}_deltas": deltas}
  return arrays


if __name__ == "__main__":
  OUT.mkdir(exist_ok=True)
  np.savez_compressed(OUT / "powersgd.npz", **power_sgd_fixture())
  np.savez_compressed(OUT / "demo.npz", **demo_fixture())
