"""API reference: a page per public module; a public name without page or docstring is a warning.

Public are the packages and what their `__all__` lists. A module listed there has a page of its own
with all names that it defines, but for those with a leading underscore.
"""

import importlib
import inspect
import pathlib
import pkgutil
import types
from collections.abc import Iterator
from typing import Any

from sphinx.util import logging

logger = logging.getLogger(__name__)
ROOTS = ("jaxcomm", "parallel", "models")
INDEX = """API reference
=============

Made from the docstrings. The names in ``jaxcomm`` itself are those most used; they live in its
subpackages.

.. toctree::
   :maxdepth: 1

"""


def public_names(module: types.ModuleType) -> list[str]:
  """`__all__`, or what the module defines."""
  if hasattr(module, "__all__"):
    return sorted(module.__all__)
  own = lambda x: getattr(x, "__module__", module.__name__) == module.__name__  # noqa: E731
  names = [n for n, x in vars(module).items() if not n.startswith("_") and own(x)]
  return sorted(n for n in names if not inspect.ismodule(getattr(module, n)))


def public_modules() -> dict[str, types.ModuleType]:
  """All modules that have a page, by name."""
  modules = {}
  for root in map(importlib.import_module, ROOTS):
    below = pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
    packages = [i.name for i in below if i.ispkg and "._" not in i.name]
    modules |= {n: importlib.import_module(n) for n in (root.__name__, *packages)}
  listed = [getattr(m, n) for m in modules.values() for n in public_names(m)]
  modules |= {x.__name__: x for x in listed if inspect.ismodule(x)}
  return dict(sorted(modules.items()))


def homes(modules: dict[str, types.ModuleType]) -> dict[tuple[str, str], str]:
  """(module, public name) -> the full name under which it is described.

  In the module that defines it if that is public, else in the innermost package that lists it.
  """
  inmost = sorted(modules, key=lambda name: -name.count("."))
  found: dict[tuple[str, str], str] = {}
  for module, name in ((m, n) for m in modules for n in public_names(modules[m])):
    value = getattr(modules[module], name)
    if inspect.ismodule(value):
      found[module, name] = value.__name__
      continue
    listing = [
      m
      for m in inmost
      if getattr(modules[m], name, 0) is value and name in public_names(modules[m])
    ]
    defined = getattr(value, "__module__", None)
    found[module, name] = f"{defined if defined in listing else listing[0]}.{name}"
  return found


def page(module: types.ModuleType, home_of: dict[tuple[str, str], str]) -> str:
  """The reStructuredText of a module's page."""
  title = module.__name__
  return "\n".join([title, "=" * len(title), "", *_body(module, home_of), ""])


def _body(module: types.ModuleType, home_of: dict[tuple[str, str], str]) -> Iterator[str]:
  yield f".. automodule:: {module.__name__}\n"
  names = {name: home_of[module.__name__, name] for name in public_names(module)}
  elsewhere = {
    n: home
    for n, home in names.items()
    if home != f"{module.__name__}.{n}" or inspect.ismodule(getattr(module, n))
  }
  for name, home in elsewhere.items():
    value = getattr(module, name)
    link = f":doc:`{home}`" if inspect.ismodule(value) else f":py:obj:`~{home}`"
    yield f"- {link}: {(inspect.getdoc(value) or '').splitlines()[0]}"
  yield ""
  for name in sorted(names.keys() - elsewhere.keys()):
    value = getattr(module, name)
    kind = "data"
    if inspect.isclass(value) or inspect.isfunction(value):
      kind = "class" if inspect.isclass(value) else "function"
    members = "\n   :members:" if kind == "class" else ""
    yield f".. auto{kind}:: {names[name]}{members}\n"


def _write(app: Any) -> None:
  folder = pathlib.Path(app.srcdir) / "api"
  folder.mkdir(exist_ok=True)
  modules = public_modules()
  home_of = homes(modules)
  texts = {name: page(module, home_of) for name, module in modules.items()}
  texts["index"] = INDEX + "".join(f"   {name}\n" for name in modules)
  for old in folder.glob("*.rst"):
    if old.stem not in texts:
      old.unlink()
  for name, text in texts.items():
    file = folder / f"{name}.rst"
    if not file.exists() or file.read_text() != text:  # an unchanged page is not read again
      file.write_text(text)


def missing(modules: dict[str, types.ModuleType], described: set[str]) -> list[str]:
  """What is wrong with public names, given the full names that some page describes."""
  problems = []
  for (module, name), home in homes(modules).items():
    value = getattr(modules[module], name)
    if home not in described | set(modules):
      problems.append(f"{module}.{name} is on no page")
    if (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__:
      problems.append(f"{module}.{name} has no docstring")
  return problems


def _check(app: Any, env: Any) -> None:
  for problem in missing(public_modules(), set(env.get_domain("py").objects)):
    logger.warning(problem, type="api")


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
  if getattr(obj, "__doc__", None) and str(obj.__doc__).startswith("Alias for field number"):
    return True  # of a NamedTuple: the docstring of the class describes its fields
  return None


def setup(app: Any) -> dict[str, bool]:
  app.connect("builder-inited", _write)
  app.connect("env-check-consistency", _check)
  app.connect("autodoc-skip-member", _skip)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
