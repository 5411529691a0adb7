"""Options of XLA under which communication overlaps with computation: data, in one place."""

import contextlib
from collections.abc import Sequence
from typing import Any

Options = dict[str, bool | int | float | str]

# Seen in programs compiled ahead of time with jax 0.10.2, libtpu 0.0.52 and CUDA 12.9
# (`jaxcomm.inspect.overlap_report`); what each changes is in docs/howto/overlap.md.
_GPU: Options = {
  # All-reduces stay apart, so that each can start as soon as its operand is there.
  "xla_gpu_all_reduce_combine_threshold_bytes": 0,
}
# Of v5e only: v5p refuses the fusion of all-reduces, and overlaps none with the others.
_TPU_V5E: Options = {
  "xla_enable_async_all_reduce": True,
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
  "xla_tpu_enable_async_all_to_all": True,
  "xla_jf_crs_combiner_threshold_in_bytes": 0,
}
_changes: Options = {}  # of this process, by flag


def overlap_options(device: Any) -> Options:
  """What the steps of `make_train_step` are compiled with on devices like `device`.

  Args:
    device: a `jax.Device`, also of a `jaxcomm.inspect.target`. GPUs and TPU v5e have options.

  Returns:
    Options for `jax.jit(..., compiler_options=...)`, with the changes of `change_options`.

  Example:
    >>> import jax
    >>> from jaxcomm.training import overlap_options
    >>> overlap_options(jax.devices("cpu")[0])
    {}
  """
  if device.platform == "gpu":
    return _GPU | _changes
  return (_TPU_V5E if device.device_kind == "TPU v5 lite" else {}) | _changes


def change_options(changes: Sequence[str]) -> None:
  """Sets what `overlap_options` gives from now on, on top of its own: `["name=value", ...]`.

  Training scripts do it with `--compiler-options`.

  Raises:
    ValueError: an entry is not of the form `name=value`.
  """
  parsed = parse_options(changes)
  _changes.clear()
  _changes.update(parsed)


def parse_options(changes: Sequence[str]) -> Options:
  """`["a=true", "b=3"]` to `{"a": True, "b": 3}`; other values stay text.

  Raises:
    ValueError: an entry is not of the form `name=value`.
  """
  options: Options = {}
  for change in changes:
    name, equals, value = change.partition("=")
    if not (name.startswith("xla_") and equals and value):
      raise ValueError(f"`compiler_options` must be like xla_name=value, got {change!r}.")
    options[name] = _value(value)
  return options


def _value(text: str) -> bool | int | float | str:
  if text.lower() in ("true", "false"):
    return text.lower() == "true"
  for number in (int, float):
    with contextlib.suppress(ValueError):
      return number(text)
  return text
