"""Optional dependencies are imported when first used, so that `import jaxcomm` needs none."""

import importlib
from types import ModuleType


def require(module: str, extra: str = "train") -> ModuleType:
  """Imports `module` of the extra `extra`.

  Raises:
    ImportError: it is not installed; the message holds the pip command.
  """
  try:
    return importlib.import_module(module)
  except ModuleNotFoundError as e:
    if e.name != module:  # present but broken: the original message says more
      raise
    raise ImportError(f'`{module}` is not installed: pip install "jaxcomm[{extra}]"') from e
