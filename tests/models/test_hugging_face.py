"""Hugging Face folders: equal to transformers' model, bit-exact round trips, bad folders."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import models
from models import _llama_hf, _safetensors, llama
from parallel import make_mesh
from parallel.sharding import DEFAULT_RULES

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "hf"
CASES = sorted(folder.name for folder in FIXTURES.iterdir())


@functools.cache
def load(name):
  return models.load_hf(FIXTURES / name / "model")


@functools.cache
def expected(name):
  return safetensors.load_file(FIXTURES / name / "expected.safetensors")


def test_fixtures_cover_what_the_config_can_say():
  assert {"gqa_tied", "head_dim", "llama3_rope", "mha", "mqa_biases", "several_files"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients_are_those_of_transformers(name, tmp_path):
  arch, cfg, params = load(name)
  want = expected(name)
  tokens = jnp.asarray(want["tokens"], jnp.int32)

  def loss(params):
    logits, _ = arch.apply(params, tokens, cfg)
    value, _ = models.losses.cross_entropy(logits, jnp.roll(tokens, -1, 1), None)
    return value, logits

  (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(logits, want["logits"], rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(value, want["loss"], rtol=1e-5)
  models.save_hf(grads, cfg, tmp_path / "grads")  # their names and layout are those of the weights
  got = safetensors.load_file(tmp_path / "grads" / "model.safetensors")
  names = {key.removeprefix("gradient.") for key in want if key.startswith("gradient.")}
  assert set(got) == names
  for key in names:
    np.testing.assert_allclose(got[key], want[f"gradient.{key}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_saved_folders_hold_the_same_bytes(name, tmp_path):
  _, cfg, params = load(name)
  models.save_hf(params, cfg, tmp_path / "one")
  models.save_hf(params, cfg, tmp_path / "many", max_file_bytes=4000)
  assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
  original = {}
  for file in (FIXTURES / name / "model").glob("*.safetensors"):
    original |= safetensors.load_file(file)
  saved = safetensors.load_file(tmp_path / "one" / "model.safetensors")
  assert saved.keys() == original.keys()
  for key, value in original.items():
    np.testing.assert_array_equal(saved[key].view(np.uint32), value.view(np.uint32))
  for folder in ("one", "many"):
    _, again_cfg, again = models.load_hf(tmp_path / folder)
    assert again_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_saved_folder_takes_further_entries_and_files(tmp_path):
  _, cfg, params = load("mha")
  (tmp_path / "words").write_text("some")
  files = {"tokenizer.json": tmp_path / "words"}
  models.save_hf(params, cfg, tmp_path / "out", entries={"eos_token_id": 7}, files=files)
  assert (tmp_path / "out" / "tokenizer.json").read_text() == "some"
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
  assert models.load_hf_config(tmp_path / "out") == (llama, cfg)
  with pytest.raises(ValueError, match="`entries` must not have what `cfg` says, got"):
    models.save_hf(params, cfg, tmp_path / "bad", entries={"head_dim": 7})
  for name in ("config.json", "model.safetensors", "a/b"):
    with pytest.raises(ValueError, match=r"`files` must be neither config\.json nor"):
      models.save_hf(params, cfg, tmp_path / "bad", files={name: tmp_path / "words"})
  with pytest.raises(FileNotFoundError):
    models.save_hf(params, cfg, tmp_path / "bad", files={"words": tmp_path / "none"})
  assert not (tmp_path / "bad").exists()


def test_loads_onto_a_mesh_what_one_device_holds():
  mesh = make_mesh(fsdp=4)
  rules = {**DEFAULT_RULES, "embed": "fsdp"}
  _, _, params = load("gqa_tied")
  _, _, sharded = models.load_hf(FIXTURES / "gqa_tied" / "model", mesh=mesh, rules=rules)
  assert sharded["layers"]["q_DHC"].sharding.spec == jax.P(None, "fsdp")
  jax.tree.map(np.testing.assert_array_equal, sharded, params)


@pytest.mark.parametrize(
  ("logical", "name", "elements"),
  [
    ("heads", "model.layers.0.self_attn.q_proj.weight", 16 * 16 // 2),
    ("head_dim", "model.layers.0.self_attn.q_proj.weight", 16 * 16),  # not neighbours in the file
    ("mlp", "model.layers.1.mlp.down_proj.weight", 16 * 24 // 2),
    ("vocab", "model.embed_tokens.weight", 48 * 16 // 2),
    ("layers", "model.layers.1.mlp.down_proj.weight", 16 * 24),
  ],
)
def test_reads_only_what_a_shard_needs(logical, name, elements, monkeypatch):
  rules = {**dict.fromkeys(DEFAULT_RULES), logical: "fsdp"}
  _, _, params = load("mha")  # before reads are counted
  read, inner = {}, _safetensors.Reader.read

  def counted(reader, name, index):
    block = inner(reader, name, index)
    read.setdefault(name, []).append(block.size)
    return block

  monkeypatch.setattr(_safetensors.Reader, "read", counted)
  _, _, sharded = models.load_hf(FIXTURES / "mha" / "model", mesh=make_mesh(fsdp=2), rules=rules)
  jax.tree.map(np.testing.assert_array_equal, sharded, params)
  assert set(read[name]) == {elements}
  assert len(read[name]) == (1 if logical == "layers" else 2)  # each shard once


def bfloat16_folder(tmp_path, **changes):
  cfg = dataclasses.replace(llama.nano(), param_dtype="bfloat16", dtype="bfloat16", **changes)
  params = llama.init(jax.random.key(0), cfg)
  models.save_hf(params, cfg, tmp_path / "model")
  return tmp_path / "model", cfg, params


def test_keeps_bfloat16_unless_told(tmp_path):
  folder, cfg, params = bfloat16_folder(tmp_path)
  stored = safetensors.load_file(folder / "model.safetensors")
  assert {v.dtype for v in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
  _, again_cfg, again = models.load_hf(folder)
  assert again_cfg == dataclasses.replace(cfg, head_dim=cfg.head_size, scan_layers=True)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  _, wide_cfg, wide = models.load_hf(folder, param_dtype="float32")
  assert wide_cfg.param_dtype == "float32"
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float32)), wide, params)


def test_both_layouts_of_rope_say_the_same():
  base = _llama_hf.config_to_hf(llama.llama3_2_1b())
  assert base["rope_scaling"]["factor"] == 32.0
  nested = dict(base)
  nested["rope_parameters"] = nested.pop("rope_scaling") | {"rope_theta": nested.pop("rope_theta")}
  for config in (base, nested):
    got = _llama_hf.config_from_hf(config)
    assert got.rope_scaling == llama.llama3_2_1b().rope_scaling
    assert got.rope_theta == 500_000.0


@pytest.fixture
def folder(tmp_path):
  return pathlib.Path(shutil.copytree(FIXTURES / "mha" / "model", tmp_path / "model"))


def edit(folder, **changes):
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
  ("changes", "error", "message"),
  [
    ({"model_type": "gpt2"}, ValueError, "'llama', got 'gpt2'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
     NotImplementedError, "got 'yarn'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}, "rope_parameters": None},
     ValueError, "lacks.*high_freq_factor"),
    ({"hidden_act": "gelu"}, ValueError, "`hidden_act`.*'gelu'"),
    ({"quantization_config": {"bits": 4}}, ValueError, "`quantization_config`"),
    ({"num_hidden_layers": 3}, ValueError, "missing.*layers.2.*unknown \\[\\]"),
    ({"num_hidden_layers": 1}, ValueError, "missing \\[\\], unknown.*layers.1"),
    ({"intermediate_size": 32}, ValueError, "mlp.*must be \\(.*32.*got"),
    ({"num_attention_heads": None}, ValueError, "num_attention_heads"),
  ],
)  # fmt: skip
def test_refuses_other_configs(folder, changes, error, message):
  edit(folder, **changes)
  if changes.get("num_attention_heads", 0) is None:
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(error, match=message):
    models.load_hf(folder)


def test_refuses_damaged_and_foreign_folders(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"`path` must be a folder with config\.json"):
    models.load_hf(tmp_path / "nothing")
  weights = folder / "model.safetensors"
  data = weights.read_bytes()
  for damaged in (b"", data[: len(data) // 2], b"\xff" * 100):
    weights.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read"):
      models.load_hf(folder)
  weights.unlink()
  (folder / "pytorch_model.bin").write_bytes(b"pickle")
  with pytest.raises(ValueError, match="may execute code"):
    models.load_hf(folder)
  (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
  with pytest.raises(ValueError, match="not a file of its folder"):
    models.load_hf(folder)
  (folder / "config.json").write_text("[1]")
  with pytest.raises(ValueError, match="must hold a JSON object, got list"):
    models.load_hf(folder)


def test_names_metas_layout(folder, tmp_path):
  tensors = {"layers.0.attention.wq.weight": np.zeros((4, 4), np.float32)}
  safetensors.save_file(tensors, folder / "model.safetensors")
  with pytest.raises(ValueError, match=r"Meta's layout.*neighbouring rows"):
    models.load_hf(folder)
  (tmp_path / "meta").mkdir()
  (tmp_path / "meta" / "params.json").write_text("{}")
  with pytest.raises(ValueError, match="Meta's layout"):
    models.load_hf(tmp_path / "meta")


def test_a_repeated_embedding_is_read_and_another_head_refused(tmp_path):
  shutil.copytree(FIXTURES / "gqa_tied" / "model", tmp_path / "model")
  file = tmp_path / "model" / "model.safetensors"
  tensors = safetensors.load_file(file)
  safetensors.save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, file)
  models.load_hf(tmp_path / "model")
  safetensors.save_file(tensors | {"lm_head.weight": np.ones((48, 16), np.float32)}, file)
  with pytest.raises(ValueError, match=r"unknown \['lm_head\.weight'\]"):
    models.load_hf(tmp_path / "model")


def test_save_refuses_what_it_would_lose(tmp_path):
  _, cfg, params = load("mha")
  (tmp_path / "model").mkdir()
  (tmp_path / "model" / "notes.txt").write_text("keep me")
  with pytest.raises(FileExistsError, match="`path` must not exist"):
    models.save_hf(params, cfg, tmp_path / "model")
  assert (tmp_path / "model" / "notes.txt").read_text() == "keep me"
  with pytest.raises(ValueError, match=r"`params`.*must be float32.*got bfloat16"):
    models.save_hf(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), cfg, tmp_path / "new")
  with pytest.raises(ValueError, match="`params` must have the tree"):
    models.save_hf(params["layers"], cfg, tmp_path / "new")
  with pytest.raises(ValueError, match="`max_file_bytes` must be at least 1, got 0"):
    models.save_hf(params, cfg, tmp_path / "new", max_file_bytes=0)
  assert not (tmp_path / "new").exists()
