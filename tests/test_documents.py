"README and reports say what the code and the runs say."

import json
import re
from pathlib import Path

import pytest

from landmark import frontpage, report

ROOT = Path(__file__).resolve().parent.parent
REPORTS = sorted(p.parent for p in (ROOT / "reports").glob("*/report.json"))
PAGES = [p for p in REPORTS if p.name != "album"]  # photographs of others are shown to nobody


DOCUMENTS = ["README.md", "RESULTS.md"]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*DOCUMENTS, "reports/pipeline.svg"])
def test_front_is_what_notebooks_and_reports_make_it(name):
    assert read(name) == frontpage.front()[name], "run `make readme`"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_exist(name):
    for target in LINK.findall(read(name)):
        assert (ROOT / target).exists(), f"{name} links to {target}, which is not there"


def test_readme_is_short():
    "Tables included, their rules not."
    words = sum(len(line.split()) for line in read("README.md").splitlines() if line.strip("|-: "))
    assert words <= 2000, f"README.md has {words} words"


def test_readme_shows_what_the_report_has_for_it():
    "The four pictures, once the report has figures with labels; and no picture that is not there."
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read("README.md"))
    assert "reports/pipeline.svg" in shown
    for label in ("contact-sheet", "verified-matches", "before-and-after", "verdicts"):
        there = list((ROOT / "reports/mini/figures").glob(f"*-{label}.*"))
        assert not there or any(label in path for path in shown), f"README.md lacks the figure {label}"


def test_an_album_is_kept_in_numbers_only():
    files = [p for p in (ROOT / "reports/album").rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".csv", ".md", ".json"}


@pytest.mark.parametrize("home", REPORTS, ids=lambda p: p.name)
def test_results_holds_every_table_of_the_report(home):
    for path in sorted((home / "tables").glob("*.md")):
        if path.stem != "tables":
            assert path.read_text(encoding="utf-8").strip() in read("RESULTS.md"), (
                f"RESULTS.md lacks {path.name}"
            )


def test_readme_commands_exist():
    make = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M):
        assert re.search(rf"^{target}:", make, flags=re.M), f"README.md says make {target}"


@pytest.mark.parametrize("home", REPORTS, ids=lambda p: p.name)
def test_report_is_not_older_than_its_code(home):
    again = f"`make demo` and `make report` with PROFILE={home.name}"
    how = json.loads((home / "report.json").read_text()).get("command", again)
    assert not report.stale(home), f"made by other code: {report.stale(home)}; run {how}"


@pytest.mark.parametrize("home", PAGES, ids=lambda p: p.name)
def test_report_is_whole_and_loads_nothing(home):
    pages = sorted(home.glob("*.html"))
    assert home / "index.html" in pages and len(pages) > 5
    for p in pages:
        text = p.read_text(encoding="utf-8")
        for src in re.findall(r'(?:src|<link[^>]*href)="([^"]+)"', text):
            assert src.startswith("data:") or (home / src).exists(), (
                f"{p.name} shows {src}, which is not there"
            )
        assert not re.search(r"<(iframe|script\b[^>]+src)", text), f"{p.name} loads something"
        assert str(ROOT) not in text and str(Path.home()) + "/" not in text, f"{p.name} names a folder"
        for href in re.findall(r'<a href="([^"#]+)"', text):
            assert href.startswith("http") or (home / href).exists() or href.endswith(".ipynb"), (
                f"{p.name} links to {href}"
            )
    assert sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) < 20e6, (
        "a committed report stays small"
    )


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_figure_is_typed_by_hand(name):
    "Between the markers of the front pages' sources there is nothing."
    nb = json.loads(read(f"nbs/{frontpage.FRONT[name]}"))
    text = "".join("".join(c["source"]) + "\n" for c in nb["cells"])
    for kind in ("table", "beside", "figure"):
        between = re.findall(rf"<!-- {kind}: .*? -->\n(.*?)<!-- /{kind} -->", text, flags=re.S)
        assert between.count("") == text.count(f"<!-- {kind}:")
    assert "<!-- table:" in text and "<!-- figure:" in text
