"""The Python in README.md and docs/ runs, page by page; relative links point at files."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [pytest.param(file, id=str(file.relative_to(ROOT))) for file in FILES]


def _python_of(page: pathlib.Path) -> str:
  """All Python blocks of a page as one program, on the lines where they stand in the page."""
  lines, inside = [], False
  for line in page.read_text().splitlines():
    fence = line.startswith("```")
    lines.append(line if inside and not fence else "")
    if fence:
      inside = line == "```python"
  return "\n".join(lines)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.values[0].read_text()])
def test_python_runs(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with jax.numpy_rank_promotion("allow"):  # as in a reader's program
    exec(compile(_python_of(page), page, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_exist(page):
  targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
  assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []
