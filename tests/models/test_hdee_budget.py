import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from models import hdee, llama

GROUPS = {"a": "easy", "b": "medium", "c": "hard", "d": "hard"}
positive = st.floats(0.3, 3.0)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(sizes=st.tuples(*[positive] * 3), ratios=st.tuples(*[positive] * 3))
def test_the_budget_is_met(sizes, ratios):
  names = ("easy", "medium", "hard")
  plans = hdee.equal_budget(
    GROUPS,
    total_flops=2e12,
    flops_per_step={n: 1e9 * s for n, s in zip(names, sizes)},
    step_ratio=dict(zip(names, ratios)),
  )
  assert abs(sum(p.flops for p in plans) / 2e12 - 1) < 0.01
  steps = {p.group: p.steps for p in plans}
  for name, ratio in zip(names, ratios):
    assert abs(steps[name] - steps["easy"] * ratio / ratios[0]) <= 0.5 * (1 + ratio / ratios[0])


def test_equal_sizes_give_equal_steps():
  flops = dict.fromkeys(GROUPS.values(), 1e9)
  plans = hdee.equal_budget(GROUPS, total_flops=4e11, flops_per_step=flops)
  assert [(p.domain, p.steps, p.parent) for p in plans] == [(d, 100, "seed") for d in GROUPS]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ratio", [0.8, 1.0, 1.2])
def test_resized_models_cost_what_was_asked(bias, ratio):
  cfg = dataclasses.replace(llama.nano(), mlp_bias=bias)
  resized = hdee.resize(cfg, ratio, 64)
  got = llama.flops_per_token(resized, 64) / llama.flops_per_token(cfg, 64)
  assert abs(got - ratio) < 0.003
  assert dataclasses.replace(resized, intermediate_size=cfg.intermediate_size) == cfg


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"groups": {}}, "`groups` must name at least one"),
    ({"flops_per_step": {"easy": 1e9}}, "`flops_per_step` must be positive for the group 'medium'"),
    ({"step_ratio": {"easy": 0, "medium": 1, "hard": 1}}, "`step_ratio` must be positive.*got 0"),
    ({"total_flops": 6e9}, "`total_flops` must be met within 1 %"),
  ],
)
def test_bad_input(change, match):
  flops = dict.fromkeys(GROUPS.values(), 1e9)
  with pytest.raises(ValueError, match=match):
    hdee.equal_budget(**{"groups": GROUPS, "total_flops": 4e11, "flops_per_step": flops} | change)


def test_a_model_that_cannot_shrink_so_far():
  with pytest.raises(ValueError, match=r"`ratio` must be at least 0\.\d+ for this model, got 0.1"):
    hdee.resize(llama.nano(), 0.1, 64)
