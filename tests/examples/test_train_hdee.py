"""The script of domain experts: plans of equal compute, what a run leaves, resume, bad flags."""

import json
import math
import os
import random
import signal

import pytest

from jaxcomm import data
from jaxcomm.training import launch, read_metrics
from tests.examples.load_script import load_script

STEPS, SEED_STEPS = 12, 4


@pytest.fixture(scope="module")
def script():
  with load_script("train_hdee", "hdee_plans", "hdee_report", "hdee_scores") as module:
    made, build = {}, module.build_step

    def once(config, model, devices):
      if model not in made:
        made[model] = build(config, model, devices)
      return made[model]

    module.build_step = once  # runs with models of one size compile it once
    yield module


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  """Two domains: words that follow each other in a ring, and words that come in any order."""
  path, rng = tmp_path_factory.mktemp("hdee"), random.Random(0)
  words = "alpha beta gamma delta mean replica token wire round step outer inner loss".split()
  starts = (rng.randrange(len(words)) for _ in range(400))
  rings = (" ".join(words[i:] + words[:i]) + ".\n\n" for i in starts)
  (path / "easy.txt").write_text("".join(rings))
  lines = (" ".join(rng.choices(words, k=8)) + ".\n\n" for _ in range(800))
  (path / "hard.txt").write_text("".join(lines))
  patch = pytest.MonkeyPatch()
  patch.setenv("JAXCOMM_CACHE", str(path / "cache"))
  yield [
    *("--domains", str(path / "easy.txt"), str(path / "hard.txt"), "--groups", "easy", "hard"),
    *("--steps", str(STEPS), "--seed-steps", str(SEED_STEPS), "--vocab-size", "280"),
    *("--batch-size", "4", "--seq-len", "16", "--eval-sequences", "8", "--prior-sequences", "8"),
    *("--log-every", "1", "--eval-every", "0", "--save-every", "0"),
    *("--regimes", "homogeneous", "steps", "dense"),
  ]
  patch.undo()


@pytest.fixture
def train(script, flags, capsys):
  """Runs the script: what it prints."""

  def run(*argv):
    capsys.readouterr()
    launch(script.Config, script.main, [*flags, *map(str, argv)])
    return capsys.readouterr().out

  return run


class Stopping:
  """Batches that end in SIGTERM after so many of all runs."""

  left = 0

  def __init__(self, batches):
    self._batches = batches

  def __next__(self):
    Stopping.left -= 1
    if not Stopping.left:
      os.kill(os.getpid(), signal.SIGTERM)
    return next(self._batches)

  def get_state(self):
    return self._batches.get_state()


@pytest.mark.slow
def test_a_run_and_one_that_was_interrupted(script, train, tmp_path, monkeypatch):
  out = train("--out", tmp_path / "once")
  assert "dense        alone" in out
  once = json.loads((tmp_path / "once" / "summary.json").read_text())
  manifest = json.loads((tmp_path / "once" / "experts.json").read_text())
  assert manifest["regimes"]["steps"] == ["easy.txt-M-9", "hard.txt-M-15"]
  assert [m["parent"] for m in manifest["models"]] == ["", *["seed-M-4"] * 5]
  assert len(set(once["training_flops"].values())) == 1
  assert once["scoring_flops_per_token"]["steps"] == 2 * once["scoring_flops_per_token"]["dense"]
  assert (tmp_path / "once" / "report.png").stat().st_size > 10_000
  rules = once["perplexity"]["steps"]
  for domain in ("easy.txt", "hard.txt"):  # at most log J nats per sequence above the best expert
    bound = rules["best expert"][domain] * math.exp(math.log(2) / 12)
    assert rules["posterior"][domain] < bound
  homogeneous = once["perplexity"]["homogeneous"]["own expert"]  # what one gains the other pays
  assert rules["own expert"]["hard.txt"] < homogeneous["hard.txt"]
  assert rules["own expert"]["easy.txt"] > homogeneous["easy.txt"]

  rows = data.batches
  monkeypatch.setattr(Stopping, "left", SEED_STEPS + 2 * STEPS + 9 + 6)  # in the longest expert
  with monkeypatch.context() as patch:
    patch.setattr(data, "batches", lambda *args, **kwargs: Stopping(rows(*args, **kwargs)))
    assert "SIGTERM: stopped after step" in train("--out", tmp_path / "twice")
  assert not (tmp_path / "twice" / "summary.json").exists()
  out = train("--out", tmp_path / "twice", "--resume")
  assert "easy.txt-M-9: trained before." in out
  assert "resumed from step" in out
  twice = json.loads((tmp_path / "twice" / "summary.json").read_text())
  assert twice == once  # every digit of every perplexity
  for name in manifest["regimes"]["steps"]:
    a, b = ([r["loss"] for r in read_metrics(tmp_path / n / name)] for n in ("once", "twice"))
    assert a == b

  out = train("--parents", tmp_path / "once", "--regimes", "steps", "--lr", "1e-9")
  assert "train_hdee: seed" not in out  # it was read, and such a rate changes nothing
  (row,) = [line for line in out.splitlines() if "best expert" in line]
  seed_only = [float(x) for x in row.split()[3:]]
  assert len(set(seed_only[:2])) == 2
  assert seed_only[0] > rules["best expert"]["easy.txt"]


def test_plans_cost_the_same(script):
  config = script.Config(branch_from="group")
  plans = {r: script.plan(config, r) for r in config.regimes}
  flops = {r: sum(p.flops for p in ps) for r, ps in plans.items()}
  assert max(flops.values()) / min(flops.values()) < 1.01
  assert [p.steps for p in plans["homogeneous"]] == [100] * 4
  assert [p.steps for p in plans["steps"]] == [75, 100, 100, 125]
  assert [script.size_of(p) for p in plans["sizes"]] == ["S", "M", "M", "L"]
  first, second = plans["steps"][1:3]  # of the group medium
  assert (first.parent, second.parent) == ("seed-M-100", first.name)
  assert second == plans["homogeneous"][2]  # trained once for both
  lengths = {script.schedule_length(script.Config(schedule="shared"), p) for p in plans["steps"]}
  assert lengths == {150}  # for all, and longer than the longest
  assert script.schedule_length(config, first) == 100


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"groups": ["easy"]}, "`groups` must be given for each of 4 `domains`.*got 1"),
    ({"domains": ["a/x", "b/x"], "groups": ["easy"] * 2}, "`domains` must have folder names"),
    ({"regimes": ["steps", "steps"]}, "`regimes` must be different ones"),
    ({"step_ratios": [0.0, 1.0, 1.0]}, "`step_ratios` must be a positive number for each"),
    ({"size_ratios": [1.0]}, "`size_ratios` must be a positive number for each"),
    ({"parents": "nowhere"}, "`parents` must be a run folder of this script, got 'nowhere'"),
    ({"batch_size": 3, "replicas": 2}, "`batch_size` must be divisible by"),
    ({"seed_steps": 0}, "`seed_steps` must be at least 1, got 0"),
    ({"lr": math.nan}, "`lr` must be positive and finite"),
    ({"top_k": 5}, r"`top_k` must be in \[1, 4\].*got 5"),
    ({"unseen": ["sympy-tests"]}, "`unseen` must be other domains"),
    ({"eval_sequences": 0}, "`eval_sequences` must be at least 1"),
  ],
)
def test_bad_flags(script, options, match):
  with pytest.raises(ValueError, match=match):
    script.Config(**options)
