"""Formulas as MathML, made while the site is built: pages need neither scripts nor a network."""

import html
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _convert(node: Any, display: str) -> str:
  latex = node.astext().strip()
  try:
    mathml = latex2mathml.converter.convert(latex, display=display)
  except Exception as e:  # a parser's: what it raises depends on the formula
    logger.warning("formula %r: %s: %s", latex, type(e).__name__, e, location=node, type="math")
    return html.escape(latex)
  if "\\" in html.unescape(mathml):  # a command that the converter passed on as text
    logger.warning("formula %r: a command is not known", latex, location=node, type="math")
  return mathml


def _inline(translator: Any, node: nodes.math) -> None:
  translator.body.append(_convert(node, "inline"))
  raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
  translator.body.append(f'<div class="math">{_convert(node, "block")}</div>')
  raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}
