"""The profile gld, from an empty folder to two files to hand in: every step of it, on a small served world.

The parameter files are those of `params/gld`, read and planned by the graph. What is changed in them stands
in `CHANGED` and `ALWAYS`, and nothing else: the machine and sizes; and stage 00 hears where data is served.
"""

import dataclasses
import gzip
import importlib
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from gld_bucket import N_TARS, NAMES, served

from landmark import graph
from landmark.parts.core import read_json
from landmark.parts.data.handover import COMPETITIONS, check_submission, hand_in
from landmark.parts.data.layout import benchmarks, read_ids, read_images, read_retrieval_solution, splits
from landmark.parts.data.submission import read_recognition, read_retrieval
from landmark.parts.data.worlds import make_world
from landmark.parts.images.reading import image_size
from landmark.parts.metrics import map_of_submission
from landmark.tables import METHODS, RECOGNITION

CHANGED = dict(  # stage → parameter → value, wherever a file of params/gld states the parameter
    train=dict(
        pretrained=False,  # nothing of the hub
        weights="",  # nor of FishNet's authors
        backbone="test_convnext",  # a quarter of a million parameters, in four stages as FishNet has
        sizes="128",
        scale_up="160",
        epochs=2,
        stop_after=1,
        batch_size=4,
        precision="fp32",
        n_loaders=0,
    ),
    extract=dict(sizes="128", bench_side=128, min_side=64, batch_size=4, precision="fp32", n_loaders=0),
    clean=dict(min_inliers=5),  # DELF on such a network, of photos of 224 pixels
)
ALWAYS = dict(device="cpu", devices=1, n_workers=1, n_negatives=2)  # wherever a stage has it


def changed(stage, params):
    "A parameter file of gld for this test."
    fields = {f.name for f in dataclasses.fields(importlib.import_module(f"landmark.{stage}").Config)}
    out = {k: CHANGED.get(stage, {}).get(k, v) for k, v in params.items()}
    return out | {k: v for k, v in ALWAYS.items() if k in fields}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The drawn world, the fetched one, the steps of the profile: all done, in this process."
    home = tmp_path_factory.mktemp("gld")
    with pytest.MonkeyPatch.context() as patch:
        drawn = make_world("tiny", 1)
        patch.setenv("LANDMARK_RUNS", str(home / "runs"))
        patch.setenv("LANDMARK_DATA", str(home))
        small = {key: changed(key[0], params) for key, params in graph.read_profile("gld").items()}
        with served(drawn) as hosts:
            urls = str(hosts.v1_urls(drawn, home / "v1.csv"))
            small["data", "main"] |= dict(bucket=hosts.bucket, revisited=hosts.revisited, v1_urls=urls)
            small["data", "main"] |= dict(n_tars=N_TARS)
            steps = graph.plan("gld", more=small, given=dict(runs="gld-small"))
            steps = sorted(steps, key=lambda s: s.stage != "data")  # everything waits for the data
            for step in graph.with_shards(graph.prepare(steps)):
                importlib.import_module(f"landmark.{step.stage}").run(step.cfg)
        yield drawn, home / "gld", {f"{s.stage}/{s.name}": s for s in steps}


def test_every_changed_value_is_one_that_gld_states():
    stated = {(stage, k) for (stage, _), params in graph.read_profile("gld").items() for k in params}
    assert {(stage, k) for stage, values in CHANGED.items() for k in values} <= stated


def test_the_world_is_what_was_served(run):
    drawn, world, _ = run
    assert benchmarks(world) == sorted(NAMES.values())
    for split in splits(drawn):
        name, _, kind = split.rpartition("_")
        theirs = f"{NAMES[name]}_{kind}" if name in NAMES else split
        assert set(read_ids(world, theirs)) == set(read_ids(drawn, split)), split
    for v, split in (("v2", "train"), ("v2", "index"), ("v2", "test")):
        for image in read_images(drawn, f"v2_{split}" if split == "train" else split).itertuples():
            i = image.image_id
            copy = world / v / split / i[0] / i[1] / i[2] / f"{i}.jpg"
            assert copy.read_bytes() == Path(image.path).read_bytes()
    kept = read_images(world, "v1_train")
    assert len(kept) == len(read_images(drawn, "v1_train"))
    assert all(min(image_size(p)) >= 256 and max(image_size(p)) <= 800 for p in kept.path)


def test_every_step_of_the_profile_ran(run):
    _, _, steps = run
    assert set(steps) == {f"{stage}/{name}" for stage, name in graph.read_profile("gld")}
    for name, step in steps.items():
        made = read_json(step.dir / "manifest.json")
        assert not made["metrics"].get("made_up"), name
    assert read_json(steps["data/main"].dir / "manifest.json")["metrics"]["shared"] == 0
    assert not (steps["data/main"].dir / "problems.csv").exists() or set(
        pd.read_csv(steps["data/main"].dir / "problems.csv").problem.str.split().str[0]
    ) == {"label"}  # labels with one image, nothing missing or broken


def test_the_tables_have_the_rows_of_the_paper(run):
    tables = run[2]["tables/main"].dir

    def rows(name):
        return pd.read_csv(tables / f"{name}.csv").iloc[:, 0].tolist()

    assert rows("losses") == ["softmax", "contrastive", "cosface", "arcface"]
    assert rows("training") == ["v1", "v2", "v1+v2", "v2-clean", "v1+v2-clean"]
    assert rows("reranking")[:9] == list(METHODS)
    assert rows("recognition")[:3] == RECOGNITION
    assert {"ROxf M", "ROxf H", "RPar M", "RPar H", "Private"} <= set(pd.read_csv(tables / "losses.csv"))
    overlap = pd.read_csv(tables / "overlap.csv")
    assert set(overlap.labels) == {"not known"} and set(overlap.benchmark) == set(NAMES.values())
    assert "GLD-v2 (clean)" in set(overlap["training set"])


def unpacked(path):
    "Lines of a compressed table."
    return gzip.decompress(path.read_bytes()).decode().split("\n")


def test_the_retrieval_submission_is_what_kaggle_wants(run):
    _, world, steps = run
    path = steps["rerank/ensemble"].dir / "submission_retrieval.csv.gz"
    head, *lines, end = unpacked(path)
    official = [line.partition(",")[0] for line in (world / "v2/test.csv").read_text().split("\n")[1:-1]]
    assert (head, end) == ("id,images", "")
    assert [line.partition(",")[0] for line in lines] == official
    sent = read_retrieval(path, official, read_ids(world, "index"))
    assert sent.images.map(len).max() <= 100 and sent.images.map(len).min() > 0
    assert check_submission("retrieval", path, world) == len(official)
    last = read_retrieval(steps["rerank/ensemble"].dir / "submission-ensemble-aqe+sort+insert.csv")
    assert last.equals(sent)
    solution = read_retrieval_solution(world)
    made = pd.read_csv(steps["rerank/ensemble"].dir / "metrics.csv").query("method == 'aqe+sort+insert'")
    for usage in ("Public", "Private"):
        truth = solution[solution.usage == usage].set_index("image_id").images.to_dict()
        if truth:
            scored = map_of_submission(sent.set_index("image_id").images.to_dict(), truth)
            value = made[made.benchmark == f"gld_{usage.lower()}"].value.item()
            assert scored == pytest.approx(value, abs=1e-9)


def test_the_recognition_submission_is_what_kaggle_wants(run):
    _, world, steps = run
    path = steps["recognize/ensemble"].dir / "submission_recognition.csv.gz"
    head, *lines, end = unpacked(path)
    assert (head, end) == ("id,landmarks", "")
    assert [line.partition(",")[0] for line in lines] == read_ids(world, "test").tolist()
    answers = [line.partition(",")[2].split(" ") for line in lines]
    assert all(len(a) == 2 or a == [""] for a in answers) and sum(len(a) == 2 for a in answers) > 0
    known = set(read_images(world, "v2_train").landmark_id)
    assert {int(a[0]) for a in answers if len(a) == 2} <= known
    sent = read_recognition(path, read_ids(world, "test"))
    assert np.isfinite(sent.score[sent.landmark_id >= 0]).all()
    assert check_submission("recognition", path, world) == int((sent.landmark_id >= 0).sum())


FAKE = """#!/bin/sh
printf '%s\\n' "$@" > "$0.got"
echo Successfully submitted
"""


def test_both_are_handed_to_the_client(run, tmp_path, monkeypatch):
    _, world, steps = run
    client = tmp_path / "kaggle"
    client.write_text(FAKE)
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for track, stage in (("retrieval", "rerank"), ("recognition", "recognize")):
        home = steps[f"{stage}/ensemble"].dir
        said = hand_in(track, home / f"submission_{track}.csv.gz", world, "six models")
        assert said.endswith("the client says: Successfully submitted")
        file = str(home / f"submission_{track}.csv.gz")
        wanted = ["competitions", "submit", "-c", COMPETITIONS[track], "-f", file, "-m", "six models"]
        assert (tmp_path / "kaggle.got").read_text().splitlines() == wanted
