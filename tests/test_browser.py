"A browser opens every page of a report, on a phone and on a desk, in light and dark; without one it skips."

import atexit
import functools
import importlib.util
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from PIL import Image
from test_report import steps  # noqa: F401 - a fixture

from landmark import report

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if not importlib.util.find_spec("playwright"):
    CHROMIUM = None
PAGES = sorted((ROOT / "reports").glob("*/*.html"))
WIDTHS = dict(phone=400, desk=1400)
HERE = ("file:", "data:")  # a page loads nothing from elsewhere
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on this machine (apt install chromium), or no Playwright (pip install)"
)


@functools.cache
def browser():
    "One browser for all pages."
    from playwright.sync_api import sync_playwright

    play = sync_playwright().start()
    args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    chromium = play.chromium.launch(executable_path=CHROMIUM, args=args)
    atexit.register(lambda: (chromium.close(), play.stop()))
    return chromium


class Opened:
    "A page in the browser, and what went wrong while it was opened."

    def __init__(self, path, **how):
        self.path, self.said = path, []
        self.tab = browser().new_page(viewport=dict(width=WIDTHS["desk"], height=900), **how)
        self.tab.on("console", lambda m: self.said.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda e: self.said.append(str(e)))
        self.tab.on("request", lambda r: self.said.append(r.url) if not r.url.startswith(HERE) else None)

    def __enter__(self):
        self.tab.goto(self.path.as_uri())
        return self

    def __exit__(self, *_):
        self.tab.close()


def complaints(page, tmp_path=None):
    "What the browser's console says about a page, what it loads from a network, and its broken pictures."
    with Opened(page) as o:
        return heard(o)


def heard(o):
    "The same of a page that is open."
    text = o.tab.content()
    assert "<h1" in text, "the page was not drawn"
    return o.said + [u for u in pictures(text) if not readable(o.path.parent / u)]


def pictures(text):
    "Files that a page shows as pictures, in HTML, inside SVG and by its style."
    kinds = r'<img\b[^>]*?\bsrc="([^"]+)"|<image\b[^>]*?\bhref="([^"]+)"|\burl\("([^"]+)"\)'
    found = re.findall(kinds, text)
    return [u for us in found for u in us if u and not u.startswith("data:")]


def readable(path):
    try:
        with Image.open(path) as im:
            im.load()
        return True
    except OSError:
        return False


# what sticks out of the window, scrolls sideways, or hides a part of its words; details are opened for it
STICKS_OUT = """() => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const { clientWidth: room, scrollWidth: wide } = document.documentElement, out = [];
  if (wide > room) out.push(`the page is ${wide} pixels wide`);
  for (const e of document.querySelectorAll("main *")) {
    if (!e.getClientRects().length || e.closest("math, svg") && !e.matches("math, svg")) continue;
    const name = `${e.tagName} “${e.textContent.trim().slice(0, 40)}”`;
    if (e.getBoundingClientRect().right > room + 1) out.push(`${name} sticks out`);
    const holds = e.clientWidth && e.matches("td, th, pre, p, table, div, math");
    if (holds && e.scrollWidth > e.clientWidth + 1) out.push(`${name} is clipped`);
  }
  return out.slice(0, 5);
}"""
# how much brighter the paper is than the ink
BRIGHTER = """() => {
  const style = getComputedStyle(document.body);
  const grey = c => c.match(/[\\d.]+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3;
  return grey(style.backgroundColor) - grey(style.color);
}"""
# the cells of each column of the first table that can be sorted, after a click on that column's head
SORTED = """() => [...document.querySelectorAll("table.sortable")].slice(0, 1).flatMap(table =>
  [...table.tHead.rows[0].cells].map((head, j) => {
    head.click();
    return [head.ariaSort, ...[...table.tBodies[0].rows].map(r => r.cells[j]?.textContent.trim())];
  }))"""


def look(page):
    "What is wrong with a page and how it looks, on both widths and in both lights."
    with Opened(page) as o:
        found = heard(o)
        for light, sign in (("light", 1), ("dark", -1)):
            o.tab.emulate_media(color_scheme=light)
            if sign * o.tab.evaluate(BRIGHTER) < 100:
                found.append(f"in the {light} paper and ink are hard to tell apart")
        for name, width in WIDTHS.items():
            o.tab.set_viewport_size(dict(width=width, height=900))
            found += [f"{name}: {said}" for said in o.tab.evaluate(STICKS_OUT)]
        turned = ("ascending", "descending")
        return found + [f"column {c} does not sort" for c in o.tab.evaluate(SORTED) if c[0] not in turned]


def test_the_browser_complains_about_a_broken_page(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        '<h1>x</h1><main><img src="gone.png"><img alt="x" src="cut.png"><svg><image href="lost.jpg"/></svg>'
        '<table style="width:2000px"><tr><td>wide</td></tr></table></main>'
        '<script>console.error("oh"); nosuch()</script>'
    )
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    said = complaints(page, tmp_path)
    assert any("oh" in s for s in said) and any("nosuch" in s for s in said)
    assert {"gone.png", "cut.png", "lost.jpg"} <= set(said)
    seen = look(page)
    assert any("TABLE “wide” sticks out" in s for s in seen) and any("in the dark" in s for s in seen)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_committed_page(page):
    assert look(page) == []


def test_fresh_report(steps, tmp_path):  # noqa: F811 - the fixture of that name
    "The same for pages made by the code as it is."
    out = tmp_path / "out"
    out.mkdir()
    report.render_pages("mini", (1, 2), steps, out)
    wrong = {p.name: look(p) for p in sorted(out.glob("*.html"))}
    assert not any(wrong.values()), {k: v for k, v in wrong.items() if v}


def test_a_click_on_a_head_sorts(tmp_path):
    from landmark.parts.pages.page import dress
    from landmark.parts.templates import fill

    rows = [
        "b | 9.50 ± 1 | 5 ms",
        "a10 | – | 1 s",
        "*beyond* | | ",
        "c | 1,200 ± 3 | 2 min",
        "a9 | -3 | 80 ms",
    ]
    table = "<table><thead><tr><th>word</th><th>number</th><th>time</th></tr></thead>"
    for row in rows:
        table += "<tr>" + "".join(f"<td>{c.strip()}</td>" for c in row.split("|")) + "</tr>"
    page, nothing = tmp_path / "table.html", dict(nav="", after="", stages=[], sections=[], machine="")
    page.write_text(fill("index.html", title="x", seeds=[1], tables=dress(table + "</table>"), **nothing))
    with Opened(page) as o:
        first = o.tab.evaluate(SORTED)
        again = o.tab.evaluate(SORTED)
    assert first[0] == ["ascending", "a10", "b", "*beyond*", "a9", "c"], (
        "words from a to z, each side of the line"
    )
    assert first[1] == ["descending", "9.50 ± 1", "–", None, "1,200 ± 3", "-3"], "numbers from high to low"
    assert first[2][1:] == ["1 s", "5 ms", None, "2 min", "80 ms"], "times as times"
    assert again[1] == ["descending", "9.50 ± 1", "–", None, "1,200 ± 3", "-3"]
    with Opened(page) as o:
        head = o.tab.locator("th").nth(1)
        head.click()
        head.click()
        column = o.tab.locator("tr:not(.rule) td:nth-child(2)").all_inner_texts()
    assert column == ["9.50 ± 1", "–", "-3", "1,200 ± 3"], "a second click turns the order round"


# file names that break out of HTML, of an attribute, of a script, or turn the words around them
HOSTILE = [
    "a/</script><script>oh()</script>.jpg",
    'a/" onerror="oh()" \'.jpg',
    "b & <b>/😀 夜景.jpg",
    "b & <b>/\u202egpj.exe.jpg",
    "<!-- {{ x }}.jpg",
]


def written(page, inside):
    "A page around a section, its pictures beside it."
    from landmark.parts.photos.pictures import move_pictures
    from landmark.parts.templates import fill

    inside = Markup(move_pictures(inside, page.parent / "pictures", "pictures"))
    nothing = dict(nav="", after="", stages=[], sections=[], machine="")
    page.write_text(fill("index.html", title="walk", seeds=[1], tables=inside, **nothing), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    "A gallery of five photos in a page: two of one place, a copy of the second, two that stand alone."
    from landmark.parts.local.features import extract_many, open_local
    from landmark.parts.photos.browsing import page_browse
    from landmark.parts.photos.pictures import data_uri

    home, rng = tmp_path_factory.mktemp("walk"), np.random.default_rng(0)
    walls = [np.kron(rng.integers(0, 255, (24, 32, 3)), np.ones((10, 10, 1))).astype(np.uint8) for _ in "abc"]
    seen = [walls[0], walls[0][10:, 20:], walls[0][10:, 20:], walls[1], walls[2]]
    ids, files = list("vwxyz"), [home / f"{i}.png" for i in "vwxyz"]
    for file, im in zip(files, seen):
        Image.fromarray(im).save(file)
    photos = pd.DataFrame(dict(image_id=ids, file=HOSTILE, label=["a", "a", "b & <b>", "b & <b>", ""]))
    photos = photos.assign(state=["kept", "kept", "dropped", "dropped", "no label"], reason="", needed=1)
    photos = photos.assign(n_verified=[1, 1, 0, 0, 0], copy_of=list("vwwyz"))
    photos = photos.assign(height=[s.shape[0] for s in seen], width=[s.shape[1] for s in seen])
    pairs = pd.DataFrame(dict(image=["v", "w", "v"], partner=["w", "x", "y"], n_inliers=[200, 300, 3]))
    pairs = pairs.assign(verified=pairs.n_inliers >= 12, is_copy=pairs.n_inliers == 300, labelled=True)
    c = SimpleNamespace(
        photos=photos.set_index("image_id", drop=False),
        pairs=pairs.assign(same_label=[True, False, False], similarity=[0.5, 0.9, 0.1]),
        store=open_local(extract_many(files, ids, home / "local", n_workers=1)),
        row={i: k for k, i in enumerate(ids)},
        uri=lambda i: data_uri(seen[ids.index(i)]),
    )
    return written(home / "walk.html", page_browse(c))


def shown(o):
    "The files that a gallery shows."
    return o.tab.locator("a[data-words]:visible").evaluate_all("cards => cards.map(c => c.title)")


def test_a_gallery_is_sifted(walk):
    with Opened(walk) as o:
        assert sorted(shown(o)) == sorted(HOSTILE) and o.tab.inner_text("output") == "all 5"
        o.tab.fill("input[name=words]", "夜景 b")
        assert shown(o) == HOSTILE[2:3] and o.tab.inner_text("output") == "1 of 5"
        assert o.tab.locator(".strip:visible").count() == 1, "a label without a photo goes"
        o.tab.fill("input[name=words]", "")
        o.tab.select_option("select[name=state]", label="there twice (2)")
        assert sorted(shown(o)) == sorted(HOSTILE[1:3])
        o.tab.select_option("select[name=label]", label="a (2)")
        assert shown(o) == HOSTILE[1:2]
        o.tab.press("input[name=words]", "Enter")
        assert shown(o) == HOSTILE[1:2] and heard(o) == []


def test_a_photo_opens_with_its_neighbours_and_matches(walk):
    with Opened(walk) as o:
        about = o.tab.locator(".about:target")
        o.tab.locator("a[data-state=right]").first.click()
        assert about.locator("b").inner_text() == HOSTILE[0]
        assert about.locator(".cards a").all_inner_texts() == ["a\n200 inliers", "b & <b>\n0.10 alike"]
        assert about.locator("svg path").get_attribute("d").count("M") >= 12
        assert "pictures/" in o.tab.evaluate(
            "getComputedStyle(document.querySelector('.pair i')).backgroundImage"
        )
        about.locator(".cards a").first.click()
        assert about.locator("b").inner_text() == HOSTILE[1] and "300 inliers, a copy" in about.inner_text()
        o.tab.keyboard.press("ArrowLeft")
        assert about.locator("b").inner_text() == HOSTILE[0]
        o.tab.keyboard.press("Escape")
        assert about.count() == 0 and o.tab.evaluate("document.activeElement.title") == HOSTILE[0]
        o.tab.keyboard.press("ArrowRight")
        o.tab.keyboard.press("Enter")
        assert about.locator("b").inner_text() == HOSTILE[1]
        assert heard(o) == [] and o.tab.evaluate("typeof oh") == "undefined"


def test_a_gallery_opens_without_a_script(walk):
    with Opened(walk, java_script_enabled=False) as o:
        assert o.tab.locator("a[data-words]:visible").count() == 5 and not o.tab.is_visible(".sieve")
        o.tab.locator("a[data-state=wrong]").first.click()
        assert o.tab.locator(".about:visible b").inner_text() == HOSTILE[3]
        o.tab.click(".about:visible .back")
        assert o.tab.locator(".about:visible").count() == 0


def test_a_gallery_fits(walk):
    assert look(walk) == []


def test_a_query_opens_with_its_lists(tmp_path):
    from landmark.parts.pages.lists import Asked, page_lists

    hard, easy = {"baseline": list("abc"), "<i>": list("cba")}, {"baseline": list("abc"), "<i>": list("abc")}
    asked = [
        Asked("q1", HOSTILE[0], {"c"}, hard, {"baseline": 0.33, "<i>": 1.0}),
        Asked("q2", HOSTILE[1], {"a"}, easy, {"baseline": 1.0, "<i>": 1.0}),
    ]
    grey = np.full((40, 60, 3), 90, np.uint8)
    inside = page_lists(asked, {"baseline": "baseline", "<i>": "<i>"}, lambda image_id: grey)
    with Opened(written(tmp_path / "lists.html", inside)) as o:
        o.tab.select_option("select[name=moved]", label="<i>: better (1)")
        assert len(shown(o)) == 1 and HOSTILE[0] in shown(o)[0]
        o.tab.select_option("select[name=first]", label="baseline: right")
        assert shown(o) == [] and o.tab.inner_text("output") == "0 of 2"
        o.tab.select_option("select[name=moved]", label="all")
        assert len(shown(o)) == 1 and HOSTILE[1] in shown(o)[0]
        o.tab.select_option("select[name=first]", label="all")
        o.tab.locator("a[data-words]").first.click()
        rows = o.tab.locator(".about:target .list")
        frames = [
            rows.nth(k).locator("> span").evaluate_all("all => all.map(e => e.className)") for k in (0, 1)
        ]
        assert frames == [["wrong", "wrong", "right"], ["right", "wrong", "wrong"]]
        assert rows.nth(1).inner_text().split("\n") == ["was 3", "was 1"]
        assert "+0.67" in o.tab.inner_text(".about:target") and heard(o) == []
    assert look(tmp_path / "lists.html") == []
