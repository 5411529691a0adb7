"""Checkpoints: what comes back is what was saved, whatever happened to the folder meanwhile."""

import filecmp
import functools
import json
import logging
import os
import shutil

import jax
import numpy as np
import pytest

from jaxcomm.training import CheckpointError, Checkpoints, tree_digest


@pytest.fixture(scope="module")
def step4(tiny):
  return tiny.build_step(method="diloco_int4")


@pytest.fixture(scope="module")
def step_of(tiny):
  """`step_of(replicas, stacked)`: another step of the same method, made once."""
  return functools.cache(
    lambda replicas, stacked: tiny.build_step(
      replicas=replicas, stacked=stacked, method="diloco_int4"
    )
  )


@pytest.fixture(scope="module")
def saved(tiny, step4, tmp_path_factory):
  """A folder with the checkpoints of steps 5 and 6, and the digests of both states."""
  path = tmp_path_factory.mktemp("saved") / "checkpoints"
  state, batches, digests = step4.init(jax.random.key(0)), tiny.Batches(), {}
  state, _ = tiny.advance(step4, state, batches, 4)
  with Checkpoints(path, step4.layout) as checkpoints:
    for step in (5, 6):
      state, _ = tiny.advance(step4, state, batches, 1)
      digests[step] = tree_digest(tiny.snapshot(state))
      checkpoints.save(step, state, {"iterator": batches.get_state()})
  return path, digests


@pytest.fixture
def folder(saved, tmp_path):
  """A copy of `saved` to damage."""
  return shutil.copytree(saved[0], tmp_path / "checkpoints")


def same_files(a, b):
  """Whether two folders hold the same files with the same bytes."""
  files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
  if files != sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()):
    return False
  return all(filecmp.cmp(a / f, b / f, shallow=False) for f in files)


def restore(path, layout, **kwargs):
  with Checkpoints(path, layout) as checkpoints:
    return checkpoints.restore(**kwargs)


# What is saved and what comes back.


def test_restores_every_bit_in_place(saved, step4):
  path, digests = saved
  restored = restore(path, step4.layout)
  assert (restored.step, restored.meta) == (6, {"iterator": {"taken": 6}})
  assert int(restored.state.step) == 6
  assert tree_digest(restored.state) == digests[6] != digests[5]
  wanted = jax.tree.map(lambda s: (s.shape, s.dtype, s.sharding), step4.layout.shapes)
  got = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), restored.state)
  assert jax.tree.leaves(got) == jax.tree.leaves(wanted)


def test_residuals_and_replicas_are_in_the_checkpoint(saved, step4):
  """In the middle of a round replicas differ, and error feedback is not zero."""
  state = restore(saved[0], step4.layout).state
  w = np.asarray(state.params["w"])
  assert w.shape == (4, 8, 4)
  assert not np.array_equal(w[0], w[1])
  residual = state.opt_state.outer_state[0].residual["w"]
  assert residual.shape == (4, 8, 4)
  assert np.abs(np.asarray(residual)).max() > 0
  assert state.opt_state.anchor["w"].shape == (8, 4)  # equal everywhere: stored once


def test_continues_bit_for_bit_in_the_middle_of_a_round(tiny, step4, saved):
  state, batches = step4.init(jax.random.key(0)), tiny.Batches()
  state, _ = tiny.advance(step4, state, batches, 6)
  state, losses = tiny.advance(step4, state, batches, 5)
  restored, again = restore(saved[0], step4.layout), tiny.Batches()
  again.set_state(restored.meta["iterator"])
  other, losses_again = tiny.advance(step4, restored.state, again, 5)
  assert losses_again == losses
  assert tree_digest(other) == tree_digest(state)


def test_a_save_does_not_see_later_steps(tiny, step4, tmp_path):
  """The step donates its state: the buffers being saved are overwritten at once."""
  state, batches = step4.init(jax.random.key(1)), tiny.Batches()
  with Checkpoints(tmp_path / "c", step4.layout, keep=9) as checkpoints:
    digests = {}
    for step in range(1, 6):
      state, _ = tiny.advance(step4, state, batches, 1)
      digests[step] = tree_digest(tiny.snapshot(state))
      checkpoints.save(step, state, {})
      state, _ = tiny.advance(step4, state, batches, 3)
  for step in range(5, 0, -1):
    restored = restore(tmp_path / "c", step4.layout)
    assert (restored.step, tree_digest(restored.state)) == (step, digests[step])
    shutil.rmtree(tmp_path / "c" / str(step))


def test_keeps_the_latest_and_the_best(tiny, step4, tmp_path):
  state = step4.init(jax.random.key(0))
  losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 9.0}
  with Checkpoints(tmp_path, step4.layout) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, state, {}, eval_loss=losses[step])
  assert checkpoints.steps == [2, 3, 4]
  with Checkpoints(tmp_path, step4.layout) as checkpoints:  # the best is known after a restart
    for step in (5, 6):
      checkpoints.save(step, state, {}, eval_loss=losses[step])
    checkpoints.wait()
    assert checkpoints.steps == [2, 5, 6]
    checkpoints.save(7, state, {}, eval_loss=0.5)
    checkpoints.save(8, state, {}, eval_loss=float("nan"))
    checkpoints.save(9, state, {})
    checkpoints.wait()
    assert checkpoints.steps == [7, 8, 9]
    assert checkpoints.restore().step == 9


def test_keeps_the_latest_without_evaluations(step4, tmp_path):
  state = step4.init(jax.random.key(0))
  with Checkpoints(tmp_path, step4.layout, keep=3) as checkpoints:
    for step in range(5):
      checkpoints.save(step, state, {})
    checkpoints.wait()
    assert checkpoints.steps == [2, 3, 4]


def test_a_step_being_written_does_not_count_as_complete(step4, tmp_path, monkeypatch):
  state = step4.init(jax.random.key(0))
  with Checkpoints(tmp_path, step4.layout) as checkpoints:
    checkpoints.save(1, state, {})
    assert checkpoints.steps in ([], [1])
    checkpoints.wait()
    assert checkpoints.steps == [1]
    assert (tmp_path / "1" / "digest.json").exists()


# Damage.


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


def empty(path):
  path.write_bytes(b"")


def garbage(path):
  path.write_text('{"replicas": 4, "leaves"')


def delete(path):
  path.unlink()


# Files whose content does not bear on the state; orbax writes them with the commit.
FREE = ("_CHECKPOINT_METADATA", "commit_success.txt")


@pytest.mark.parametrize("harm", [truncate, flip, empty, garbage, delete])
def test_a_damaged_newest_checkpoint_is_set_aside(harm, saved, folder, step4, caplog):
  """Each of its files in turn."""
  pristine, digests = saved
  files = sorted(p.relative_to(folder / "6") for p in (folder / "6").rglob("*") if p.is_file())
  checked = [f for f in files if f.name not in FREE]
  assert len(checked) >= 8
  for file in checked:
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    harm(folder / "6" / file)
    damaged = shutil.copytree(folder / "6", folder.parent / "damaged" / file)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jaxcomm"):
      restored = restore(folder, step4.layout)
    assert (restored.step, tree_digest(restored.state)) == (5, digests[5]), file
    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("jaxcomm")]
    assert "checkpoint of step 6 is damaged" in warnings[0]
    assert "damaged-6" in warnings[1]
    assert sorted(p.name for p in folder.iterdir()) == ["5", "damaged-6"]
    assert same_files(folder / "damaged-6", damaged)


@pytest.mark.parametrize("harm", [truncate, flip, empty, garbage, delete])
def test_damage_beside_the_state_is_harmless(harm, saved, folder, step4):
  pristine, digests = saved
  files = [p.relative_to(folder) for p in (folder / "6").rglob("*") if p.name in FREE]
  assert files
  for file in files:
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    harm(folder / file)
    restored = restore(folder, step4.layout)
    assert tree_digest(restored.state) == digests[restored.step], file


def test_a_step_set_aside_can_be_saved_and_damaged_again(folder, step4):
  state = step4.init(jax.random.key(0))
  for names in (["damaged-6"], ["damaged-6", "damaged-6-1"]):
    truncate(folder / "6" / "meta" / "metadata")
    with Checkpoints(folder, step4.layout) as checkpoints:
      assert checkpoints.restore().step == 5
      assert sorted(p.name for p in folder.iterdir()) == ["5", *names]
      checkpoints.save(6, state, {})
      checkpoints.wait()
      assert checkpoints.steps == [5, 6]
      assert checkpoints.restore().step == 6


def test_all_damaged_is_an_error_and_moves_nothing(folder, step4):
  for step in ("5", "6"):
    flip(folder / step / "state" / "manifest.ocdbt")
  before = shutil.copytree(folder, folder.parent / "before")
  with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*: steps \[5, 6\] are all"):
    restore(folder, step4.layout)
  assert same_files(folder, before)


def test_one_step_can_be_asked_for(saved, folder, step4):
  restored = restore(folder, step4.layout, step=5)
  assert (restored.step, tree_digest(restored.state)) == (5, saved[1][5])
  with pytest.raises(CheckpointError, match=r"`step` must be one of \[5, 6\], got 7"):
    restore(folder, step4.layout, step=7)
  flip(folder / "5" / "meta" / "metadata")
  before = shutil.copytree(folder, folder.parent / "before")
  with pytest.raises(CheckpointError, match=r"steps \[5\] are all damaged"):
    restore(folder, step4.layout, step=5)
  assert same_files(folder, before)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_what_cannot_be_read_is_not_called_damaged(error, saved, folder, step4, monkeypatch):
  def fail(path):
    raise error

  monkeypatch.setattr("jaxcomm.training._checkpoints._digest", fail)
  with pytest.raises(CheckpointError, match=r"step 6 could not be read .* nothing was changed"):
    restore(folder, step4.layout)
  assert same_files(folder, saved[0])


def test_no_checkpoint_is_an_error(step4, tmp_path):
  with pytest.raises(CheckpointError, match="there is none"):
    restore(tmp_path, step4.layout)


@pytest.mark.parametrize("left", [[], ["meta"], ["state"], ["digest.json"]])
def test_a_half_deleted_folder_is_not_restored(left, folder, step4):
  """A kill while an old checkpoint is deleted leaves a part of it under its name."""
  for path in list((folder / "6").iterdir()):
    if path.name not in left:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  assert restore(folder, step4.layout).step == 5
  shutil.copytree(folder / "damaged-6", folder / "2")
  with Checkpoints(folder, step4.layout) as checkpoints:
    assert checkpoints.restore().step == 5
    checkpoints.save(6, step4.init(jax.random.key(0)), {}, eval_loss=1.0)
    checkpoints.wait()
    assert checkpoints.steps == [5, 6]


def test_what_a_kill_in_a_save_left_is_swept_away(saved, folder, step4):
  temporary = folder / "7.orbax-checkpoint-tmp"
  shutil.copytree(folder / "6" / "state", temporary / "state")
  restored = restore(folder, step4.layout)
  assert (restored.step, tree_digest(restored.state)) == (6, saved[1][6])
  assert not temporary.exists()


# Failing writes.


@pytest.fixture
def no_room(monkeypatch):
  """The disk is full at the last write before the commit; see test_train_lm.py for a real limit."""

  def fail(path):
    raise OSError(28, "No space left on device")

  return lambda: monkeypatch.setattr("jaxcomm.training._checkpoints._digest", fail)


def test_a_save_that_fails_is_reported_once_and_harms_nothing(
  folder, saved, step4, no_room, monkeypatch
):
  state = step4.init(jax.random.key(0))

  def save_and_wait():
    with Checkpoints(folder, step4.layout) as checkpoints:
      no_room()
      checkpoints.save(8, state, {})
      checkpoints.wait()

  with pytest.raises(CheckpointError, match=r"step 8 .* could not be written .*No space.*\[5, 6\]"):
    save_and_wait()
  monkeypatch.undo()
  restored = restore(folder, step4.layout)
  assert (restored.step, tree_digest(restored.state)) == (6, saved[1][6])
  assert sorted(p.name for p in folder.iterdir()) == ["5", "6"]


def test_closing_reports_a_failed_save_unless_another_error_is_under_way(folder, step4, no_room):
  state = step4.init(jax.random.key(0))

  def save(step, error=None):
    with Checkpoints(folder, step4.layout) as checkpoints:
      no_room()
      checkpoints.save(step, state, {})
      if error is not None:
        raise error

  with pytest.raises(CheckpointError, match="step 8"):
    save(8)
  with pytest.raises(KeyError, match="another"):
    save(9, KeyError("another"))


# Other numbers of replicas, other meshes, other models.


def test_other_replicas_are_refused_with_a_sentence(step_of, saved, folder):
  two = step_of(2, False)
  with pytest.raises(CheckpointError, match=r"holds 4 replicas, this run has 2: .*average_repl"):
    restore(folder, two.layout)
  assert same_files(folder, saved[0])


@pytest.mark.parametrize("change", ["average_replicas", "broadcast_replica"])
@pytest.mark.parametrize(
  ("replicas", "stacked"),
  [
    (2, False),
    *(pytest.param(*x, marks=pytest.mark.slow) for x in ((8, False), (2, True), (1, False))),
  ],
)
def test_a_named_change_of_replicas_trains_on(
  tiny, step4, step_of, saved, change, replicas, stacked
):
  there = step_of(replicas, stacked)
  restored = restore(saved[0], there.layout, replica_change=change)
  whole = tiny.snapshot(restore(saved[0], step4.layout).state)
  w = np.asarray(restored.state.params["w"])
  wanted = whole.params["w"].mean(0) if change == "average_replicas" else whole.params["w"][0]
  assert w.shape == (replicas, 8, 4)
  np.testing.assert_allclose(w, np.broadcast_to(wanted, w.shape), rtol=1e-6)
  anchor = np.asarray(restored.state.opt_state.anchor["w"])
  np.testing.assert_array_equal(anchor, whole.opt_state.anchor["w"])
  assert int(restored.state.opt_state.count) == int(restored.state.step) == 6
  batches = tiny.Batches()
  batches.set_state(restored.meta["iterator"])
  state, losses = tiny.advance(there, restored.state, batches, 12)
  assert int(state.step) == 18
  assert np.isfinite(losses).all()
  assert np.mean(losses[-3:]) < np.mean(losses[:3])


# replicas 2; devices: 8, 4, 4, 2, and 1, 2, 4 with the replicas stacked.
MESHES = [
  {"data": 2, "fsdp": 2},
  {"fsdp": 2},
  {"data": 2},
  {},
  {"stacked": True},
  {"stacked": True, "fsdp": 2},
  {"stacked": True, "data": 2, "fsdp": 2},
]


@pytest.mark.slow
def test_the_same_replicas_on_another_mesh(tiny, tmp_path):
  """Bit-equal values everywhere; then the same losses up to the order of additions."""
  first = tiny.build_step(replicas=2, data=2, fsdp=2)
  state, batches = first.init(jax.random.key(0)), tiny.Batches()
  state, _ = tiny.advance(first, state, batches, 6)
  digest = tree_digest(tiny.snapshot(state))
  with Checkpoints(tmp_path, first.layout) as checkpoints:
    checkpoints.save(6, state, batches.get_state())
  wanted = tiny.advance(first, state, batches, 7)[1]
  for mesh in MESHES:
    there = tiny.build_step(replicas=2, **mesh)
    restored = restore(tmp_path, there.layout)
    assert tree_digest(restored.state) == digest, mesh
    got = jax.tree.leaves(jax.tree.map(lambda x: x.sharding, restored.state))
    assert got == jax.tree.leaves(there.layout.shardings)
    batches = tiny.Batches()
    batches.set_state(restored.meta)
    losses = tiny.advance(there, restored.state, batches, 7)[1]
    np.testing.assert_allclose(losses, wanted, rtol=1e-4, err_msg=str(mesh))


def test_another_model_or_method_is_refused(tiny, saved, folder):
  def wider(key):
    return {**tiny.init_params(key), "w": jax.numpy.zeros((8, 4), jax.numpy.bfloat16)}

  for there in (tiny.build_step(method="ddp"), tiny.build_step(method="diloco", init=wider)):
    with pytest.raises(CheckpointError, match=r"of another model or method: \d+ of \d+ arrays"):
      restore(folder, there.layout)
  assert same_files(folder, saved[0])


def test_rejects_keeping_fewer_than_two(step4, tmp_path):
  with pytest.raises(ValueError, match=r"`keep` must be at least 2.* got 1"):
    Checkpoints(tmp_path / "c", step4.layout, keep=1)
  assert not (tmp_path / "c").exists()


def test_meta_that_is_no_json_is_refused(step4, tmp_path):
  with Checkpoints(tmp_path, step4.layout) as checkpoints:
    with pytest.raises(TypeError):
      checkpoints.save(1, step4.init(jax.random.key(0)), {"x": object()})
  assert not (tmp_path / "1").exists()


def test_tree_digest_tells_names_shapes_dtypes_and_bits_apart():
  one = {"a": np.zeros(4, np.float32)}
  others = [
    {"b": np.zeros(4, np.float32)},
    {"a": np.zeros((2, 2), np.float32)},
    {"a": np.zeros(4, np.int32)},
    {"a": np.array([0, 0, 0, -0.0], np.float32)},
  ]
  digests = {tree_digest(tree) for tree in (one, *others)}
  assert len(digests) == 5
  assert tree_digest({"a": jax.numpy.zeros(4)}) == tree_digest(one)


def test_digest_file_names_every_file(saved):
  folder = saved[0] / "6"
  record = json.loads((folder / "digest.json").read_text())
  files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
  free = {f for f in files if os.path.basename(f) in (*FREE, "digest.json")}
  assert set(record["files"]) == files - free
