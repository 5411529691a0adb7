"""The options that steps are compiled with: defaults, changes, and where they arrive."""

import types

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxcomm.training import RunConfig, make_train_step, overlap_options, start_devices
from jaxcomm.training._compiler_options import change_options, parse_options

GPU = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")


@pytest.fixture(autouse=True)
def unchanged():
  jax.devices()  # else `start_devices` would start JAX with as many as it needs
  yield
  change_options([])


def test_values_are_typed():
  changes = ["xla_a=true", "xla_b=False", "xla_c=3", "xla_d=0.5", "xla_e=x=y"]
  want = {"xla_a": True, "xla_b": False, "xla_c": 3, "xla_d": 0.5, "xla_e": "x=y"}
  assert parse_options(changes) == want


@pytest.mark.parametrize("change", ["xla_a", "xla_a=", "a=3", "=3"])
def test_unreadable_change_raises(change):
  with pytest.raises(ValueError, match="`compiler_options` must be like xla_name=value"):
    RunConfig(compiler_options=[change])


def test_a_flag_wins_over_the_default():
  name = "xla_gpu_all_reduce_combine_threshold_bytes"
  assert overlap_options(GPU)[name] == 0
  start_devices(RunConfig(replicas=1, compiler_options=[f"{name}=7"]))
  assert overlap_options(GPU)[name] == 7
  start_devices(RunConfig(replicas=1))
  assert overlap_options(GPU)[name] == 0


def test_other_tpus_refuse_what_v5e_needs():
  v5e, v5p = (
    types.SimpleNamespace(platform="tpu", device_kind=f"TPU v5{k}") for k in (" lite", "")
  )
  assert "xla_tpu_enable_async_collective_fusion_fuse_all_reduce" in overlap_options(v5e)
  assert overlap_options(v5p) == {}


def test_the_compiler_sees_them():
  change_options(["xla_no_such_option=1"])
  mesh = jax.make_mesh((1,), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
  loss = lambda params, batch: (jnp.sum(params) * jnp.sum(batch), {})  # noqa: E731
  step = make_train_step(loss, lambda key: jnp.zeros(2), optax.sgd(0.1), mesh)
  with pytest.raises(Exception, match="xla_no_such_option"):
    step.compile(jax.ShapeDtypeStruct((1, 2), jnp.float32))
