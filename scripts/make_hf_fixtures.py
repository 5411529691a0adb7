"""Small Llama models of transformers, their logits and gradients, for tests/models/fixtures/hf.

    pip install torch transformers      # in an environment of its own, not the project's
    python scripts/make_hf_fixtures.py                   # writes the fixtures
    python scripts/make_hf_fixtures.py --check FOLDER    # logits of a folder that save_hf wrote

Random weights (seed 0), float32, eager attention. Each fixture is a folder as `save_pretrained`
makes it and expected.safetensors beside it: tokens, logits, loss and the gradient of every tensor.
`--check` loads FOLDER with transformers and compares with FOLDER/../expected.safetensors.
"""

import argparse
import pathlib
import shutil

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file, save_file

FIXTURES = pathlib.Path(__file__).parents[1] / "tests" / "models" / "fixtures" / "hf"
BASE = {
  "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
  "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "attn_implementation": "eager",
}  # fmt: skip
LLAMA3 = {
  "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
  "mha": {},
  "gqa_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
  "mqa_biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
  "llama3_rope": {"num_key_value_heads": 2, "rope_scaling": LLAMA3, "rope_theta": 500_000.0},
  "head_dim": {"num_key_value_heads": 2, "head_dim": 6},
  "several_files": {"num_hidden_layers": 3},
}


def build(changes: dict) -> transformers.LlamaForCausalLM:
  """A model whose norms and biases are random too, or a mistake in them would not show."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | changes))
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        parameter.copy_(("norm" in name) + 0.2 * torch.randn_like(parameter))
      else:
        parameter.copy_(0.2 * torch.randn_like(parameter))
  return model


def outputs(model: transformers.LlamaForCausalLM, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
  model.zero_grad()
  logits = model(tokens).logits
  targets = tokens.roll(-1, 1)
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
  loss.backward()
  gradients = {f"gradient.{name}": p.grad for name, p in model.named_parameters()}
  return {"tokens": tokens, "logits": logits.detach(), "loss": loss.detach(), **gradients}


def make() -> None:
  shutil.rmtree(FIXTURES, ignore_errors=True)
  for name, changes in CASES.items():
    model = build(changes)
    size = "10KB" if name == "several_files" else "1GB"
    model.save_pretrained(FIXTURES / name / "model", max_shard_size=size)
    (FIXTURES / name / "model" / "generation_config.json").unlink(missing_ok=True)
    tokens = torch.randint(0, BASE["vocab_size"], (2, 40), generator=torch.manual_seed(1))
    save_file(outputs(model, tokens), FIXTURES / name / "expected.safetensors")
    print(name, sum(p.numel() for p in model.parameters()))


def check(folder: pathlib.Path) -> None:
  model = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
  want = load_file(folder.parent / "expected.safetensors")
  with torch.no_grad():
    error = (model.float()(want["tokens"]).logits - want["logits"]).abs().max().item()
  print(f"{folder}: transformers {transformers.__version__}, largest error {error:.2e}")
  if error > 1e-4:
    raise SystemExit(1)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--check", type=pathlib.Path, nargs="+", metavar="FOLDER")
  args = parser.parse_args()
  if args.check:
    for folder in args.check:
      check(folder)
  else:
    make()
