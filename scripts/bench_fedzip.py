"""FedZip's rates with everything counted, its speed, and what it does to federated training.

    python scripts/bench_fedzip.py                    # all three, about two minutes
    python scripts/bench_fedzip.py --only rates       # or speed, federated

Rates: tensors of 100,000 values at several shares z. "random": labels at random places, two equal
clusters, payloads alone, beside the entropy of the labels and the count of the paper's code, which
no decoder can read. "gaussian": Top-z and k-means of Gaussian values, whole messages with header,
centroids and checksum. Expected: Huffman never beyond 32; the best encoding within 4 % of the
entropy for z >= 0.01; 1085 needs z of about 0.003.

Federated: 10 clients, an MLP of 50,890 parameters on synthetic 28 x 28 images of 10 classes, every
client with its own mixture of classes; accuracy of the averaged model and bytes that a client
sends per round, read from the messages that the host codec makes.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from jaxcomm.compressors import fedzip_codec, fedzip_compress, int4, top_k
from jaxcomm.compressors._fedzip_bits import METHODS
from jaxcomm.compressors.fedzip_codec._labels import payload_bits
from jaxcomm.compressors.fedzip_codec._report import entropy_bits, paper_bits
from jaxcomm.transforms import fedzip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  only: Literal["all", "rates", "speed", "federated"] = "all"
  size: int = 100_000  # values per tensor
  draws: int = 5  # random tensors per row of the rate table
  rounds: int = 40  # of federated training
  local_steps: int = 5  # per client and round
  seed: int = 0

  def __post_init__(self):
    for name in ("size", "draws", "rounds", "local_steps"):
      if getattr(self, name) < 1:
        raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def random_labels(rng: np.random.Generator, size: int, share: float) -> np.ndarray:
  labels = np.ones(size, np.uint8)
  kept = rng.choice(size, max(1, round(share * size)), replace=False)
  labels[kept] = 2 * (np.arange(kept.size) % 2)
  return labels


def rates(cfg: Config) -> None:
  rng, dense = np.random.default_rng(cfg.seed), 32 * cfg.size
  print("\nrandom: 32 n / bits of the payload")
  print(f"{'z':>6}{'entropy':>9}" + "".join(f"{m:>12}" for m in METHODS[1:]) + f"{'paper':>9}")
  for share in (0.2, 0.1, 0.03, 0.01, 0.003, 0.001):
    labels = [random_labels(rng, cfg.size, share) for _ in range(cfg.draws)]
    sizes = [payload_bits(x, 3) for x in labels]
    cells = "".join(f"{dense / np.mean([s[m] for s in sizes]):>12.1f}" for m in METHODS[1:])
    bound = dense / entropy_bits(np.bincount(labels[0], minlength=3))
    paper = dense / np.mean([min(paper_bits(x, 3).values()) for x in labels])
    print(f"{share:>6}{bound:>9.1f}{cells}{paper:>9.1f}", flush=True)
  print("\ngaussian: 4 n / bytes of the whole message")
  print(f"{'z':>6}{'bytes':>9}{'ratio':>9}{'entropy':>9}{'paper':>9}")
  x = jax.random.normal(jax.random.key(cfg.seed), (cfg.size,))
  for share in (0.2, 0.1, 0.03, 0.01, 0.003, 0.001):
    small = jax.jit(lambda x, z=share: fedzip_compress({"w": x}, z))(x)
    total = fedzip_codec.compression_report(small)["total"]
    bound = 4 * cfg.size / total.entropy_bytes
    print(f"{share:>6}{total.bytes:>9}{total.ratio:>9.1f}{bound:>9.1f}{total.ratio_paper:>9.1f}")


def speed(cfg: Config) -> None:
  """Seconds per tensor of 2^20 values: device part, encoder, decoder."""
  x = {"w": jax.random.normal(jax.random.key(cfg.seed), (2**20,))}
  print(f"\nspeed: 2^20 values\n{'z':>6}{'compress':>12}{'encode':>12}{'decode':>12}")
  for share in (0.2, 0.01):
    compress = jax.jit(lambda x, z=share: fedzip_compress(x, z))
    small = jax.block_until_ready(compress(x))
    data = fedzip_codec.encode(small)
    steps: tuple[Callable[[], Any], ...] = (
      lambda f=compress: jax.block_until_ready(f(x)),
      lambda tree=small: fedzip_codec.encode(tree),
      lambda data=data: fedzip_codec.decode(data, x),
    )
    times = [min(seconds(step) for _ in range(5)) for step in steps]
    print(f"{share:>6}" + "".join(f"{1000 * t:>9.1f} ms" for t in times), flush=True)


def seconds(fun: Callable[[], Any]) -> float:
  start = time.perf_counter()
  fun()
  return time.perf_counter() - start


CLIENTS, CLASSES, PIXELS, HIDDEN = 10, 10, 784, 64


def make_images(cfg: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """(train [clients, rows, ...], test [rows, ...]): noisy, smooth prototypes."""
  rng = np.random.default_rng(cfg.seed)
  waves = rng.normal(size=(CLASSES, 12, PIXELS)).cumsum(2)
  prototypes = waves.mean(1) / waves.mean(1).std(1, keepdims=True)

  def draw(labels):
    noise = rng.normal(size=(*labels.shape, PIXELS)) * 6
    return {"x": (prototypes[labels] + noise).astype(np.float32), "y": labels.astype(np.int32)}

  shares = rng.dirichlet(np.full(CLASSES, 0.5), CLIENTS)  # clients see few classes
  train = np.stack([rng.choice(CLASSES, 300, p=share) for share in shares])
  return draw(train), draw(rng.integers(CLASSES, size=2000))


def init_mlp(key: jax.Array) -> dict[str, jax.Array]:
  one, two = jax.random.split(key)
  return {
    "w1": jax.random.normal(one, (PIXELS, HIDDEN)) / PIXELS**0.5,
    "b1": jnp.zeros(HIDDEN),
    "w2": jax.random.normal(two, (HIDDEN, CLASSES)) / HIDDEN**0.5,
    "b2": jnp.zeros(CLASSES),
  }


def logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
  hidden = jax.nn.relu(x @ params["w1"] + params["b1"][None])
  return hidden @ params["w2"] + params["b2"][None]


def train(cfg: Config, tx: optax.GradientTransformation, data, test) -> tuple[np.ndarray, Any]:
  """Accuracy after every round, and what the clients compressed in the last, [clients, ...].

  `tx` is applied to each client's delta; what it compresses includes the residual, if it has one.
  """

  def loss(params, rows):
    labels = optax.softmax_cross_entropy_with_integer_labels
    return labels(logits(params, rows["x"]), rows["y"]).mean()

  def client(params, rows, state, key):
    local = params
    for k in jax.random.split(key, cfg.local_steps):
      batch = jax.tree.map(lambda a, k=k: a[jax.random.choice(k, 300, (50,))], rows)
      local = jax.tree.map(lambda p, g: p - 0.05 * g, local, jax.grad(loss)(local, batch))
    delta = jax.tree.map(jnp.subtract, local, params)
    out, state = tx.update(delta, state)
    residual = getattr(state, "residual", None)
    given = optax.tree.add(out, residual) if isinstance(residual, dict) else delta
    return out, state, given

  def one_round(carry, key):
    params, states = carry
    keys = jax.random.split(key, CLIENTS)
    out, states, given = jax.vmap(client, (None, 0, 0, 0))(params, data, states, keys)
    params = jax.tree.map(lambda p, d: p + d.mean(0), params, out)
    right = logits(params, test["x"]).argmax(1) == test["y"]
    return (params, states), (right.mean(), given)

  params = init_mlp(jax.random.key(cfg.seed))
  states = jax.vmap(lambda _: tx.init(params))(jnp.arange(CLIENTS))
  keys = jax.random.split(jax.random.key(cfg.seed + 1), cfg.rounds)
  accuracy, given = jax.jit(lambda c: jax.lax.scan(one_round, c, keys)[1])((params, states))
  return np.asarray(accuracy), jax.tree.map(lambda a: a[-1], given)


def of_compressor(compressor) -> optax.GradientTransformation:
  """A baseline without feedback: what the compressor leaves of each leaf."""

  def roundtrip(x):
    return compressor.decompress(compressor.compress(None, x), x.shape)

  return optax.stateless(lambda updates, _: jax.tree.map(roundtrip, updates))


def federated(cfg: Config) -> None:
  data, test = make_images(cfg)
  shapes = jax.eval_shape(init_mlp, jax.random.key(0))
  dense = sum(4 * x.size for x in jax.tree.leaves(shapes))
  methods: dict[str, tuple[optax.GradientTransformation, Any]] = {
    "FedAvg": (optax.identity(), dense)
  }
  for name, compressor in {"int4": int4(), "top_k 0.05": top_k(ratio=0.05)}.items():
    sent = sum(compressor.payload_bytes(x.shape) for x in jax.tree.leaves(shapes))
    methods[name] = of_compressor(compressor), sent
  for z, feedback, pin in (
    (0.2, False, True),
    (0.2, False, False),
    (0.2, True, True),
    (0.01, False, True),
    (0.01, True, True),
  ):
    name = f"fedzip {z}" + (" EF" if feedback else "") + ("" if pin else " not pinned")
    options = {"z": z, "pin_zero": pin}
    methods[name] = fedzip(**options, error_feedback=feedback), options
  print(f"\nfederated: {CLIENTS} clients, {dense // 4:,} parameters, {cfg.rounds} rounds")
  print(f"{'method':<24}{'bytes':>9}{'ratio':>8}{'half way':>10}{'end':>8}")
  for name, (tx, sent) in methods.items():
    accuracy, given = train(cfg, tx, data, test)
    if isinstance(sent, dict):  # the mean message of the last round
      rows = [jax.tree.map(lambda a, i=i: a[i], given) for i in range(CLIENTS)]
      compress = jax.jit(lambda d, options=sent: fedzip_compress(d, **options))
      sent = round(np.mean([len(fedzip_codec.encode(compress(d))) for d in rows]))
    half = accuracy[cfg.rounds // 2 - 1 :][:3].mean()
    print(
      f"{name:<24}{sent:>9,}{dense / sent:>8.1f}{half:>10.3f}{accuracy[-3:].mean():>8.3f}",
      flush=True,
    )


def main(cfg: Config) -> None:
  for name, part in {"rates": rates, "speed": speed, "federated": federated}.items():
    if cfg.only in ("all", name):
      part(cfg)


if __name__ == "__main__":
  main(tyro.cli(Config, description=__doc__))
