"A headless browser opens every committed report page, and test_photos the report of a folder: no console error, no missing image. Skips where there is no Chromium."

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = sorted((ROOT / "reports").glob("*/*.html"))
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on this machine (on Debian: apt install chromium)"
)


def complaints(page, tmp_path):
    "What the browser's console says about a page."
    r = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "<h1" in r.stdout, "the page was not drawn"
    return [l for l in r.stderr.splitlines() if "CONSOLE" in l] + [
        u for u in pictures(r.stdout) if not readable(page.parent / u)
    ]


def pictures(text):
    "Files that a page shows as pictures, in HTML and inside SVG."
    return [
        u
        for u in re.findall(r'<img\b[^>]*?\bsrc="([^"]+)"|<image\b[^>]*?\bhref="([^"]+)"', text)
        for u in u
        if u and not u.startswith("data:")
    ]


def readable(path):
    try:
        with Image.open(path) as im:
            im.load()
        return True
    except OSError:
        return False


def test_the_browser_complains_about_a_broken_page(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text(
        '<h1>x</h1><img src="gone.png"><img alt="x" src="cut.png"><svg><image href="lost.jpg"/></svg><script>console.error("oh"); nosuch()</script>'
    )
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    said = complaints(page, tmp_path)
    assert (
        any("oh" in s for s in said)
        and any("nosuch" in s for s in said)
        and {"gone.png", "cut.png", "lost.jpg"} <= set(said)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_page_loads_without_complaint(page, tmp_path):
    assert complaints(page, tmp_path) == []
