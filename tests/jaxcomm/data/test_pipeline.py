"""Packing and the global order of batches: exact, resumable, equal for any number of processes."""

import itertools
import json
import subprocess
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcomm.data import batches, check_token_ids, eval_batches, load_text, mix, pack, prepare_text

SEQ_LEN = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  text = "".join(f"{i} squared is {i * i}.\n\n" for i in range(1500))
  (folder / "squares.txt").write_text(text)
  return prepare_text(folder / "squares.txt", vocab_size=300, cache_dir=folder / "cache")


@pytest.fixture(scope="module")
def dataset(corpus):
  return load_text(corpus, split="train", seq_len=SEQ_LEN)


def numbers(n):
  """A dataset whose element i is the number i."""
  return grain.MapDataset.range(n).map(lambda i: {"x": np.int32(i)})


def take(iterator, n):
  return list(itertools.islice(iterator, n))


def assert_equal(got, want):
  assert len(got) == len(want)
  for a, b in zip(got, want):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def packed_by_hand(window, eot_id):
  """One token after the other, as the docstring of `pack` says it."""
  out = {k: [] for k in ("tokens", "targets", "segment_ids", "positions", "loss_mask")}
  segment, position = 1, 0
  for token, target in itertools.pairwise(window):
    values = (token, target, segment, position, float(token != eot_id))
    for name, value in zip(out, values):
      out[name].append(value)
    segment, position = (segment + 1, 0) if token == eot_id else (segment, position + 1)
  return out


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=30))
def test_pack_equals_the_definition(window):
  got, want = pack(np.array(window, np.uint16), eot_id=0), packed_by_hand(window, 0)
  assert list(got) == list(want)
  for name, value in got.items():
    assert value.dtype == (np.float32 if name == "loss_mask" else np.int32)
    np.testing.assert_array_equal(value, want[name])


def test_sequences_cover_the_split_in_order(corpus, dataset):
  tokens = np.asarray(corpus.tokens("train"))
  n = (len(tokens) - 1) // SEQ_LEN
  assert len(dataset) == n
  rows = [dataset[i] for i in range(n)]
  np.testing.assert_array_equal(np.concatenate([r["tokens"] for r in rows]), tokens[: n * SEQ_LEN])
  want = tokens[1 : n * SEQ_LEN + 1]
  np.testing.assert_array_equal(np.concatenate([r["targets"] for r in rows]), want)


def test_segments_change_exactly_at_end_of_text(corpus, dataset):
  changes = 0
  for i in range(len(dataset)):
    row = dataset[i]
    after_eot = row["tokens"][:-1] == corpus.eot_id
    np.testing.assert_array_equal(np.diff(row["segment_ids"]) == 1, after_eot)
    np.testing.assert_array_equal(row["positions"][1:] == 0, after_eot)
    changes += after_eot.sum()
  assert changes > 20


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (13, 5), (8, 4)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_epoch_holds_every_sample_once(n, batch_size, shuffle):
  it = batches(numbers(n), batch_size=batch_size, seed=3, shuffle=shuffle)
  got = np.concatenate([b["x"] for b in take(it, 3 * n)])  # 3 * batch_size epochs
  epochs = got.reshape(-1, n)
  np.testing.assert_array_equal(np.sort(epochs, -1), np.tile(np.arange(n), (len(epochs), 1)))
  orders = {tuple(e) for e in epochs}
  assert (len(orders) > 2) if shuffle else orders == {tuple(range(n))}


def test_seed_sets_the_order():
  def order(seed):
    return [b["x"].tolist() for b in take(batches(numbers(50), batch_size=5, seed=seed), 20)]

  assert order(1) == order(1)
  assert order(1) != order(2)


def test_order_is_the_one_of_earlier_releases():
  # Another order would make `--resume` of an old run train on other batches without a word.
  it = batches(numbers(10), batch_size=5, seed=3)
  got = [b["x"].tolist() for b in take(it, 4)]
  assert got == [[4, 7, 0, 8, 2], [5, 3, 6, 1, 9], [6, 0, 4, 3, 2], [1, 9, 8, 7, 5]]


@pytest.mark.parametrize("num_processes", [1, 2, 4])
@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_of_all_processes_are_the_global_batch(dataset, num_processes, shuffle):
  steps, batch_size = 2 * len(dataset) // 12, 12  # batches straddle epochs
  options = {"batch_size": batch_size, "seed": 5, "shuffle": shuffle}
  whole = take(batches(dataset, **options), steps)
  count = batch_size // num_processes
  parts = [
    take(batches(dataset, **options, row_start=p * count, row_count=count), steps)
    for p in range(num_processes)
  ]
  joined = [{k: np.concatenate([r[k] for r in rows]) for k in rows[0]} for rows in zip(*parts)]
  assert whole[0]["tokens"].shape == (batch_size, SEQ_LEN)
  assert_equal(joined, whole)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_uneven_rows_are_the_global_batch(data):
  n = data.draw(st.integers(1, 20), "n")
  batch_size = data.draw(st.integers(1, n), "batch_size")
  cuts = data.draw(st.sets(st.integers(1, batch_size), max_size=3), "cuts") | {0, batch_size}
  whole = take(batches(numbers(n), batch_size=batch_size, seed=1), 7)
  parts = [
    take(batches(numbers(n), batch_size=batch_size, seed=1, row_start=a, row_count=b - a), 7)
    for a, b in itertools.pairwise(sorted(cuts))
  ]
  assert_equal([{"x": np.concatenate([p["x"] for p in ps])} for ps in zip(*parts)], whole)


# Mixtures of several sources.


def parts_of(sizes):
  """Datasets whose elements tell their part and their place in it."""

  def part(p, n):
    return grain.MapDataset.range(n).map(lambda i: {"part": np.int32(p), "x": np.int32(i)})

  return [part(p, n) for p, n in enumerate(sizes)]


def elements(batches_taken):
  return [(int(p), int(x)) for b in batches_taken for p, x in zip(b["part"], b["x"])]


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_a_mixture_keeps_shares_epochs_and_global_batches(data):
  sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3), "sizes")
  weights = [data.draw(st.integers(1, 5), "weight") for _ in sizes]
  batch_size = data.draw(st.sampled_from([n for n in (1, 2, 4) if n <= sum(sizes)]), "batch_size")
  options = {"batch_size": batch_size, "seed": 7, "weights": weights}
  steps = 40 // batch_size
  whole = take(batches(parts_of(sizes), **options), steps)
  taken = elements(whole)
  for p, n in enumerate(sizes):
    own = [x for q, x in taken if q == p]
    assert abs(len(own) - len(taken) * weights[p] / sum(weights)) <= len(sizes)
    for epoch in range(0, len(own), n):  # nothing lost or repeated in an epoch of a part
      seen = own[epoch : epoch + n]
      assert len(set(seen)) == len(seen)
      assert len(seen) == n or epoch + n > len(own)
  for num_processes in [n for n in (2, 4) if batch_size % n == 0]:
    count = batch_size // num_processes
    rows = [
      take(batches(parts_of(sizes), **options, row_start=p * count, row_count=count), steps)
      for p in range(num_processes)
    ]
    joined = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*rows)]
    assert_equal(joined, whole)


@pytest.mark.parametrize("done", [0, 3, 50])
def test_a_mixture_resumes_exactly(done):
  def start():
    return batches(parts_of((5, 11)), batch_size=4, seed=2, weights=[0.7, 0.3])

  it = start()
  take(it, done)
  state = json.loads(json.dumps(it.get_state()))
  want = take(it, 9)
  fresh = start()
  fresh.set_state(state)
  assert_equal(take(fresh, 9), want)


def test_parts_of_a_mixture_have_orders_of_their_own():
  taken = elements(take(batches(parts_of((9, 9)), batch_size=18, seed=0, weights=[1, 1]), 1))
  first, second = ([x for q, x in taken if q == p] for p in (0, 1))
  assert sorted(first) == sorted(second) == list(range(9))
  assert first != second


def test_a_mixture_of_one_is_that_one():
  one = batches(numbers(10), batch_size=5, seed=3)
  assert_equal(take(batches([numbers(10)], batch_size=5, seed=3, weights=[9]), 4), take(one, 4))


def test_mix_ends_with_the_first_part_that_does():
  got = [(int(e["part"]), int(e["x"])) for e in mix(parts_of((4, 100)), [0.5, 1.5])]
  assert [x for p, x in got if p == 0] == list(range(4))
  assert [x for p, x in got if p == 1] == list(range(12))
  rest = batches(parts_of((4, 100)), batch_size=5, seed=0, weights=[1, 3], repeat=False)
  assert len(list(rest)) == 3


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_bad_weights(weights):
  with pytest.raises(ValueError, match="`weights` must be a positive finite number for each of 2"):
    batches(parts_of((4, 4)), batch_size=2, seed=0, weights=weights)


def test_weights_without_several_datasets():
  for dataset, weights in ((numbers(9), [1]), ([numbers(9)], None)):
    with pytest.raises(ValueError, match="`weights` must be given for a list of datasets"):
      batches(dataset, batch_size=2, seed=0, weights=weights)


def test_without_repeat_only_whole_batches_of_one_epoch():
  got = list(batches(numbers(10), batch_size=4, seed=0, repeat=False))
  assert [len(b["x"]) for b in got] == [4, 4]
  assert len(set(np.concatenate([b["x"] for b in got]).tolist())) == 8


@pytest.mark.parametrize("done", [0, 1, 7, 100])
def test_state_is_json_and_resumes_exactly(dataset, done):
  it = batches(dataset, batch_size=6, seed=2)
  take(it, done)
  state = json.loads(json.dumps(it.get_state()))
  want = take(it, 5)
  fresh = batches(dataset, batch_size=6, seed=2)
  fresh.set_state(state)
  assert fresh.get_state() == state
  assert_equal(take(fresh, 5), want)
  it.set_state(state)  # and back again in the same iterator
  assert_equal(take(it, 5), want)


def test_state_moves_between_numbers_of_processes(dataset):
  whole = batches(dataset, batch_size=8, seed=2)
  half = batches(dataset, batch_size=8, seed=2, row_start=4, row_count=4)
  take(whole, 9)
  take(half, 9)
  assert whole.get_state() == half.get_state()
  half.set_state(whole.get_state())
  assert_equal([next(half)], [{k: v[4:] for k, v in next(whole).items()}])


def test_resume_in_a_fresh_process(corpus, dataset):
  it = batches(dataset, batch_size=6, seed=2)
  take(it, len(dataset) // 6 + 3)  # in the second epoch
  code = (
    "import json, sys, pathlib; from jaxcomm import data\n"
    "meta = json.loads((pathlib.Path(sys.argv[1]) / 'meta.json').read_text())\n"
    "c = data.TextCorpus(pathlib.Path(sys.argv[1]), meta['vocab_size'], meta['eot_id'], meta)\n"
    f"d = data.load_text(c, split='train', seq_len={SEQ_LEN})\n"
    "it = data.batches(d, batch_size=6, seed=2)\n"
    "it.set_state(json.loads(sys.argv[2]))\n"
    "print(json.dumps([{k: v.tolist() for k, v in next(it).items()} for _ in range(3)]))"
  )
  command = [sys.executable, "-c", code, str(corpus.directory), json.dumps(it.get_state())]
  result = subprocess.run(command, check=True, capture_output=True, timeout=120, text=True)
  assert_equal(json.loads(result.stdout), take(it, 3))


def test_eval_batches_start_over_and_keep_their_shape(dataset):
  got = eval_batches(dataset, 4, 3)
  first, second = list(got), list(got)
  assert len(first) == 3
  assert_equal(first, second)
  want = [
    {k: np.stack([dataset[4 * s + r][k] for r in range(4)]) for k in dataset[0]} for s in range(3)
  ]
  assert_equal(first, want)
  rows = list(eval_batches(dataset, 4, 3, row_start=2, row_count=1))
  assert_equal(rows, [{k: v[2:3] for k, v in b.items()} for b in want])


def test_eval_batches_default_is_all_whole_batches():
  assert [b["x"].tolist() for b in eval_batches(numbers(7), 3)] == [[0, 1, 2], [3, 4, 5]]


def test_bad_eval_batches():
  for n in (0, -1, 3):
    with pytest.raises(ValueError, match=rf"`num_batches` must be in \[1, 2\] .* got {n}"):
      eval_batches(numbers(7), 3, n)
  with pytest.raises(ValueError, match="`batch_size` must be at most the number of sequences 2"):
    eval_batches(numbers(2), 3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
    ({"batch_size": 11}, "`batch_size` must be at most the number of sequences 10, got 11"),
    ({"batch_size": 4, "row_start": 4}, "`row_start`, `row_count` must select .* got 4, 0"),
    ({"batch_size": 4, "row_start": -1}, "`row_start`, `row_count` must select .* got -1, 5"),
    ({"batch_size": 4, "row_start": 2, "row_count": 3}, "within `batch_size` 4, got 2, 3"),
    ({"batch_size": 4, "seed": -1}, r"`seed` must be in .* got -1"),
    ({"batch_size": 4, "seed": 2**32}, r"`seed` must be in .* got 4294967296"),
  ],
)
def test_bad_batches(options, message):
  with pytest.raises(ValueError, match=message):
    batches(numbers(10), **{"seed": 0, **options})


def test_bad_load_text(corpus):
  with pytest.raises(ValueError, match="`seq_len` must be at least 1, got 0"):
    load_text(corpus, split="train", seq_len=0)
  n = len(corpus.tokens("validation"))
  assert len(load_text(corpus, split="validation", seq_len=n - 1)) == 1
  with pytest.raises(ValueError, match=rf"`split` 'validation' must hold .* got {n}"):
    load_text(corpus, split="validation", seq_len=n)
  with pytest.raises(ValueError, match="`split` must be one of"):
    load_text(corpus, split="dev", seq_len=4)


def test_missing_extra_names_the_command(corpus, monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r'`grain` .* pip install "jaxcomm\[train\]"'):
    load_text(corpus, split="train", seq_len=4)


def test_check_token_ids():
  check_token_ids(np.array([[0, 7]]), 8)
  check_token_ids(np.zeros((0,), np.int32), 8)
  check_token_ids(np.array([65535], np.uint16), 65536)
  with pytest.raises(ValueError, match=r"must be in \[0, 8\) .* from 0 to 8"):
    check_token_ids(np.array([0, 8]), 8)
  with pytest.raises(ValueError, match="from -1 to 3"):
    check_token_ids(np.array([-1, 3]), 8)
  with pytest.raises(ValueError, match="must be integers, got float64"):
    check_token_ids(np.array([1.0]), 8)
