"README and reports say what the code and the runs say."

import json
import re
from pathlib import Path

import pytest

from landmark import report

ROOT = Path(__file__).resolve().parent.parent
REPORTS = sorted(p.parent for p in (ROOT / "reports").glob("*/report.json"))


def test_readme_is_what_index_and_reports_make_it():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == report.readme(), "run `make readme`"


def test_readme_links_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"README.md links to {target}, which is not there"


def test_readme_commands_exist():
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M):
        assert re.search(rf"^{target}:", make, flags=re.M), f"README.md says make {target}"


@pytest.mark.parametrize("home", REPORTS, ids=lambda p: p.name)
def test_report_is_not_older_than_its_code(home):
    assert not report.stale(home), (
        f"made by other code: {report.stale(home)}; run `make demo` and `make report` with PROFILE={home.name}"
    )


@pytest.mark.parametrize("home", REPORTS, ids=lambda p: p.name)
def test_report_is_whole_and_loads_nothing(home):
    pages = sorted(home.glob("*.html"))
    assert home / "index.html" in pages and len(pages) > 5
    for p in pages:
        text = p.read_text(encoding="utf-8")
        for src in re.findall(r'(?:src|<link[^>]*href)="([^"]+)"', text):
            assert src.startswith("data:") or (home / src).exists(), (
                f"{p.name} shows {src}, which is not there"
            )
        assert not re.search(r"<(script|iframe)\b", text), f"{p.name} carries a script"
        for href in re.findall(r'<a href="([^"#]+)"', text):
            assert href.startswith("http") or (home / href).exists() or href.endswith(".ipynb"), (
                f"{p.name} links to {href}"
            )
    assert sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) < 20e6, (
        "a committed report stays small"
    )


def test_no_figure_is_typed_by_hand():
    "Between the markers of the front page's source there is nothing."
    nb = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(c["source"]) + "\n" for c in nb["cells"])
    assert (
        re.findall(r"<!-- table: \S+ -->\n(.*?)<!-- /table -->", text, flags=re.S).count("")
        == text.count("<!-- table:")
        > 0
    )
