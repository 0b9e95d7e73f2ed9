"Search for hyper-parameters: trials through Snakemake, killed and started again, finished ones skipped."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from landmark import graph, search, train
from landmark.parts.core import ParameterError
from landmark.parts.data.worlds import make_world

ROOT = Path(__file__).resolve().parent.parent


def call(runs, *args):  # a process of its own, in a group of its own
    env = {**os.environ, "LANDMARK_RUNS": str(runs), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", "from landmark.search import main; main()", *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def times(runs):
    return {
        p.parent.name: json.loads(p.read_text())["finished"]
        for p in runs.glob("tiny/seed1/train/lr-*/manifest.json")
    }


def test_killed_and_started_again_it_does_only_what_is_missing(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "worlds").symlink_to(make_world("tiny", 1).parent)  # drawn once for all tests
    monkeypatch.setenv("LANDMARK_RUNS", str(runs))
    first, t = call(runs, "run", "tiny", "lr", "-j", "1"), time.time()
    while (
        len(list(runs.glob("tiny/seed1/stamps/train-lr-*.done"))) < 1
        and first.poll() is None
        and time.time() - t < 300
    ):
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    said = first.communicate()[0]
    done = times(runs)
    assert 1 <= len(done) < 3, said[-2000:]
    assert len(search.table("tiny", "lr")) == len(list(runs.glob("tiny/seed1/stamps/train-lr-*.done"))) < 3, (
        "the table shows what is finished"
    )
    again = call(runs, "run", "tiny", "lr", "-j", "2")
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 0 and "0 of 3 trainings are not finished" in said, said[-3000:]
    after = times(runs)
    assert len(after) == 3 and {k: after[k] for k in done} == done, "finished trials are not trained again"
    table = search.table("tiny", "lr")
    assert (
        sorted(table.lr) == [0.001, 0.003, 0.01]
        and table.score.is_monotonic_decreasing
        and table.score.between(0, 1).all()
    )
    pd.testing.assert_frame_equal(
        pd.read_csv(runs / "tiny" / "seed1" / "search" / "lr.csv"),
        table.reset_index(drop=True),
        check_dtype=False,
    )
    best = max(
        (json.loads(p.read_text()) for p in runs.glob("tiny/seed1/search/lr-*.json")),
        key=lambda r: r["models"][0]["score"],
    )
    assert table.trial.iloc[0] == best["trial"] or table.score.iloc[0] == table.score.iloc[1]
    assert table.loss.nunique() == 3, "another rate is another training"
    steps = search.plan("tiny", "lr")
    assert all(s.stamp.exists() for s in steps)


@pytest.mark.parametrize(
    "profile,name",
    [(p.parent.parent.name, p.stem) for p in sorted((ROOT / "params").glob("*/search/*.yaml"))],
)
def test_every_search_file_is_valid(profile, name):
    found = search.trials(profile, name)
    assert len(found) > 1
    steps = search.plan(profile, name)
    assert {s.name for s in steps if isinstance(s, search.Trial)} == set(found)
    assert len({s.dir for s in steps}) == len(steps), "every trial has a folder of its own"


@pytest.mark.parametrize(
    "text,says",
    [
        ("base: v1\ngrid: {lrr: [1]}", "there is no parameter `lrr`, did you mean `lr`"),
        ("base: v1\ngrid: {loss: [arcfaze]}", "`loss` is 'arcfaze'"),
        ("base: v9\ngrid: {lr: [1]}", "builds on v9, but there is no"),
        ("grid: {lr: [1]}", "has no `base`"),
        ("base: v1\ngird: {}", "has gird"),
        ("base: v1\nrandom: {n: 2, lr: {log: [1, 0.1]}}", "cannot be drawn from"),
        ("base: v1\nrandom: {lr: [1, 2]}", "`random` needs `n`"),
    ],
)
def test_a_wrong_file_stops_before_anything_is_trained(tmp_path, monkeypatch, text, says):
    home = tmp_path / "params" / "p"
    (home / "search").mkdir(parents=True)
    (home / "train").mkdir()
    (home / "train" / "v1.yaml").write_text("loss: arcface")
    (home / "search" / "s.yaml").write_text(text)
    for module in (search, graph):
        monkeypatch.setattr(module, "project_root", lambda: tmp_path)
    with pytest.raises(ParameterError, match=says):
        search.plan("p", "s")


def test_searches_are_no_stage():
    assert all(stage in graph.STAGES for stage, _ in graph.read_profile("tiny"))


def test_a_trial_that_diverges_is_finished_and_stands_last(tmp_path, monkeypatch):
    "No score, the reason, a stamp; asked again, nobody trains."
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "worlds").symlink_to(make_world("tiny", 1).parent)
    monkeypatch.setenv("LANDMARK_RUNS", str(runs))
    monkeypatch.setattr(
        search,
        "read_search",
        lambda profile, name: dict(
            base="v1",
            change=dict(world="tiny", loss="softmax", epochs=3, optimizer="sgd", clip=0.0, warmup=0.0),
            grid=dict(lr=[1e30, 0.001]),
        ),
    )
    assert not len(search.table("tiny", "lr")), "nothing is finished"
    steps = graph.prepare(search.plan("tiny", "lr"))
    assert (
        subprocess.run(
            search.command(steps[0]),
            shell=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.DEVNULL,
        ).returncode
        == 0
        and steps[0].stamp.exists()
    )
    search.run_trial(steps[1].params_path, steps[1].score_path)
    steps[1].stamp.touch()
    table = search.table("tiny", "lr").reset_index(drop=True)
    assert (
        table.lr.tolist() == [0.001, 1e30]
        and table.score.notna().tolist() == [True, False]
        and table.seeds.tolist() == [1, 1]
    )
    assert (
        table.diverged[0] == ""
        and table.diverged[1].endswith("training stops")
        and ".jpg" not in table.diverged[1]
    )
    said = json.loads(next(s for s in steps if s.name == table.trial[1]).score_path.read_text())["models"][0]
    assert said["score"] is None and ".jpg" in said["diverged"] and "Lower `lr`" in said["diverged"]
    monkeypatch.setattr(train, "run", lambda cfg: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        search.run_trial(steps[0].params_path, tmp_path / "score.json")
