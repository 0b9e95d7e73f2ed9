"JupyterLab opens the page one plays with, and a browser plays: every promise of 10_play, with the mouse."

import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from test_browser import CHROMIUM, browser

from landmark import play
from landmark.parts.core import runs_dir
from landmark.parts.data.layout import read_images
from landmark.parts.data.worlds import make_world

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium on this machine (apt install chromium), or no Playwright (pip install)"
)
PATIENCE = 120_000  # milliseconds, on a machine that does other things as well


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of JupyterLab with the page, on the drawn world, and the folder of runs."
    home = tmp_path_factory.mktemp("lab")
    make_world("tiny")
    (home / "runs").mkdir()
    (home / "runs" / "worlds").symlink_to((runs_dir() / "worlds").resolve())
    play.page_of(play.Config(topk=20), home / "play.ipynb")
    news = home / "s" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}')
    port, token = free_port(), "drawn-world"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += [
        "--ServerApp.ip=127.0.0.1",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={home}",
    ]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    folders = {f"JUPYTER_{k}_DIR": str(home / k) for k in ("CONFIG", "RUNTIME")}
    env = {**os.environ, **folders, "LANDMARK_RUNS": str(home / "runs"), "LANDMARK_WORLD": "tiny"}
    env |= {
        "PYTHONPATH": str(ROOT),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "s"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "w"),
    }
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=home, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}/lab/tree/play.ipynb?token={token}&reset"
    try:
        _wait(f"http://127.0.0.1:{port}/api?token={token}", server, home / "log")
        yield address, home
    finally:
        server.terminate()
        server.wait(30)


def _wait(url, server, log):
    "Until the server answers."
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def tab(lab):
    "The page in a browser, all cells run, and what the console said."
    address, home = lab
    tab = browser().new_page(viewport=dict(width=1400, height=1000))
    tab.set_default_timeout(PATIENCE)
    tab.said = []
    tab.on("console", lambda m: tab.said.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: tab.said.append(str(e)))
    tab.goto(address)
    tab.wait_for_selector(".jp-Notebook")
    tab.wait_for_selector("#jp-main-statusbar :text('Idle')")  # the kernel is there
    tab.locator(".lm-MenuBar-item").filter(has_text="Run").click()
    tab.locator(".lm-Menu-itemLabel").filter(has_text=re.compile("^Run All Cells$")).click()
    try:
        tab.wait_for_selector(".lm-wall[data-n='20'] img[src^='data:image/jpeg']")
    except Exception:
        tab.screenshot(path=home / "failed.png")
        raise AssertionError(f"no list came: {home / 'failed.png'}; {tab.said}") from None
    yield tab
    tab.close()


def shown(tab, wall=1):
    "Keys of the photos of a wall: 0 who may ask, 1 the list."
    return (
        tab.locator(".lm-wall").nth(wall).locator(".lm-tile").evaluate_all("ts => ts.map(t => t.dataset.key)")
    )


def other(tab, before, wall=1):
    "The list, once it is another one."
    for _ in range(PATIENCE // 200):
        if (now := shown(tab, wall)) != before and now:
            return now
        tab.wait_for_timeout(200)
    raise AssertionError(f"the list is still the same; {told(tab)}")


def told(tab):
    "What the line of the desk says; the drawn world was never cleaned, and says so further down."
    said = tab.locator("[role=status]").all_inner_texts()
    return " ".join(s for s in said if "was not cleaned" not in s)


def test_a_list_is_there_and_its_pictures_come(tab):
    first = tab.locator(".lm-wall").nth(1).locator(".lm-tile img").first
    tab.wait_for_function(
        "img => img.src.startsWith('data:image/jpeg') && img.naturalWidth > 20", arg=first.element_handle()
    )
    assert len(shown(tab)) == 20 and told(tab) == ""


def test_another_query_another_list(tab):
    before = shown(tab)
    for query in (3, 0):
        tab.locator(".lm-wall").nth(0).locator(".lm-tile").nth(query).click()
        before = other(tab, before)
    frames = (
        tab.locator(".lm-wall").nth(1).locator(".lm-tile").evaluate_all("ts => ts.map(t => t.dataset.frame)")
    )
    assert set(frames) <= {"right", "wrong"} and "right" in frames


def test_a_method_and_its_slider(tab):
    before = shown(tab)
    tab.locator("select:has(option:text-is('αQE'))").select_option(label="αQE")
    second = other(tab, before)
    knob = tab.locator(
        ".widget-slider:has(label:text-is('n_qe')) [role=slider], "
        ".widget-slider:has(label:text-is('n_qe')) .noUi-handle"
    ).first
    knob.focus()
    for _ in range(9):
        knob.press("ArrowLeft")
    assert other(tab, second) != second


def test_a_click_says_why(tab):
    tab.locator(".lm-wall").nth(1).locator(".lm-tile").nth(1).click()
    tab.wait_for_selector("text=The smaller count is")
    picture = tab.locator("img.widget-image").first
    tab.wait_for_function("img => img.naturalWidth > 300", arg=picture.element_handle())


def test_a_box_crops(tab):
    before = shown(tab)
    photo = tab.locator(".lm-crop").first
    photo.scroll_into_view_if_needed()
    r = photo.bounding_box()
    tab.mouse.move(r["x"] + 0.3 * r["width"], r["y"] + 0.3 * r["height"])
    tab.mouse.down()
    tab.mouse.move(r["x"] + 0.8 * r["width"], r["y"] + 0.9 * r["height"], steps=5)
    tab.mouse.up()
    assert other(tab, before) != before
    tab.wait_for_selector("text=a double click takes the box away")


def test_a_photo_is_uploaded(tab):
    before, photo = shown(tab), read_images(make_world("tiny"), "index").path.iloc[7]
    tab.locator(".lm-drop input").set_input_files(photo)
    now = other(tab, before)
    assert told(tab) == "" and len(now) == 20
    tab.locator("select:has(option:text-is('αQE'))").select_option(label="baseline")
    tab.wait_for_function(
        "() => document.querySelectorAll('.lm-wall')[1].children[0].dataset.key == 'index/7'"
    )


def test_what_is_no_photo_is_a_sentence(tab, tmp_path):
    before = shown(tab)
    (tmp_path / "letter.jpg").write_text("dear reader")
    tab.locator(".lm-drop input").set_input_files(tmp_path / "letter.jpg")
    tab.wait_for_selector("[role=status]:has-text('not an image')")
    assert shown(tab) == before


def test_the_map_and_what_is_taken_away(tab, lab):
    tab.locator(".lm-plane canvas").first.scroll_into_view_if_needed()
    tab.wait_for_selector("text=A click lets a photo ask")
    tab.locator("button:has-text('write them')").scroll_into_view_if_needed()
    tab.locator("button:has-text('write them')").click()
    tab.wait_for_selector("text=list.csv")
    assert len(list((lab[1] / "runs" / "play").glob("*/list.csv"))) == 1


def test_the_console_is_silent(tab):
    assert not tab.said


@pytest.mark.parametrize("width", [1400, 1000])
def test_nothing_sticks_out(tab, width):
    tab.set_viewport_size(dict(width=width, height=1000))
    tab.wait_for_timeout(500)
    wide = """() => [...document.querySelectorAll(".jp-OutputArea-output")]
        .filter(e => e.scrollWidth > e.clientWidth + 2).map(e => [e.scrollWidth, e.clientWidth])"""
    assert tab.evaluate(wide) == []
