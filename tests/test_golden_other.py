"""The golden tests on another set: no size is assumed; changed and unread numbers are noticed."""

import os
import subprocess
import sys
from pathlib import Path

import golden_data
import numpy as np
import other_golden
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    other_golden.make(folder, seed=11)
    return folder


def golden_tests(folder, *args):
    r = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "test_golden.py"), "-q", *args],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "LANDMARK_GOLDEN": str(folder)},
    )
    return r.returncode, r.stdout


def test_the_other_set_has_the_same_keys_and_other_sizes(other):
    for path in sorted((HERE / "golden").glob("*.npz")):
        ours, theirs = np.load(path), np.load(other / path.name)
        assert set(ours.files) == set(theirs.files)
        assert all(
            ours[k].ndim == theirs[k].ndim and ours[k].dtype.kind == theirs[k].dtype.kind for k in ours.files
        )
        assert any(ours[k].shape != theirs[k].shape for k in ours.files)
    assert {p.name for p in other.glob("*.npz")} == {p.name for p in (HERE / "golden").glob("*.npz")}


def test_every_golden_test_passes_on_the_other_set(other):
    code, said = golden_tests(other)
    assert code == 0 and "skipped" not in said, said[-3000:]


def test_a_changed_number_fails(other):
    "One entry of the first file, by a hundredth."
    kept = (other / "losses.npz").read_bytes()
    z = dict(np.load(other / "losses.npz"))
    z["cosine"][3, 5] += 0.01
    np.savez(other / "losses.npz", **z)
    try:
        code, said = golden_tests(other, "-x")
        assert code == 1 and "FAILED" in said and "test_cosines" in said
    finally:
        (other / "losses.npz").write_bytes(kept)


def test_a_key_that_nobody_reads_is_named(tmp_path, monkeypatch):
    np.savez(tmp_path / "egt.npz", known=np.zeros(2), unknown=np.zeros(3))
    monkeypatch.setattr(golden_data, "FOLDER", tmp_path)
    monkeypatch.setattr(golden_data, "read_keys", {})
    monkeypatch.setattr(golden_data, "_files", {})
    golden_data.load("egt")["known"]
    assert golden_data.unread_keys() == {"egt": ["unknown"]}
