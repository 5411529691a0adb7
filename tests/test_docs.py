"""The Python in README.md and docs/ runs and prints what pages say; links lead somewhere."""

import contextlib
import doctest
import importlib
import io
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [pytest.param(file, id=str(file.relative_to(ROOT))) for file in FILES]
PYTHON_PAGES = [
  pytest.param(*page.values, id=page.id, marks=[pytest.mark.slow] * (page.id != "README.md"))
  for page in PAGES
  if "```python" in page.values[0].read_text()
]


def cells(text):
  """(code, output) of each Python block, code on the lines where it stands in the page.

  The output is that of an `output` block right after it, or None.
  """
  found = []
  for fence in re.finditer(r"^```(python|output)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
    if fence[1] == "python":
      found.append(("\n" * text.count("\n", 0, fence.start(2)) + fence[2], None))
    else:
      found[-1] = (found[-1][0], fence[2])
  return found


def check_cells(page, text):
  """Runs all cells of a page in one namespace; AssertionError at an output that differs."""
  namespace = {"__name__": page}
  for code, want in cells(text):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile(code, page, "exec"), namespace)
    got = printed.getvalue()
    same = doctest.OutputChecker().check_output(want or "", got, doctest.ELLIPSIS)
    assert want is None or same, f"{page} printed\n{got}in place of\n{want}"


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cells(page.read_text()), "no cell was found"
  with jax.numpy_rank_promotion("allow"):  # as in a reader's program
    check_cells(str(page.relative_to(ROOT)), page.read_text())


def test_what_a_page_claims_is_checked():
  good = "text\n```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```output\n1\n```\n"
  check_cells("page", good)
  with pytest.raises(AssertionError, match=r"page printed\s+1\s+in place of\s+2"):
    check_cells("page", good.replace("\n1\n", "\n2\n"))
  with pytest.raises(AssertionError):
    check_cells("page", good.replace("print(x)", "assert x == 2"))
  with pytest.raises(NameError) as e:
    check_cells("page", good.replace("print(x)", "print(y)"))
  assert e.traceback[-1].lineno + 1 == 7  # of the page


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
  targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
  assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.fixture
def extension(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
  return importlib.import_module


def test_every_public_name_is_on_a_page(extension):
  api_pages = extension("api_pages")
  modules = api_pages.public_modules()
  home_of = api_pages.homes(modules)
  text = "".join(api_pages.page(module, home_of) for module in modules.values())
  for name in ("jaxcomm.transforms.diloco", "jaxcomm.training.TrainStep", "parallel.AXES"):
    assert re.search(rf"^.. auto\w+:: {re.escape(name)}$", text, re.MULTILINE)
  described = set(re.findall(r"^.. auto\w+:: (\S+)$", text, re.MULTILINE))
  assert api_pages.missing(modules, described) == []
  forgotten = api_pages.missing(modules, described - {"jaxcomm.transforms.diloco"})
  assert forgotten == ["jaxcomm.diloco is on no page", "jaxcomm.transforms.diloco is on no page"]


def test_docstrings_become_restructured_text(extension):
  as_rst = extension("docstrings").as_rst
  for plain, rst in {
    "max |x| of `|x|`": "max \\|x\\| of `|x|`",
    "the *new* one, **bold**": "the *new* one, **bold**",
    "(x, *rest) and f(**kwargs)": "(x, \\*rest) and f(\\*\\*kwargs)",
    "two `x`s": "two `x`\\ s",
    ">>> a | b": ">>> a | b",
  }.items():
    assert list(as_rst([plain])) == [rst]
  assert list(as_rst(["so:", "", "    code"])) == ["so::", "", "    code"]
  assert list(as_rst(["so:", "", "- a"])) == ["so:", "", "- a"]
