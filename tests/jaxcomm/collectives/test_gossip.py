"""Topologies as matrices, and gossip by permutes against those matrices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.collectives import (
  complete,
  consensus_distance,
  exponential,
  gossip_error,
  gossip_mix,
  gossip_mix_bytes,
  one_peer_exponential,
  random_matching,
  ring,
  torus,
)
from jaxcomm.inspect import collective_bytes

AXIS = "replica"
TOPOLOGIES = {
  "ring": ring(),
  "torus": torus(),
  "exponential": exponential(),
  "one_peer": one_peer_exponential(),
  "complete": complete(),
  "matching": random_matching(3),
  "bipartite": random_matching(3, bipartite=True),
}
pytestmark = pytest.mark.filterwarnings("ignore:one_peer_exponential")


def of_size(size):
  """The topologies that exist for so many replicas."""
  missing = {"torus"} if size in (2, 3, 5, 7, 11, 13) else set()
  missing |= {"bipartite"} if size % 2 and size > 1 else set()
  return {name: graph for name, graph in TOPOLOGIES.items() if name not in missing}


def dense(topology, size, steps, first_step=0):
  """The product of the matrices of those steps, float64."""
  product = np.eye(size)
  for step in range(first_step, first_step + steps):
    product = topology.matrix(size, step) @ product
  return product


@pytest.mark.parametrize("size", [*range(1, 10), 12, 16])
def test_matrices_are_doubly_stochastic(size):
  for name, topology in of_size(size).items():
    for links in topology.phases(size):
      matrix = np.eye(size) / (len(links) + 1)
      for link in links:
        assert sorted(link) == list(range(size)), name
        matrix[range(size), link] += 1 / (len(links) + 1)
      np.testing.assert_allclose(matrix.sum(0), 1, atol=1e-12)
      np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-12)
      assert (np.abs(matrix - matrix.T).max() < 1e-12) or not topology.symmetric
  neighbours = {"ring": min(2, size - 1), "complete": size - 1, "matching": min(1, size - 1)}
  for name, degree in neighbours.items():
    assert TOPOLOGIES[name].degree(size) == degree


def test_contraction_has_its_closed_forms():
  for size in (3, 8, 16, 100):
    ring_of = (1 + 2 * math.cos(2 * math.pi / size)) / 3
    assert abs(ring().contraction(size) - ring_of) < 1e-9
    assert complete().contraction(size) == 0
  assert [round(ring().contraction(n), 4) for n in (8, 16)] == [0.8047, 0.9493]
  assert [round(torus().contraction(n), 4) for n in (16, 100)] == [0.6, 0.9236]
  assert [round(exponential().contraction(n), 4) for n in (8, 16, 100)] == [0.5, 0.6, 0.75]
  assert [one_peer_exponential().contraction(n) for n in (1, 2, 8, 16)] == [0] * 4
  assert 0 < one_peer_exponential().contraction(6) < 1
  assert abs(random_matching().contraction(8) ** 2 - (1 - 8 / 14)) < 1e-12
  assert abs(random_matching().contraction(5) ** 2 - 1 / 2) < 1e-12
  assert abs(random_matching(bipartite=True).contraction(8) ** 2 - 1 / 2) < 1e-12
  assert ring().spectral_gap(8) == 1 - ring().contraction(8)


def test_random_pairs_contract_at_their_rate_in_mean_square():
  d = np.random.default_rng(0).normal(size=8)
  d -= d.mean()
  for topology in (random_matching(), random_matching(bipartite=True)):
    squares = [np.sum(((d + d[list(link)]) / 2) ** 2) for (link,) in topology.phases(8)]
    worst = topology.contraction(8) ** 2 * np.sum(d**2)
    assert np.mean(squares) <= worst * (1 + 1e-9)
    if not topology.bipartite:  # all differences shrink alike
      np.testing.assert_allclose(np.mean(squares), worst, rtol=1e-9)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_pairs_are_matchings_that_visit_all_partners(size):
  topology = random_matching(1)
  links = [list(link) for (link,) in topology.phases(size)]
  for link in links:
    assert [link[j] for j in link] == list(range(size))
    assert sum(link[i] == i for i in range(size)) == size % 2
  met = np.sum([np.eye(size)[link] for link in links], axis=0)
  np.testing.assert_array_equal(met, np.ones((size, size)) - (1 - size % 2) * np.eye(size))


def test_pairs_are_drawn_evenly_and_by_seed():
  steps = jnp.arange(2000)
  draws = [random_matching(seed).phase for seed in (0, 1)]
  fun = jax.jit(jax.vmap(lambda step: [draw(step, 8) for draw in draws]))
  one, other = (np.asarray(x) for x in fun(steps))
  counts = np.bincount(one, minlength=7)
  assert counts.size == 7
  assert np.abs(counts - 2000 / 7).max() < 5 * math.sqrt(2000 / 7)
  assert (one != other).mean() > 0.5


def check_mix(got, x, size, steps, first_step):
  for name, topology in of_size(size).items():
    for q in steps:
      want = dense(topology, size, q, first_step) @ x.astype(np.float64)
      np.testing.assert_allclose(got[name, q], want, atol=1e-6, err_msg=f"{name} {q}")
      np.testing.assert_array_equal(got[name, q][:, 0], x[:, 0])  # what is shared stays


@pytest.mark.parametrize(
  "size", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3, 4, 5, 7, 8, 9))]
)
def test_mix_is_the_product_of_the_matrices(on_devices, stacked, size):
  x = stacked(size, (4,))
  x[:, 0] = 0.1

  def local(x):
    return {
      (name, steps): gossip_mix(x, AXIS, topology, steps=steps, first_step=2)
      for name, topology in of_size(size).items()
      for steps in (1, 5)
    }

  check_mix(on_devices(local, "vmap", size)(x), x, size, (1, 5), 2)


FAST = ("ring", "matching")


@pytest.mark.parametrize(
  "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in TOPOLOGIES]
)
def test_devices_send_permutes_of_the_bytes_in_the_formula(on_devices, stacked, name):
  topology, size = TOPOLOGIES[name], 8
  tree = {"w": stacked(size, (3, 4)), "h": stacked(size, (5,), dtype="bfloat16")}

  def local(tree):
    return gossip_mix(tree, AXIS, topology, steps=2, first_step=1)

  fun = on_devices(local, "checked", size)
  compiled = fun.lower(tree).compile()
  got = compiled(jax.tree.map(jnp.asarray, tree))
  product = dense(topology, size, 2, 1)
  for leaf, atol in (("w", 1e-6), ("h", 2**-6)):
    want = np.einsum("ij,j...->i...", product, tree[leaf].astype(np.float64))
    np.testing.assert_allclose(np.asarray(got[leaf], np.float64), want, atol=atol)
    assert got[leaf].dtype == tree[leaf].dtype
  report = collective_bytes(compiled)
  assert {op.kind for op in report.ops} == {"collective-permute"}
  assert {op.dtype for op in report.ops} == {"f32", "u16"}
  assert report.total == sum(
    gossip_mix_bytes(x.shape[1:], size, topology, steps=2, dtype=x.dtype) for x in tree.values()
  )


def test_differences_shrink_by_the_contraction(on_devices, stacked):
  """At most by λ^Q, and by just that from the worst start."""
  size, steps = 8, 3  # one turn of one_peer
  fixed = [n for n in TOPOLOGIES if n not in ("matching", "bipartite")]
  start = {}
  for name in fixed:
    turn = dense(TOPOLOGIES[name], size, 3 if name == "one_peer" else 1)
    worst = np.linalg.svd(turn - 1 / size)[2][0]
    start[name] = np.stack([stacked(size, ()), worst], -1).astype(np.float32)

  def local(x):
    return {n: gossip_mix(v, AXIS, TOPOLOGIES[n], steps=steps) for n, v in x.items()}

  got = jax.tree.map(np.asarray, on_devices(local, "vmap", size)(start))
  for name in fixed:
    before, after = (
      np.linalg.norm(x - x.mean(0), axis=0).astype(np.float64) for x in (start[name], got[name])
    )
    rate = TOPOLOGIES[name].contraction(size) ** steps
    assert after[0] <= rate * before[0] + 1e-6
    np.testing.assert_allclose(after[1], rate * before[1], atol=2e-6, err_msg=name)


@pytest.fixture(scope="module")
def masked():
  """(x [6, 2], alive bool[6]) -> x by topology, after one step."""
  names = ("ring", "torus", "complete", "matching", "exponential")

  def local(x, alive):
    return {n: gossip_mix(x, AXIS, TOPOLOGIES[n], first_step=3, alive=alive) for n in names}

  return jax.jit(jax.vmap(local, in_axes=(0, None), axis_name=AXIS))


@settings(max_examples=15, deadline=None)
@given(
  st.lists(st.booleans(), min_size=6, max_size=6),
  st.lists(st.integers(-9, 9), min_size=6, max_size=6),
)
def test_the_dead_are_left_out_and_the_sum_stays(masked, alive, values):
  alive = np.asarray(alive)
  x = np.stack([np.asarray(values, np.float32), np.ones(6, np.float32)], -1)
  poisoned = np.where(alive[:, None], x, np.float32(np.nan))
  for name, got in masked(poisoned, alive).items():
    got = np.asarray(got)
    assert np.isnan(got[~alive]).all()
    assert np.isfinite(got[alive]).all(), name
    np.testing.assert_allclose(got[alive].sum(0), x[alive].sum(0), atol=1e-5, err_msg=name)
    if TOPOLOGIES[name].symmetric:  # rows sum to 1 as well
      np.testing.assert_allclose(got[alive, 1], 1, atol=1e-6)


def test_with_everybody_alive_the_mask_changes_nothing(masked, on_devices, stacked):
  x = stacked(6, (2,))
  for name, got in masked(x, np.ones(6, bool)).items():
    want = dense(TOPOLOGIES[name], 6, 1, 3) @ x.astype(np.float64)
    np.testing.assert_allclose(got, want, atol=1e-6, err_msg=name)


def test_consensus_distance(on_devices, stacked):
  tree = {"a": stacked(4, (3,)), "b": stacked(4, (2, 2), seed=1)}
  rows = np.concatenate([x.reshape(4, -1) for x in tree.values()], 1).astype(np.float64)
  got = on_devices(lambda t: consensus_distance(t, AXIS), "checked", 4, equal=True)(tree)
  np.testing.assert_allclose(got, np.sqrt(((rows - rows.mean(0)) ** 2).mean()), rtol=1e-6)


def traced(fun, size):
  return jax.eval_shape(jax.vmap(fun, axis_name=AXIS), jnp.zeros((size, 3)))


def test_rejects_bad_topologies():
  for size in (2, 3, 7):
    with pytest.raises(ValueError, match=f"torus needs rows.*a prime number of {size} replicas"):
      traced(lambda x: gossip_mix(x, AXIS, torus()), size)
  with pytest.raises(ValueError, match="got `rows`=3 and 8 replicas"):
    torus(3).matrix(8)
  for bad in (1, 0, 2.0, True):
    with pytest.raises(ValueError, match=r"`rows` must be an integer >= 2 or None, got"):
      torus(bad)
  with pytest.raises(ValueError, match="`bipartite` needs an even number of replicas, got 5"):
    random_matching(bipartite=True).contraction(5)


@pytest.mark.filterwarnings("default:one_peer_exponential")
def test_warns_where_one_peer_is_not_exact():
  with pytest.warns(UserWarning, match="averages exactly only powers of two of replicas, got 6"):
    one_peer_exponential().contraction(6)


def test_rejects_bad_arguments():
  for bad in (0, 1.0, True):
    with pytest.raises(ValueError, match="`steps` must be an integer >= 1, got"):
      traced(lambda x, bad=bad: gossip_mix(x, AXIS, ring(), steps=bad), 4)
  for alive in (jnp.ones(3, bool), jnp.ones(4)):
    with pytest.raises(ValueError, match=r"`alive` must be bool\[4\], one entry per replica, got"):
      traced(lambda x, alive=alive: gossip_mix(x, AXIS, ring(), alive=alive), 4)
  with pytest.raises(ValueError, match="must have a floating-point dtype, got int32"):
    traced(lambda x: gossip_error(x.astype(jnp.int32), AXIS, ring()), 4)
  with pytest.raises(ValueError, match="axis `replica` is unbound"):
    gossip_mix(jnp.ones(3), AXIS, ring(), steps=2)
  with pytest.raises(ValueError, match="`axis_size` must be at least 1, got 0"):
    gossip_mix_bytes((3,), 0, ring())
