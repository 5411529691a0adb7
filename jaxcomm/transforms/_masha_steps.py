"""The four calls of `masha1` and `masha2`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcomm import _axes
from jaxcomm.compressors import Compressor
from jaxcomm.transforms import _masha
from jaxcomm.transforms._compressed import mean_of_messages
from jaxcomm.transforms._leafwise import Leaf, map_leaves
from jaxcomm.transforms._masha import MashaState
from jaxcomm.transforms.extragradient import ExtragradientTransformation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masha:
  """The arguments of `masha1` and `masha2`; `feedback` tells which one."""

  learning_rate: float
  compressor: Compressor
  server_compressor: Compressor | None
  tau: float | None
  axis_name: str
  prox: Callable[[Any, float], Any]
  reference: _masha.Reference
  refresh: _masha.Refresh
  num_participants: int | None
  specs: Any
  seed: int
  feedback: bool

  def __post_init__(self):
    _masha.check_rate(self.learning_rate)
    if self.tau is not None and not 0 <= self.tau < 1:
      raise ValueError(f"`tau` must be in [0, 1), got {self.tau!r}.")
    choices = {"reference": ("new", "old"), "refresh": ("random", "deterministic", "host")}
    for name, allowed in choices.items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {getattr(self, name)!r}.")
    if self.num_participants is not None and self.num_participants < 1:
      raise ValueError(f"`num_participants` must be at least 1, got {self.num_participants!r}.")

  def transformation(self) -> ExtragradientTransformation:
    return ExtragradientTransformation(
      self._init, self._extrapolate, self._update, self._refresh_operators
    )

  def _init(self, params, operator_value) -> MashaState:
    self._check_sizes(params)
    _masha.check_operator(operator_value, params, self.axis_name)
    zeros = optax.tree.zeros_like(params, dtype=jnp.float32)
    has_server_error = self.feedback and self.server_compressor is not None
    state = MashaState(
      step=jnp.zeros((), jnp.int32),
      workers=jnp.zeros((), jnp.int32),
      needs_refresh=jnp.ones((), bool),
      reference=jax.tree.map(jnp.copy, params),
      local_operator=operator_value,
      mean_operator=operator_value,
      worker_error=_axes.vary(zeros, self.axis_name) if self.feedback else optax.EmptyState(),
      server_error=jax.tree.map(jnp.copy, zeros) if has_server_error else optax.EmptyState(),
    )
    return self._refresh_operators(operator_value, state)

  def _extrapolate(self, params, state):
    start = self._start(params, state)
    half = _masha.step_from(start, self.learning_rate, state.mean_operator, self.prox)
    wrong_workers = state.workers != _axes.axis_size(self.axis_name)
    stale = state.needs_refresh | wrong_workers
    return _axes.vary(_masha.unless_stale(half, stale), self.axis_name), state

  def _update(self, operator_value, params, state, *, reference_value=None, do_refresh=None):
    _masha.check_operator(operator_value, params, self.axis_name)
    there = state.local_operator if reference_value is None else reference_value
    _masha.check_operator(there, params, self.axis_name)
    change = jax.tree.map(jnp.subtract, operator_value, there)
    received, worker_error, server_error = self._exchange(change, state)
    start, gamma = self._start(params, state), self.learning_rate
    if self.feedback:  # the step size is in the message
      half = _masha.step_from(start, gamma, state.mean_operator, self.prox)
      new = jax.tree.map(lambda h, g: h - g.astype(h.dtype), half, received)
    else:
      direction = jax.tree.map(lambda f, g: f + g.astype(f.dtype), state.mean_operator, received)
      new = _masha.step_from(start, gamma, direction, self.prox)
    do_refresh = self._decide(do_refresh, params, state.step)
    target = new if self.reference == "new" else params
    reference = jax.tree.map(lambda p, w: jnp.where(do_refresh, p, w), target, state.reference)
    state = state._replace(
      step=state.step + 1,
      needs_refresh=state.needs_refresh | do_refresh,
      reference=reference,
      worker_error=worker_error,
      server_error=server_error,
    )
    return new, state, do_refresh

  def _refresh_operators(self, operator_value, state) -> MashaState:
    _masha.check_operator(operator_value, state.reference, self.axis_name)
    own = jax.tree.map(lambda f, w: f.astype(w.dtype), operator_value, state.reference)
    own = _axes.vary(own, self.axis_name)
    return state._replace(
      workers=jnp.asarray(_axes.axis_size(self.axis_name), jnp.int32),
      needs_refresh=jnp.zeros((), bool),
      local_operator=own,
      mean_operator=_masha.dense_mean(own, self.axis_name),
    )

  def _start(self, params, state):
    """tau z + (1 - tau) w."""
    tau = self._tau(params)
    return jax.tree.map(lambda z, w: tau * z + (1 - tau) * w, params, state.reference)

  def _tau(self, params) -> float:
    return _masha.default_tau(params, self.compressor) if self.tau is None else self.tau

  def _decide(self, do_refresh, params, step) -> jax.Array:
    if (do_refresh is not None) != (self.refresh == "host"):
      raise ValueError(
        f'`do_refresh` must be given exactly if `refresh` is "host", got {do_refresh!r} with'
        f" {self.refresh!r}."
      )
    tau = self._tau(params)
    if self.refresh == "host":
      return jnp.asarray(do_refresh, bool)
    if self.refresh == "deterministic":
      return (step + 1) % round(1 / (1 - tau)) == 0
    return _masha.draw_refresh(self.seed, step, tau)

  def _exchange(self, change, state):
    """What all receive (float32, equal), and the new errors."""
    blank = jax.tree.map(lambda _: None, change)
    worker_error = state.worker_error if self.feedback else blank
    server_error = state.server_error if self._has_server_error else blank
    scalars = {"step": state.step, **self._answers(state.step)}
    received, worker_error, server_error = map_leaves(
      self._exchange_leaf,
      scalars,
      change,
      worker_error,
      server_error,
      axis_name=self.axis_name,
      specs=self.specs,
    )
    return (
      received,
      worker_error if self.feedback else state.worker_error,
      server_error if self._has_server_error else state.server_error,
    )

  def _exchange_leaf(self, leaf: Leaf, scalars, change, worker_error, server_error):
    key, answers = leaf.key(self.seed, scalars["step"]), scalars["answers"]
    message = change.astype(jnp.float32)
    if self.feedback:
      message = worker_error + jnp.float32(self.learning_rate) * message
    sent = message if answers is None else jnp.where(answers, message, 0.0)
    mean, lost = mean_of_messages(sent, self.axis_name, self.compressor, key)
    if answers is not None:  # the mean over those that answer; the others keep their error
      mean = mean * scalars["scale"]
      lost = jnp.where(answers, lost, worker_error) if self.feedback else lost
    if self.server_compressor is not None:
      key = _masha.server_key(self.seed, key)
      mean, server_error = _serve(mean, server_error, self.server_compressor, key)
    return mean, lost if self.feedback else None, server_error

  @property
  def _has_server_error(self) -> bool:
    return self.feedback and self.server_compressor is not None

  def _answers(self, step):
    """Whether this worker answers, and what makes a mean over all one over those that do."""
    if self.num_participants is None:
      return {"answers": None}
    workers = _axes.axis_size(self.axis_name)
    if self.num_participants > workers:
      raise ValueError(
        f"`num_participants` must be at most the {workers} workers, got {self.num_participants}."
      )
    answers = _masha.draw_participants(self.seed, step, self.num_participants, self.axis_name)
    return {"answers": answers, "scale": jnp.float32(workers / self.num_participants)}

  def _check_sizes(self, params) -> None:
    _masha.check_params(params)
    if not self.feedback:
      return
    for name in ("compressor", "server_compressor"):
      c = getattr(self, name)
      for x in jax.tree.leaves(params):
        if c is not None and x.size and c.alpha_at(x.size) is None:
          raise ValueError(
            f"`{name}` must be contractive (have an alpha at {x.size} elements), got {c}: see"
            " masha1 for unbiased compressors."
          )


def _serve(mean, server_error, compressor: Compressor, key):
  """The server's message and new error, which every worker computes for itself."""
  total = mean if server_error is None else mean + server_error
  out = compressor.decompress(compressor.compress(key, total), total.shape, key=key)
  return out, None if server_error is None else total - out
