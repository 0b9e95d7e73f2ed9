"Benchmarks are measured by command and by notebook, in one form, and say plainly what they cannot do."

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from landmark import benchmark
from landmark.parts.bench.side_by_side import FAMILIES
from landmark.parts.core import read_json

ROOT = Path(__file__).resolve().parent.parent
FIELDS = ["name", "size", "ours_s", "plain_s", "ratio", "peak_mib", "device", "threads"]
FIELDS += ["n", "n_disagree", "agrees"]


def bench(*args):
    return subprocess.run(
        [sys.executable, "-c", "from landmark.benchmark import main; main()", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_every_figure_is_one_line_of_the_agreed_form():
    before = {p: p.read_bytes() for p in (ROOT / "reports" / "benchmark").glob("*")}
    r = bench("--only", "metrics", "--quick")
    assert r.returncode == 0, r.stderr[-2000:]
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    assert len(rows) >= 2
    for row in rows:
        assert list(row) == FIELDS
        assert row["name"].startswith("metrics/") and row["agrees"]
        assert row["ratio"] == pytest.approx(row["plain_s"] / row["ours_s"])
    after = {p: p.read_bytes() for p in (ROOT / "reports" / "benchmark").glob("*")}
    assert before == after, "quick figures are kept nowhere"


@pytest.mark.parametrize(
    "args, said",
    [
        (["--only", "speed"], "there is no family 'speed'; there are verify"),
        (["--device", "tpu"], "device is 'tpu'; allowed: auto, cpu, cuda"),
        (["--device", "cuda:77"], "this machine shows"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(args, said):
    r = bench(*args)
    assert r.returncode == 1 and said in r.stderr and "Traceback" not in r.stderr and r.stdout == ""


def test_every_family_has_a_benchmark():
    assert set(benchmark.collect()) == set(FAMILIES) and all(benchmark.collect().values())


def test_the_notebook_is_a_stage(tmp_path):
    "papermill with one parameter; a misspelt one stops before anything is measured."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LANDMARK_RUNS": str(tmp_path / "runs")}

    def run(*p):
        notebook = ["nbs/08_benchmark.ipynb", str(tmp_path / "out.ipynb")]
        command = [sys.executable, "-m", "papermill", *notebook, "-k", "python3", "--no-progress-bar", *p]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)

    r = run("-p", "only", "data")
    assert r.returncode == 0, r.stderr[-3000:]
    (home,) = (tmp_path / "runs").glob("*/seed1/benchmark/default-*")
    rows = [json.loads(line) for line in (home / "figures.jsonl").read_text().splitlines()]
    assert rows and all(list(r)[:11] == FIELDS and r["name"].startswith("data/") for r in rows)
    assert read_json(home / "manifest.json")["metrics"]["figures"] == len(rows)
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    shown = [o.get("data", {}) for c in cells if c.cell_type == "code" for o in c.outputs]
    assert any("image/png" in data for data in shown)
    assert sum("data/" in data.get("text/markdown", "") for data in shown) == 2
    r = run("-p", "onyl", "data")
    assert r.returncode != 0 and "did you mean `only`" in r.stderr


def test_a_finished_run_has_nothing_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LANDMARK_RUNS", str(tmp_path))
    made = []

    def fake(quick, device):
        made.append(quick)
        yield benchmark.Row("data/x", "1", 1.0, 2.0, 2.0, 0.0, "cpu", 1, 1, 0, True)

    fake.__module__ = "landmark.parts.bench.data"
    monkeypatch.setattr(benchmark, "chosen", lambda only: [("data: x", fake)])
    cfg = benchmark.Config(profile="test", only="data")
    out = benchmark.run(cfg)
    first = (out / "manifest.json").stat().st_mtime_ns
    assert benchmark.run(cfg) == out and made == [True]
    assert (out / "manifest.json").stat().st_mtime_ns == first
    benchmark.run(benchmark.Config(profile="test", only="data", quick=False))
    assert made == [True, False]
