"""Speed of the text pipeline: `python scripts/bench_data.py`.

Prints tokens per second from the memory map through packing, shuffle, mixing (with --data-weights)
and batching, on one thread of reading. Expected on two CPU cores: more than 1M tokens/s at the
default lengths.
"""

import dataclasses
import time

import tyro

from jaxcomm import data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  data: tuple[str, ...] = ("sympy",)  # sources, as `examples/train_lm.py` takes them
  data_weights: tuple[float, ...] = ()  # shares of a mixture; none: one corpus
  text_field: str = "text"  # of the text in .jsonl, .parquet and hf: data
  vocab_size: int = 8192
  batch_size: int = 32  # sequences
  seq_lens: tuple[int, ...] = (128, 256, 1024)  # tokens per sequence
  seconds: float = 3.0  # per sequence length


def tokens_per_second(corpora: list[data.TextCorpus], seq_len: int, cfg: Config) -> float:
  datasets = [data.load_text(c, split="train", seq_len=seq_len) for c in corpora]
  weights = cfg.data_weights or (1.0,)
  batches = data.batches(datasets, weights=weights, batch_size=cfg.batch_size, seed=0)
  next(batches)  # starts the reading thread
  steps, start = 0, time.perf_counter()
  while time.perf_counter() - start < cfg.seconds:
    next(batches)
    steps += 1
  return steps * cfg.batch_size * seq_len / (time.perf_counter() - start)


def main(cfg: Config) -> None:
  start = time.perf_counter()
  options = {"vocab_size": cfg.vocab_size, "text_field": cfg.text_field}
  if cfg.data_weights:
    corpora = data.prepare_mixture(cfg.data, **options)
  else:
    corpora = [data.prepare_text(cfg.data, **options)]
  print(f"prepared in {time.perf_counter() - start:.1f} s")
  for seq_len in cfg.seq_lens:
    print(f"seq_len {seq_len}: {tokens_per_second(corpora, seq_len, cfg) / 1e6:.2f}M tokens/s")


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
