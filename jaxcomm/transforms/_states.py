"""States inside other states: an optimizer's state nests those of all its parts."""

from typing import Any

import jax


def find_states(tree: Any, kind: type, *, outside: tuple[type, ...] = ()) -> list[Any]:
  """The states of type `kind` in `tree`, without those inside a state of a type in `outside`."""

  def stops(x):
    return isinstance(x, (kind, *outside))

  return [x for x in jax.tree.leaves(tree, is_leaf=stops) if isinstance(x, kind)]
