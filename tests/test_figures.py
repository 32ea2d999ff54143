"""The figures of the README are those of the committed files."""

from __future__ import annotations

import copy

import pytest
from figures_table import BEGIN, DEFAULT, END, RESULTS, ROOT, load, markdown, replaced


def test_the_readme_has_the_figures_of_the_files() -> None:
    readme = (ROOT / "README.md").read_text()
    expected = replaced(readme, markdown(load(ROOT / RESULTS), RESULTS))
    assert readme == expected, "python tests/figures_table.py brings it up to date"


def test_another_figure_is_seen() -> None:
    results = load(ROOT / RESULTS)
    changed = copy.deepcopy(results)
    next(v for v in changed["AVX2"]["cases"][1]["variants"] if v["name"] == DEFAULT)["speedup_step"] += 0.2
    assert markdown(changed, RESULTS) != markdown(results, RESULTS)


def test_what_stands_around_the_figures_stays() -> None:
    assert replaced(f"a\n{BEGIN}\nold\n{END}\nb", "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="not found"):
        replaced("no marks", "new")
