"Tests run on the tiny world, on one thread, from the project's root."

import os
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("LANDMARK_WORLD", "tiny")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("LANDMARK_GOLDEN"):
    os.environ["LANDMARK_GOLDEN"] = os.path.abspath(os.environ["LANDMARK_GOLDEN"])
os.chdir(ROOT)
for p in (str(ROOT), str(ROOT / "tests")):
    if p not in sys.path:
        sys.path.insert(0, p)


def contributing(name: str) -> str:
    "The Python that CONTRIBUTING.md shows for something registered as `name`."
    blocks = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```python\n")[1:]
    return next(b for b in (block.partition("```")[0] for block in blocks) if f'("{name}"' in b)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call():
    "What a test, or a command that it calls, changes in the environment is gone afterwards."
    with patch.dict(os.environ):
        yield


left_out = pytest.StashKey()  # how many tests -k, -m or --deselect left out


def pytest_deselected(items):
    "Remember that only a part of the tests runs."
    for i in items[:1]:
        i.config.stash[left_out] = i.config.stash.get(left_out, 0) + len(items)
