"""Links of Markdown pages to files of the repository, and a check of every link in the built site.

On GitHub a page links to `../../jaxcomm/transforms/diloco.py`; in the site that is the page with
the highlighted source, a package is its API page, and other files can be downloaded.
"""

import html.parser
import os
import pathlib
import re
import urllib.parse
from typing import Any

from sphinx.util import logging

logger = logging.getLogger(__name__)
_LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)\)")
_PACKAGES = ("jaxcomm", "models", "parallel")


def _rewrite(app: Any, docname: str, content: list[str]) -> None:
  docs = pathlib.Path(app.srcdir)
  here = (docs / docname).parent

  def target(match: re.Match[str]) -> str:
    path = pathlib.Path(os.path.normpath(here / match[2]))
    inside = path.relative_to(docs.parent).parts if path.is_relative_to(docs.parent) else ()
    if inside[:1] == ("README.md",):
      return f"[{match[1]}]({_up(docname)}index.md)"
    if not inside or inside[0] not in _PACKAGES:
      return match[0]
    if path.is_dir():
      return f"[{match[1]}]({_up(docname)}api/{'.'.join(inside)}.rst)"
    url = f"{_up(docname)}_modules/{'/'.join(inside).removesuffix('.py')}.html"
    return f'<a class="reference internal" href="{url}">{match[1]}</a>'

  content[0] = _LINK.sub(target, content[0])


def _up(docname: str) -> str:
  return "../" * docname.count("/")


class _Links(html.parser.HTMLParser):
  def __init__(self):
    super().__init__()
    self.targets: set[str] = set()
    self.ids: set[str] = set()

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    for name, value in attrs:
      if name in ("href", "src") and value:
        self.targets.add(value)
      elif name == "id" and value:
        self.ids.add(value)


def _check(app: Any, exception: Exception | None) -> None:
  """Warns of links in the site that lead nowhere, so that a strict build fails."""
  if exception or app.builder.format != "html":
    return
  pages = {file: _Links() for file in pathlib.Path(app.outdir).rglob("*.html")}
  for file, links in pages.items():
    links.feed(file.read_text())
  for file, links in pages.items():
    for link in links.targets:
      url = urllib.parse.urlsplit(link)
      if url.scheme or url.netloc:
        continue
      to = pathlib.Path(os.path.normpath(file.parent / urllib.parse.unquote(url.path)))
      to = file if not url.path else to
      lost = to in pages and url.fragment and url.fragment not in pages[to].ids
      if not to.exists() or lost:
        logger.warning("%s: %s leads nowhere", file.relative_to(app.outdir), link, type="link")


def _drop_unknown_modules(app: Any, env: Any) -> None:
  """Modules without Python source (`dict`, of an alias) have no page; viewcode lists them still."""
  modules = getattr(env, "_viewcode_modules", {})
  for name in [name for name, entry in modules.items() if not entry]:
    del modules[name]


def setup(app: Any) -> dict[str, bool]:
  app.connect("source-read", _rewrite)
  app.connect("env-updated", _drop_unknown_modules)
  app.connect("build-finished", _check)
  return {"parallel_read_safe": True, "parallel_write_safe": True}
