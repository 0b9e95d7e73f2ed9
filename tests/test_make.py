"The Makefile where people keep their clones: in a folder with spaces, quotes and letters of their own."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What git would clone of this tree, in an odd place, with this environment."
    if not list(VENV.glob(".landmark-*")) or not shutil.which("make"):
        pytest.skip("`make` did not set up this environment; it would install everything once more")
    home = tmp_path_factory.mktemp("a b") / "Émile's clone #1"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.splitlines()):
        if not name.startswith("reports/") and (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, home / name)
    subprocess.run(["git", "init", "-q", "."], cwd=home, check=True)
    return home


def make(home, *words):
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "LANDMARK_RUNS")}
    done = subprocess.run(["make", *words, f"VENV={VENV}"], cwd=home, capture_output=True, text=True, env=env)
    return done.returncode, done.stdout + done.stderr


def test_make_runs_in_a_folder_with_spaces(clone):
    status, said = make(clone, "runs")
    assert status == 0 and "no runs yet in" in said, said


def test_the_merge_driver_is_installed(clone):
    "`.gitattributes` names it; without the driver a merge of generated files would stop."
    assert "merge=regen" in (clone / ".gitattributes").read_text()
    make(clone, "runs")
    driver = subprocess.run(
        ["git", "config", "merge.regen.driver"], cwd=clone, capture_output=True, text=True
    )
    assert driver.stdout.strip() == "true"
