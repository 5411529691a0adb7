"""MASHA1 and MASHA2: their degenerate cases, their laws, and where they end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcomm.compressors import identity, rand_k, top_k
from jaxcomm.inspect import collective_bytes
from jaxcomm.transforms import (
  MashaState,
  draw_refresh,
  extragradient,
  masha1,
  masha2,
  masha_bytes,
  masha_step,
  saddle_operator,
)

M, D = 4, 10  # workers; x and y are of D numbers each
RATE = 0.1


def make_game(workers, size, seed=0):
  """Strongly monotone, F_m(z) = J_m z + q_m with z = (x, y), and the solution of the mean."""
  rng = np.random.default_rng(seed)
  a = rng.normal(size=(workers, size, size)) * (4 / size) ** 0.5
  eye = np.broadcast_to(np.eye(size), a.shape)
  jacobian = np.block([[eye, a.transpose(0, 2, 1)], [-a, eye]])
  offset = rng.normal(size=(workers, 2 * size))
  solution = np.linalg.solve(jacobian.mean(0), -offset.mean(0))
  return {"jacobian": jacobian, "offset": offset}, solution


GAME, SOLUTION = make_game(M, D)
SINGLE = jax.tree.map(np.float32, GAME)


def operator(z, worker):
  return worker["jacobian"] @ z + worker["offset"]


def solve(tx, steps, game=SINGLE, z0=None, step=None, **options):
  """Each worker's (z after every step [M, steps, 2 D], refreshed [M, steps], last state)."""
  step = step or masha_step(operator, tx)
  z0 = np.zeros_like(game["offset"][0]) if z0 is None else z0

  def of_worker(worker):
    def advance(carry, _):
      z, state, metrics = step(*carry, worker, **options)
      return (z, state), (z, metrics["refreshed"])

    z = jnp.asarray(z0)
    carry = z, tx.init(z, operator(z, worker))
    (_, state), (zs, refreshed) = jax.lax.scan(advance, carry, length=steps)
    return zs, refreshed, state

  return jax.tree.map(np.asarray, jax.jit(jax.vmap(of_worker, axis_name="data"))(game))


def distance(z):
  """Squared, relative to the start at zero."""
  return ((z - SOLUTION) ** 2).sum(-1) / (SOLUTION**2).sum()


def test_without_compression_and_reference_it_is_extragradient():
  jacobian, offset = GAME["jacobian"].mean(0), GAME["offset"].mean(0)
  z, want = np.zeros(2 * D), []
  for _ in range(20):
    half = z - RATE * (jacobian @ z + offset)
    z = z - RATE * (jacobian @ half + offset)
    want.append(z)
  with jax.enable_x64(True):
    np.testing.assert_allclose(solve(extragradient(RATE), 20, GAME)[0][0], want, rtol=1e-12)
    zs, refreshed, _ = solve(masha1(RATE, identity(), tau=0.0), 20, GAME)
  assert refreshed.all()
  # The message is float32 even here, and its last bits are a part of F(half) - F(z).
  np.testing.assert_allclose(zs[0], want, rtol=0, atol=1e-7)
  zs, _, _ = solve(masha1(RATE, identity(), tau=0.0), 20)
  np.testing.assert_allclose(zs[0], want, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_workers_without_compression_are_one_worker_on_the_mean():
  mean = jax.tree.map(lambda x: x.mean(0, keepdims=True), SINGLE)
  results = [solve(masha1(RATE, identity(), tau=0.7), 40, game) for game in (SINGLE, mean)]
  np.testing.assert_allclose(results[0][0][0], results[1][0][0], rtol=0, atol=1e-5)
  np.testing.assert_array_equal(results[0][1][0], results[1][1][0])
  assert 0 < results[0][1][0].sum() < 40


def largest(x, k):
  """x where it is one of the k largest magnitudes of its row, else 0."""
  return np.where(np.abs(x) >= np.sort(np.abs(x))[..., -k, None], x, 0)


def test_masha2_is_the_rule_of_the_paper():
  """Both ways compressed; the random bits are taken from the run."""
  tau, k, server_k = 0.7, 3, 8
  tx = masha2(RATE, top_k(k=k), server_compressor=top_k(k=server_k), tau=tau)
  with jax.enable_x64(True):
    zs, refreshed, state = solve(tx, 25, GAME)
  assert 3 < refreshed[0].sum() < 20
  jacobian, offset = GAME["jacobian"], GAME["offset"]
  z = w = np.zeros(2 * D)
  e, e_server, path = np.zeros((M, 2 * D)), np.zeros(2 * D), []
  for bit in refreshed[0]:
    at_w = jacobian @ w + offset
    half = tau * z + (1 - tau) * w - RATE * at_w.mean(0)
    v = e + RATE * (jacobian @ half + offset - at_w)
    g = largest(v, k)
    u = e_server + g.mean(0)
    e, e_server = v - g, u - largest(u, server_k)
    z = half - largest(u, server_k)
    w = z if bit else w
    path.append(z)
  np.testing.assert_allclose(zs[0], path, rtol=0, atol=1e-6)  # messages are float32
  np.testing.assert_allclose(state.worker_error, e, rtol=0, atol=1e-6)
  np.testing.assert_allclose(state.server_error[0], e_server, rtol=0, atol=1e-6)
  np.testing.assert_allclose(state.reference[0], w, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_without_compression_both_are_the_same():
  one, two = (solve(method(RATE, identity(), tau=0.7), 40) for method in (masha1, masha2))
  np.testing.assert_allclose(one[0], two[0], rtol=0, atol=1e-5)
  assert not np.any(two[2].worker_error)
  assert np.ptp(two[0], axis=0).max() == 0  # all workers hold the same bits


@pytest.mark.slow
def test_mean_over_the_noise_is_the_step_without():
  """4000 draws of one step from the same state: 5 sigma of the measured spread."""
  z = np.random.default_rng(1).normal(size=2 * D).astype(np.float32)
  draws = 4000

  def of_worker(worker, compressor):
    tx = masha1(RATE, compressor, tau=0.7, refresh="host", num_participants=2)
    state = tx.init(jnp.zeros(2 * D), operator(jnp.zeros(2 * D), worker))

    def once(number):  # folded into all keys
      numbered = state._replace(step=number)
      half, _ = tx.extrapolate(z, numbered)
      return tx.update(operator(half, worker), z, numbered, do_refresh=False)[0]

    return jax.vmap(once)(jnp.arange(draws, dtype=jnp.int32))

  def step(compressor):
    local = functools.partial(of_worker, compressor=compressor)
    return np.asarray(jax.jit(jax.vmap(local, axis_name="data"))(SINGLE))[0].astype(np.float64)

  exact = SINGLE["jacobian"].mean(0, dtype=np.float64), SINGLE["offset"].mean(0, dtype=np.float64)
  half = 0.7 * z - RATE * exact[1]
  want = 0.7 * z - RATE * (exact[0] @ half + exact[1])
  noisy = step(rand_k(k=4))
  sigma = noisy.std(0) / draws**0.5
  assert (sigma > 1e-5).all()
  assert (np.abs(noisy.mean(0) - want) < 5 * sigma + 1e-6).all()


def test_the_solution_is_a_fixed_point_where_naive_compression_moves_away():
  z0 = SOLUTION.astype(np.float32)
  local = SINGLE["jacobian"] @ z0 + SINGLE["offset"]
  assert np.linalg.norm(local, axis=1).min() > 1  # though the mean vanishes
  zs, _, _ = solve(masha2(RATE, top_k(k=2), tau=0.9), 50, z0=z0)
  assert distance(zs).max() < 1e-11
  zs, _, _ = solve(extragradient(RATE, top_k(k=2)), 50, z0=z0)
  assert distance(zs)[:, -10:].min() > 1e-3


WAYS = {
  "masha2": masha2(RATE, top_k(k=2), tau=0.9),
  "shared": masha1(0.05, rand_k(k=4, shared_support=True), tau=0.8),
  "participants": masha1(0.05, rand_k(k=4), tau=0.8, num_participants=2, reference="old"),
  "participants2": masha2(0.05, top_k(k=4), tau=0.8, num_participants=2),
  "both_ways": masha1(
    0.05, rand_k(k=5), server_compressor=rand_k(k=10), tau=0.8, refresh="deterministic"
  ),
  "both_ways2": masha2(RATE, top_k(ratio=0.1), server_compressor=top_k(k=4)),
}
FAST = ("masha2",)


@pytest.mark.parametrize(
  "way", [w if w in FAST else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)
def test_reaches_the_solution(way):
  """Far below the rounding of float32: the noise vanishes with the distance."""
  with jax.enable_x64(True):
    zs, refreshed, _ = solve(WAYS[way], 1500, GAME)
  assert zs.dtype == np.float64
  assert distance(zs[:, -1]).max() < 1e-20
  assert np.ptp(zs, axis=0).max() == 0
  assert (refreshed == refreshed[0]).all()
  assert 0 < refreshed[0].mean() < 0.5
  if way == "both_ways":
    np.testing.assert_array_equal(np.flatnonzero(refreshed[0]), np.arange(4, 1500, 5))


@pytest.mark.slow
def test_with_equal_values_sent_it_is_five_orders_closer():
  """40 + 40 numbers, 8 workers, 10,000 values sent by each; 8 in a message, 80 in a dense mean."""
  game, solution = make_game(8, 40)
  lipschitz = np.linalg.norm(game["jacobian"].mean(0), 2)

  def curve(tx, message, refresh):
    """Distances so far, while at most 10,000 values have been sent."""
    steps = 10_000 // (message + refresh // 10)
    zs, refreshed, _ = solve(tx, steps, game)
    sent = refresh + np.cumsum(message + refresh * refreshed[0])
    assert sent[-1] > 9_000
    far = ((zs[0] - solution) ** 2).sum(-1) / (solution**2).sum()
    return far[sent <= 10_000]

  with jax.enable_x64(True):
    dense = curve(extragradient(0.7 / lipschitz), 80, 80)[-1]  # the best of its rates
    naive = [curve(extragradient(0.05, c), 8, 8) for c in (rand_k(k=8), top_k(k=8))]
    ours = [
      curve(masha1(0.1, rand_k(k=8), tau=0.9), 8, 80)[-1],
      curve(masha2(0.2, top_k(k=8), tau=0.9), 8, 80)[-1],
    ]
  assert 1e-18 < dense < 1e-10
  assert max(ours) < 1e-5 * dense
  for far in naive:  # a plateau, from early on
    assert far[300:].min() > 1e-2
    assert far[100:200].mean() < 20 * far[300:].mean()


@pytest.mark.slow
def test_minibatches():
  """Each worker's operator is a mean over samples; only the refresh reads all of them."""
  samples = 6
  rng = np.random.default_rng(2)
  noise = 0.3 * rng.normal(size=(M, samples, 2 * D))
  data = {
    "jacobian": np.repeat(GAME["jacobian"][:, None], samples, 1),
    "offset": GAME["offset"][:, None] + noise - noise.mean(1, keepdims=True),
  }
  data["jacobian"] *= rng.uniform(0.5, 1.5, (M, samples, 1, 1))

  def of_rows(z, rows):
    return jax.vmap(operator, (None, 0))(z, rows).mean(0)

  mean = {k: v.mean((0, 1)) for k, v in data.items()}
  solution = np.linalg.solve(mean["jacobian"], -mean["offset"])
  tx = masha1(0.05, rand_k(k=5), tau=0.8)
  step = masha_step(of_rows, tx, minibatch=True)

  def of_worker(rows):
    def advance(carry, key):
      key = jax.random.fold_in(key, jax.lax.axis_index("data"))
      batch = jax.tree.map(lambda x: x[jax.random.choice(key, samples, (2,))], rows)
      z, state, _ = step(*carry, batch, refresh_batch=rows)
      return (z, state), None

    z = jnp.zeros(2 * D, jnp.float64)
    keys = jax.random.split(jax.random.key(0), 1500)
    return jax.lax.scan(advance, (z, tx.init(z, of_rows(z, rows))), keys)[0][0]

  with jax.enable_x64(True):
    z = np.asarray(jax.jit(jax.vmap(of_worker, axis_name="data"))(data))[0]
  assert ((z - solution) ** 2).sum() / (solution**2).sum() < 1e-15


def test_refreshes_cost_what_is_expected():
  """Floats sent per step: k + (1 - tau) d within 3 sigma over 2000 steps."""
  k, size, tau, steps = 8, 80, 0.9, 2000
  draw = jax.jit(jax.vmap(lambda step: draw_refresh(3, step, tau)))
  sent = k + size * np.asarray(draw(jnp.arange(steps)))
  sigma = size * (tau * (1 - tau) / steps) ** 0.5
  assert abs(sent.mean() - (k + (1 - tau) * size)) < 3 * sigma


@pytest.mark.slow
def test_the_host_draws_the_same_bits():
  tx = masha1(RATE, rand_k(k=4), tau=0.7, refresh="host", seed=5)
  step = masha_step(operator, tx)

  def first(worker):
    return tx.init(jnp.zeros(20), operator(jnp.zeros(20), worker))

  @functools.cache
  def program(do_refresh):
    local = functools.partial(step, do_refresh=do_refresh)
    return jax.jit(jax.vmap(local, axis_name="data"))

  z, state, bits = jnp.zeros((M, 20)), jax.jit(jax.vmap(first, axis_name="data"))(SINGLE), []
  for i in range(12):
    bits.append(bool(draw_refresh(5, i, 0.7)))
    z, state, _ = program(bits[-1])(z, state, SINGLE)
  want, refreshed, _ = solve(masha1(RATE, rand_k(k=4), tau=0.7, seed=5), 12)
  assert refreshed[0].tolist() == bits
  np.testing.assert_allclose(z, want[:, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shared", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_devices_agree_and_send_what_the_formula_says(shared):
  """Under shard_map with checks: what must be equal is typed so, and compiles to the bytes."""
  compressor = rand_k(k=4, shared_support=shared)
  tx = masha1(RATE, compressor, tau=0.7)
  step = masha_step(operator, tx)
  mesh = jax.make_mesh((M,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:M])
  state_specs = jax.eval_shape(
    jax.vmap(lambda w: tx.init(jnp.zeros(20), operator(jnp.zeros(20), w)), axis_name="data"), SINGLE
  )
  specs = jax.tree.map(lambda _: jax.P(), state_specs)._replace(local_operator=jax.P("data"))

  def local(z, state, worker):
    own = state._replace(local_operator=state.local_operator[0])
    z, state, metrics = step(z, own, jax.tree.map(lambda x: x[0], worker))
    return z, state._replace(local_operator=state.local_operator[None]), metrics["refreshed"]

  def init(worker):
    first = tx.init(jnp.zeros(20), operator(jnp.zeros(20), jax.tree.map(lambda x: x[0], worker)))
    return first._replace(local_operator=first.local_operator[None])

  on_mesh = functools.partial(jax.shard_map, mesh=mesh)
  state = jax.jit(on_mesh(init, in_specs=jax.P("data"), out_specs=specs))(SINGLE)
  train = jax.jit(
    on_mesh(local, in_specs=(jax.P(), specs, jax.P("data")), out_specs=(jax.P(), specs, jax.P()))
  )
  compiled = train.lower(jnp.zeros(20), state, SINGLE).compile()
  z, zs = jnp.zeros(20), []
  for _ in range(8):
    z, state, _ = compiled(z, state, SINGLE)
    zs.append(np.asarray(z))
  np.testing.assert_allclose(zs, solve(tx, 8)[0][0], rtol=0, atol=1e-6)
  every_step, in_a_refresh = masha_bytes(z, M, compressor)
  # The meter counts the larger branch of a cond.
  assert collective_bytes(compiled, mesh).total == every_step + in_a_refresh


SPECS = {"w": jax.P("fsdp"), "v": jax.P()}


def coupled(x, y, data):
  """A payoff leaf by leaf and element by element, that compilers can shard as they like."""
  parts = [
    jnp.sum(x[n] ** 2 + 2 * data[n][0] * x[n] * y[n] - y[n] ** 2 + data[n][1] * (x[n] - y[n]))
    for n in x
  ]
  return sum(parts) / 2


def ten_steps(z, data, specs=None):
  """Both ways compressed, and two refreshes."""
  options = {"tau": 0.75, "refresh": "deterministic", "specs": specs and (specs, specs)}
  tx = masha2(0.2, top_k(k=2), server_compressor=top_k(k=3), **options)
  operator = saddle_operator(coupled)
  step = masha_step(operator, tx)
  carry = z, tx.init(z, operator(z, data))
  return jax.lax.fori_loop(0, 10, lambda _, carry: step(*carry, data)[:2], carry)[0]


def on_shards(kind, z, data):
  """`ten_steps` on a mesh (data=2, fsdp=2), and what was sent."""
  mesh = jax.make_mesh((2, 2), ("data", "fsdp"), (kind,) * 2, devices=jax.devices()[:4])
  explicit = kind == jax.sharding.AxisType.Explicit
  stacked = {n: jax.P("data", None, *s) for n, s in SPECS.items()}

  def local(z, data):
    own = jax.tree.map(lambda x: x[0], data)
    return ten_steps(z, own, None if explicit else SPECS)  # Explicit types tell

  def fun(z, data):
    return jax.shard_map(
      local, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P(), axis_names={"data"}
    )(z, data)

  if explicit:  # Auto at the border: JAX would gather the shards there
    inside = {n: jax.P(None, None, *s) for n, s in SPECS.items()}
    local = jax.sharding.explicit_axes(local, axes=("fsdp",), in_sharding=((SPECS, SPECS), inside))
    fun = jax.sharding.auto_axes(fun, out_sharding=(SPECS, SPECS))

  def place(x, spec):
    return jax.device_put(x, jax.NamedSharding(mesh, spec))

  args = jax.tree.map(place, z, (SPECS, SPECS)), jax.tree.map(place, data, stacked)
  with jax.set_mesh(mesh):
    compiled = jax.jit(fun).lower(*args).compile()
  return jax.tree.map(np.asarray, compiled(*args)), collective_bytes(compiled, mesh)


@pytest.mark.slow
def test_sharded_leaves():
  """As with every shard a leaf of its own; nothing is sent over the axis that shards them."""
  rng, sizes = np.random.default_rng(6), {"w": 16, "v": 6}
  data = {n: rng.normal(size=(2, 2, size)).astype(np.float32) for n, size in sizes.items()}
  z = ({n: np.zeros(size, np.float32) for n, size in sizes.items()},) * 2

  def split(tree):
    return {"top": tree["w"][..., :8], "bottom": tree["w"][..., 8:], "v": tree["v"]}

  stacked = jax.jit(jax.vmap(ten_steps, (None, 0), axis_name="data"))
  want = stacked(tuple(map(split, z)), split(data))
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    got, report = on_shards(kind, z, data)
    assert {op.axis for op in report.ops} == {"data"}
    for player, expected in zip(got, want):
      for name, value in split(player).items():
        np.testing.assert_allclose(value, expected[name][0], rtol=0, atol=1e-6)
        assert np.abs(value).max() > 0.1


def test_a_sum_over_workers_is_no_operator():
  """jax.grad at a point that all share, where shard_map checks types."""
  tx = masha1(RATE, rand_k(k=1))
  mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])

  def local(far):
    grad = jax.grad(lambda z: jnp.sum((z - far) ** 2))
    return tx.init(jnp.zeros(4), grad(jnp.zeros(4))).mean_operator

  summed = jax.shard_map(local, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
  with pytest.raises(ValueError, match=r"a value of each worker of its own.* equal over `data`"):
    jax.eval_shape(summed, jnp.ones(8))


BAD = [
  (lambda: masha1(RATE, top_k(k=2)), "`compressor` must be unbiased .*TopK.* see masha2"),
  (lambda: masha1(RATE, rand_k(k=2), server_compressor=top_k(k=2)), "`server_compressor` must be"),
  (lambda: masha1(RATE, rand_k(k=2), tau=1.0), r"`tau` must be in \[0, 1\), got 1.0"),
  (lambda: masha1(0.0, rand_k(k=2)), "`learning_rate` must be positive and finite, got 0.0"),
  (lambda: extragradient(-1), "`learning_rate` must be positive and finite, got -1"),
  (lambda: masha1(1, rand_k(k=2), reference="next"), "`reference` must be one of .* got 'next'"),
  (lambda: masha1(1, rand_k(k=2), refresh="never"), "`refresh` must be one of .* got 'never'"),
  (lambda: masha1(1, rand_k(k=2), num_participants=0), "`num_participants` must be at least 1"),
  (lambda: masha2(1, top_k(k=2), prox=lambda z, r: z), "defined only for unconstrained problems"),
  (lambda: masha2(1, rand_k(k=2)), r"`compressor` must be contractive .* at 20 .* see masha1"),
  (lambda: masha1(1, rand_k(k=2), num_participants=9), "at most the 4 workers, got 9"),
  (lambda: masha1(1, rand_k(k=2), refresh="host"), '`do_refresh` must be given exactly if'),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_arguments(make, message):
  with pytest.raises(ValueError, match=message):
    solve(make(), 1)


def test_bad_trees():
  tx = masha1(RATE, rand_k(k=1))
  z = jnp.zeros(4)

  def call(function, *args):
    return jax.vmap(lambda _: function(*args), axis_name="data", axis_size=2)(jnp.zeros(2))

  with pytest.raises(ValueError, match="`params` must be float32 or float64, got bfloat16"):
    call(tx.init, z.astype(jnp.bfloat16), z.astype(jnp.bfloat16))
  with pytest.raises(ValueError, match=r"must return a tree like `params`, .*got"):
    call(tx.init, z, (z, z))
  with pytest.raises(ValueError, match=r"shape \(4,\) at the root, got \(3,\)"):
    call(tx.init, z, jnp.zeros(3))
  with pytest.raises(ValueError, match="axis `data` is unbound"):
    tx.init(z, z)


def test_a_missing_refresh_is_an_error_or_nan():
  tx = masha1(RATE, rand_k(k=1))
  z, zero = np.zeros(4, np.float32), np.zeros((), np.int32)
  state = MashaState(zero, zero + 1, np.asarray(False), z, z, z, (), ())
  stale = state._replace(needs_refresh=np.asarray(True))
  resized = state._replace(workers=zero + 3)

  def extrapolate(state):
    return jax.vmap(lambda z: tx.extrapolate(z, state)[0], axis_name="data")(z[None])

  compiled = jax.jit(extrapolate)
  assert not np.any(compiled(state))
  for wrong in (stale, resized):
    assert np.isnan(compiled(wrong)).all()
    with pytest.raises(ValueError, match="`refresh` must be called before extrapolate"):
      extrapolate(wrong)
