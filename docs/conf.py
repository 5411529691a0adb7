"""Sphinx configuration. `./scripts/docs` builds the site; it needs no network."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "_ext"))

project = "jaxcomm"
copyright = "the jaxcomm authors, Apache License 2.0"
html_title = "jaxcomm"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "api_pages",
  "docstrings",
  "local_links",
  "mathml",
]
html_math_renderer = "mathml"
exclude_patterns = ["_ext", "_static"]

highlight_language = "none"  # of a block that names no language: commands
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "py:obj"  # `name` in a docstring: a link if it is a public name, else code
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes of a docstring are a list, not symbols documented twice
napoleon_use_rtype = False
napoleon_attr_annotations = False  # the signature has the types
