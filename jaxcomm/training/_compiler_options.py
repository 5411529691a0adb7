"""Options of XLA under which communication overlaps with computation: data, in one place."""

Options = dict[str, bool | int | float | str]

# Seen in programs compiled ahead of time with jax 0.10.2, libtpu 0.0.52 and CUDA 12.9
# (`jaxcomm.inspect.overlap_report`); what each changes is in docs/howto/overlap.md.
_OVERLAP: dict[str, Options] = {
  "gpu": {
    # All-reduces stay apart, so that each can start as soon as its operand is there.
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
  },
  "tpu": {
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_tpu_enable_async_all_to_all": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 0,
  },
}


def overlap_options(platform: str) -> Options:
  """Options for `jax.jit(..., compiler_options=...)` on devices of `platform`.

  Args:
    platform: of the devices, as `jax.Device.platform` has it; `cpu` needs none.

  Example:
    >>> from jaxcomm.training import overlap_options
    >>> overlap_options("gpu"), overlap_options("cpu")
    ({'xla_gpu_all_reduce_combine_threshold_bytes': 0}, {})
  """
  return dict(_OVERLAP.get(platform, {}))
